"""Address guard: which addresses receivers may have, decided on the IP address when connecting."""

from collections.abc import Sequence
from ipaddress import ip_address

import pytest

from gradwatch_server.notify.http_client import (
    AddressGuard,
    AddressRefused,
    HttpClient,
    HttpRequest,
    parse_networks,
    refusal_reason,
)
from tests.processes import WebhookReceiver, run_apart

REFUSED = [
    ("0.0.0.0", "unspecified"),
    ("127.0.0.1", "loopback"),
    ("127.255.255.254", "loopback"),
    ("10.0.0.1", "private"),
    ("172.16.0.1", "private"),
    ("172.31.255.255", "private"),
    ("192.168.1.1", "private"),
    ("100.64.0.1", "private"),
    ("192.0.0.1", "private"),
    ("192.0.2.1", "private"),
    ("198.18.0.1", "private"),
    ("198.51.100.1", "private"),
    ("203.0.113.1", "private"),
    ("240.0.0.1", "private"),
    ("255.255.255.255", "private"),
    ("169.254.0.1", "link-local"),
    ("169.254.169.254", "link-local"),
    ("224.0.0.1", "multicast"),
    ("239.255.255.255", "multicast"),
    ("::", "unspecified"),
    ("::1", "loopback"),
    ("fe80::1", "link-local"),
    ("fe80::1%eth0", "link-local"),
    ("fc00::1", "private"),
    ("fd00:ec2::254", "private"),
    ("fec0::1", "site-local"),
    ("ff02::1", "multicast"),
    ("2001:db8::1", "private"),
    ("100::1", "private"),
    ("::ffff:127.0.0.1", "loopback"),
    ("::ffff:10.0.0.1", "private"),
    ("::ffff:169.254.169.254", "link-local"),
    ("::127.0.0.1", "loopback"),
    ("64:ff9b::7f00:1", "loopback"),
    ("64:ff9b::a9fe:a9fe", "link-local"),
    ("2002:7f00:1::", "loopback"),
    ("2002:a00:1::", "private"),
    ("2001:0:7f00:1::", "loopback"),
    ("2001:0:808:808:0:0:80ff:fffe", "loopback"),
    ("0.1.2.3", "private"),
    ("100.127.255.255", "private"),
    ("192.88.99.1", "private"),
    ("::ffff:0.0.0.0", "unspecified"),
    ("::ffff:100.64.0.1", "private"),
    ("::ffff:0:7f00:1", "loopback"),
    ("64:ff9b::", "unspecified"),
    ("64:ff9b::a00:1", "private"),
    ("64:ff9b::6440:1", "private"),
    ("64:ff9b:1::a00:1", "private"),
    ("2002:a9fe:a9fe::1", "link-local"),
    ("2001:2::1", "private"),
    ("2001:20::1", "private"),
    ("3fff::1", "private"),
    ("5f00::1", "private"),
    ("fdff::1", "private"),
    ("febf::1", "link-local"),
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.216.34",
    "172.32.0.1",
    "100.128.0.1",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]


@pytest.mark.parametrize(("address", "kind"), REFUSED)
def test_addresses_that_are_not_public_are_refused(address: str, kind: str) -> None:
    found = refusal_reason(ip_address(address), ())
    assert found is not None
    assert found.startswith(kind)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert refusal_reason(ip_address(address), ()) is None


@pytest.mark.parametrize(
    ("address", "network", "passes"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
        ("192.168.1.1", "10.0.0.0/8", False),
        ("fd00::1", "fd00::/8", True),
        ("127.0.0.1", "127.0.0.1/32", True),
        ("127.0.0.2", "127.0.0.1/32", False),
        ("64:ff9b::a01:203", "10.0.0.0/8", True),
        ("64:ff9b::a01:203", "64:ff9b::/96", True),
        ("2001:0:a01:203:0:0:80ff:fffe", "10.0.0.0/8", False),
    ],
)
def test_only_allowed_networks_are_excepted(address: str, network: str, passes: bool) -> None:
    assert (refusal_reason(ip_address(address), parse_networks([network])) is None) is passes


class Names:
    """A resolver whose answers change, as a hostile name server's do."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return answer


def test_one_refused_address_among_public_ones_refuses_the_host() -> None:
    guard = AddressGuard([], Names(["8.8.8.8", "10.0.0.1"]))
    with pytest.raises(AddressRefused, match=r"has the private or reserved address 10\.0\.0\.1: .* allow_networks"):
        run_apart(guard.resolve("example.com", 443))


def test_a_name_is_resolved_once_per_connection_which_goes_to_the_checked_address() -> None:
    """DNS rebinding: the second answer would be the metadata service; nobody asks for it."""
    with WebhookReceiver() as receiver:
        names = Names(["127.0.0.1"], ["169.254.169.254"])
        port = receiver.url.rpartition(":")[2]

        async def post_twice() -> tuple[int | None, str]:
            guard = AddressGuard(["127.0.0.0/8"], names)
            async with HttpClient(guard, 5, 1) as client:
                first = await client.post(HttpRequest(f"http://rebound.example:{port}", b"{}", {}))
            assert names.asked == 1
            async with HttpClient(guard, 5, 1) as client:
                second = await client.post(HttpRequest(f"http://rebound.example:{port}", b"{}", {}))
            return first.status, second.error

        status, error = run_apart(post_twice())
        assert status == 204
        assert "link-local address 169.254.169.254" in error
        assert len(receiver.requests) == 1
        assert receiver.requests[0][0]["host"].startswith("rebound.example")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f000001", "2130706433", "127.1"])
def test_every_spelling_of_loopback_is_refused_on_the_wire(host: str) -> None:
    with WebhookReceiver() as receiver:

        async def post() -> str:
            async with HttpClient(AddressGuard([]), 5, 1) as client:
                port = receiver.url.split(":")[2].partition("/")[0]
                return (await client.post(HttpRequest(f"http://{host}:{port}/hook?token=abc", b"{}", {}))).error

        error = run_apart(post())
        assert "AddressRefused" in error or "gaierror" in error
        assert "abc" not in error
        assert receiver.requests == []
