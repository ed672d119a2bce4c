"""Which addresses the server may connect to on a receiver's behalf, decided on the address itself, when connecting.

A check of the host name alone is worth nothing: a name may resolve to a public address when it is checked and to
169.254.169.254 when it is used (DNS rebinding). So the name is resolved once, every address is checked, and the
connection goes to a checked address.
"""

import asyncio
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

EVERYWHERE = ("0.0.0.0/0", "::/0")
"""What an operator who names an address on the command line allows for it."""
_TRANSLATED = tuple(map(ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96")))
"""NAT64 and stateless translation: the last 32 bits are an IPv4 address."""
_IPV4_COMPATIBLE = ip_network("::/96")
_SITE_LOCAL = ip_network("fec0::/10")
_SPECIAL = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "5f00::/16")))
"""In IANA's registries of special addresses, and global to some versions of Python."""
_AT_ONCE = 2


class Resolver(Protocol):
    """Finds the addresses of a host."""

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return its addresses; raises OSError where it has none."""


class AddressRefused(OSError):
    """The receiver's address is in a range that is not allowed."""


class SystemResolver:
    """Asks the system, in threads of its own: a name server that does not answer holds up nobody else's names."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="gradwatch-names")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return its addresses; raises OSError where it has none."""
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def parse_networks(given: Iterable[str]) -> tuple[Network, ...]:
    """Return the networks.

    Raises:
        ValueError: one of them is not a network; the text names it.
    """
    return tuple(ip_network(network) for network in given)


def refusal(address: Address, allowed: Sequence[Network]) -> str | None:
    """Return why an address is refused; none: it is public, or the configuration allows its network."""
    if _within(address, allowed):
        return None
    kinds = (_kind(each) for each in (address, *_embedded(address)) if not _within(each, allowed))
    return next(filter(None, kinds), None)


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(network.version == address.version and address in network for network in networks)


def _embedded(address: Address) -> tuple[IPv4Address, ...]:
    """Return the IPv4 addresses that an IPv6 address stands for: mapped, compatible, translated, 6to4 and Teredo."""
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


def check_address(setting: str, address: str) -> None:
    """Check that an address is one that can be asked: http or https, a host, a port that exists.

    Raises:
        ValueError: it is not; the text names the setting and shows no password.
    """
    try:
        parts = urlsplit(address)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        fine = fine and not any(character.isspace() or ord(character) < 32 for character in address)
    except ValueError:  # a bracket that is not closed, a port beyond 65535
        fine = False
    if not fine:
        shown = address.rpartition("@")[2] if "@" in address else address
        raise ValueError(f"{setting} {shown!r} is not an http or https address with a host: http://host:port/path")


def is_loopback(host: str) -> bool:
    """Return whether a host, as an address has it, can only be the machine itself."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Resolves a host and lets only allowed addresses pass."""

    def __init__(self, allow_networks: Iterable[str], resolver: Resolver | None = None) -> None:
        self._allowed = parse_networks(allow_networks)
        self._resolver = resolver or SystemResolver()

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host, all of them allowed.

        Raises:
            AddressRefused: one of them is not.
            OSError: the name is not known.
        """
        found = [ip_address(address) for address in await self._resolver(host, port)]
        for address in found:
            kind = refusal(address, self._allowed)
            if kind is not None:
                raise AddressRefused(
                    f"{host} has the {kind} address {address}: if this is meant, add its network to the receiver's "
                    "allow_networks"
                )
        if not found:
            raise OSError(f"{host} has no address")
        return [str(address) for address in found]
