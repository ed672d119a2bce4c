"""HTTP client for notifications: one POST to a configured URL, and the result of a delivery attempt.

The URL comes from a configuration file and may lead anywhere, so the client connects only to addresses that the address
guard allows, limits the time and the bytes of the response, and follows no redirects, proxies or cookies.
"""

import asyncio
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import httpcore

from gradwatch.wire import retry_after_seconds
from gradwatch_server.notify.address_guard import AddressGuard

Verdict = Literal["delivered", "failed", "refused", "gone"]

_TEMPORARY = (408, 425, 429)
_MOST_READ_BYTES = 16 * 1024
_MOST_TEXT_CHARACTERS = 500


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
        return "refused" if 400 <= self.status < 500 and self.status not in _TEMPORARY else "failed"


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
        headers: list[tuple[bytes | str, bytes | str]] = [("user-agent", "gradwatch"), *request.headers.items()]
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
