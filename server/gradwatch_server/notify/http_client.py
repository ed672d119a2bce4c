"""HTTP client for notifications, and the guard of the addresses that it may connect to (SSRF protection).

The client sends one POST to a configured URL and returns the result of the delivery attempt. The URL comes from a
configuration file and may lead anywhere, so the client connects only to addresses that the address guard allows, limits
the time and the bytes of the response, and follows no redirects, proxies or cookies.

Checking the host name is not enough: it may resolve to a public address when it is checked and to 169.254.169.254 when
it is used (DNS rebinding). So the guard resolves the name once and checks every address, and the connection goes to one
of the checked addresses.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal, Protocol, Self
from urllib.parse import urlsplit

import httpcore

from gradwatch import __version__
from gradwatch.wire import retry_after_seconds

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Verdict = Literal["delivered", "failed", "refused", "gone"]

ALL_NETWORKS = ("0.0.0.0/0", "::/0")
"""Networks allowed for a receiver whose URL the operator gave on the command line."""
_TRANSLATED = tuple(map(ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96")))
"""Networks of NAT64 and stateless translation: the last 32 bits of an address are an IPv4 address."""
_IPV4_COMPATIBLE = ip_network("::/96")
_SITE_LOCAL = ip_network("fec0::/10")
_SPECIAL = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "5f00::/16")))
"""Networks in IANA's registries of special addresses that some versions of Python take for global."""
_RESOLVER_THREADS = 2
_TEMPORARY_STATUSES = (408, 425, 429)
_MOST_READ_BYTES = 16 * 1024
_MOST_TEXT_CHARACTERS = 500


class Resolver(Protocol):
    """Resolves a host name."""

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return the IP addresses of a host; raises OSError if it has none."""


class AddressRefused(OSError):
    """The receiver's host has an address that is not public and not in ``allow_networks``."""


class SystemResolver:
    """Resolves with the system's resolver, in threads of its own.

    A name server that does not respond blocks these threads only, and so only this receiver's names.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="gradwatch-names")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return the IP addresses of a host; raises OSError if it has none."""
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def parse_networks(given: Iterable[str]) -> tuple[Network, ...]:
    """Parse networks in CIDR notation.

    Raises:
        ValueError: one of them is not a network; the text names it.
    """
    return tuple(ip_network(network) for network in given)


def refusal_reason(address: Address, allowed: Sequence[Network]) -> str | None:
    """Return the kind of a refused address, such as "loopback"; None if it is public or in an allowed network."""
    if _within(address, allowed):
        return None
    kinds = (_kind(each) for each in (address, *_embedded(address)) if not _within(each, allowed))
    return next(filter(None, kinds), None)


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(network.version == address.version and address in network for network in networks)


def _embedded(address: Address) -> tuple[IPv4Address, ...]:
    """Return the IPv4 addresses inside an IPv6 address: mapped, compatible, translated, 6to4 and Teredo."""
    if isinstance(address, IPv4Address):
        return ()
    low = IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None or _within(address, _TRANSLATED):
        return (low,)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo
    return (low,) if address in _IPV4_COMPATIBLE and int(address) > 1 else ()


def _kind(address: Address) -> str | None:
    kinds = (
        ("unspecified", address.is_unspecified),
        ("loopback", address.is_loopback),
        ("link-local", address.is_link_local),
        ("multicast", address.is_multicast),
        ("site-local", address in _SITE_LOCAL),
    )
    for kind, holds in kinds:
        if holds:
            return kind
    if isinstance(address, IPv6Address) and _embedded(address):
        return None  # the address inside decides
    public = address.is_global and not address.is_reserved and not _within(address, _SPECIAL)
    return None if public else "private or reserved"


def check_url(setting: str, url: str) -> None:
    """Check that a URL has the scheme http or https, a host, and a port between 1 and 65535 if any.

    Raises:
        ValueError: the URL is not valid; the text names the setting and shows no password.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and not any(character.isspace() or ord(character) < 32 for character in url)
    except ValueError:  # a bracket that is not closed, a port beyond 65535
        valid = False
    if not valid:
        shown = url.rpartition("@")[2] if "@" in url else url
        raise ValueError(f"{setting} {shown!r} is not an http or https address with a host: http://host:port/path")


def is_loopback(host: str) -> bool:
    """Return whether the host of a URL can only be this machine: ``localhost`` or a loopback address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class AddressGuard:
    """Resolves the host of a receiver and refuses it unless all of its addresses are allowed."""

    def __init__(self, allow_networks: Iterable[str], resolver: Resolver | None = None) -> None:
        self._allowed = parse_networks(allow_networks)
        self._resolver = resolver or SystemResolver()

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the IP addresses of a host, all of them allowed.

        Raises:
            AddressRefused: one of its addresses is not allowed.
            OSError: the name cannot be resolved.
        """
        found = [ip_address(address) for address in await self._resolver(host, port)]
        for address in found:
            kind = refusal_reason(address, self._allowed)
            if kind is not None:
                raise AddressRefused(
                    f"{host} has the {kind} address {address}: if this is meant, add its network to the receiver's "
                    "allow_networks"
                )
        if not found:
            raise OSError(f"{host} has no address")
        return [str(address) for address in found]


@dataclass(frozen=True)
class DeliveryResult:
    """The response of a receiver to one delivery attempt, or the reason why there is none."""

    status: int | None
    """HTTP status, or the nearest one where the protocol is not HTTP; None: the receiver did not respond."""
    error: str = ""
    retry_after_seconds: float | None = None
    text: str = ""
    """The first characters of the response body."""

    @property
    def verdict(self) -> Verdict:
        """Decide what follows from the response.

        ``failed`` is tried again (a redirect too: none is followed), ``refused`` is never tried again, and ``gone``
        disables the receiver.
        """
        if self.status is None:
            return "failed"
        if 200 <= self.status < 300:
            return "delivered"
        if self.status == 410:
            return "gone"
        return "refused" if 400 <= self.status < 500 and self.status not in _TEMPORARY_STATUSES else "failed"


@dataclass(frozen=True)
class HttpRequest:
    """A POST request."""

    url: str
    body: bytes
    headers: Mapping[str, str]


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Opens TCP connections only to addresses that the guard allows."""

    def __init__(self, guard: AddressGuard) -> None:
        self._guard = guard
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve the host, check its addresses, and connect to the first one that accepts the connection."""
        addresses = await self._guard.resolve(host, port)
        for address in addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.NetworkError:
                continue
        return await self._network.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """Sleep; httpcore asks every backend for this."""
        await self._network.sleep(seconds)


class HttpClient:
    """Posts to one receiver over a connection pool of its own; an asynchronous context manager."""

    def __init__(self, guard: AddressGuard, timeout_seconds: float, at_once: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=at_once,
            keepalive_expiry=30.0,
            network_backend=_GuardedBackend(guard),
        )

    async def __aenter__(self) -> Self:
        """Return the client; it connects when it posts."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def post(self, request: HttpRequest) -> DeliveryResult:
        """Post once, and read only the first bytes of the response; no error text contains the URL."""
        agent = ("user-agent", f"gradwatch/{__version__}")
        headers: list[tuple[bytes | str, bytes | str]] = [agent, *request.headers.items()]
        try:
            async with asyncio.timeout(self._timeout_seconds):
                async with self._pool.stream("POST", request.url, headers=headers, content=request.body) as response:
                    return await _read(response)
        except TimeoutError:
            return timed_out(self._timeout_seconds)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            return DeliveryResult(None, f"{type(error).__name__}: {error}"[:_MOST_TEXT_CHARACTERS])


def timed_out(timeout_seconds: float) -> DeliveryResult:
    """Return the result of an attempt that took longer than ``delivery.timeout_seconds``, whatever the protocol."""
    return DeliveryResult(None, f"no answer within {timeout_seconds:g} s (delivery.timeout_seconds)")


async def _read(response: httpcore.Response) -> DeliveryResult:
    read = bytearray()
    async for chunk in response.aiter_stream():
        read += chunk
        if len(read) >= _MOST_READ_BYTES:
            break
    fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    return DeliveryResult(
        response.status,
        "" if 200 <= response.status < 300 else f"HTTP {response.status}",
        retry_after_seconds(fields.get(b"retry-after"), time.time()),
        bytes(read).decode(errors="replace")[:_MOST_TEXT_CHARACTERS],
    )
