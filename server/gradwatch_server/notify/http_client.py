"""One POST to an address that somebody configured: guarded, bounded, without redirects, proxies or cookies."""

import asyncio
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import httpcore

from gradwatch_server.notify.address_guard import Guard
from gradwatch_server.notify.delivery_result import Answer, retry_after

_MOST_READ_BYTES = 16 * 1024
_MOST_TEXT_CHARACTERS = 500


@dataclass(frozen=True)
class Letter:
    """What is posted."""

    url: str
    body: bytes
    headers: Mapping[str, str]


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to checked addresses only."""

    def __init__(self, guard: Guard) -> None:
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
        """Resolve, check and connect: to the first of the checked addresses that takes the connection."""
        addresses = await self._guard.resolve(host, port)
        for address in addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.NetworkError:
                continue
        return await self._network.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._network.sleep(seconds)


class Postman:
    """Posts to one receiver, on connections of its own."""

    def __init__(self, guard: Guard, timeout_seconds: float, at_once: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=at_once,
            keepalive_expiry=30.0,
            network_backend=_GuardedBackend(guard),
        )

    async def __aenter__(self) -> Self:
        """Open the connections when they are needed."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        await self._pool.aclose()

    async def post(self, letter: Letter) -> Answer:
        """Post once; of the answer no more than its first bytes are read, and its address is never in an error."""
        headers: list[tuple[bytes | str, bytes | str]] = [("user-agent", "gradwatch"), *letter.headers.items()]
        try:
            async with asyncio.timeout(self._timeout_seconds):
                async with self._pool.stream("POST", letter.url, headers=headers, content=letter.body) as response:
                    return await _read(response)
        except TimeoutError:
            return Answer(None, f"no answer within {self._timeout_seconds:g} s (delivery.timeout_seconds)")
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            return Answer(None, f"{type(error).__name__}: {error}"[:_MOST_TEXT_CHARACTERS])


async def _read(response: httpcore.Response) -> Answer:
    read = bytearray()
    async for chunk in response.aiter_stream():
        read += chunk
        if len(read) >= _MOST_READ_BYTES:
            break
    fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    return Answer(
        response.status,
        "" if 200 <= response.status < 300 else f"HTTP {response.status}",
        retry_after(fields.get(b"retry-after")),
        bytes(read).decode(errors="replace")[:_MOST_TEXT_CHARACTERS],
    )
