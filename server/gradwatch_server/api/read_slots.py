"""Read slots: how many reads of the database run at once, so that those who store, and probes, are never behind them.

Reads take threads, connections and, above all, the processor: Python runs one thread at a time. So only a few run at
once and the others wait in turn. Writes and probes never take a slot.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request, Response

from gradwatch_server.api.authorisation import AuthorisedRoute
from gradwatch_server.api.problem import problems
from gradwatch_server.errors import Refused, RetryAfter
from gradwatch_server.services import Services


class ReadRoute(AuthorisedRoute):
    """A route whose GET takes a read slot, after it has been authorised and until its answer has been made."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if options.get("methods") == ["GET"]:
            options["responses"] = problems(429) | (options.get("responses") or {})
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler that waits for a slot."""
        handle = super().get_route_handler()
        if self.methods != {"GET"}:
            return handle

        async def read(request: Request) -> Response:
            await self.access(request)
            async with _slot(Services.of(request)):
                return await handle(request)

        return read


@asynccontextmanager
async def _slot(services: Services) -> AsyncIterator[None]:
    """Hold a read slot.

    Raises:
        Refused: 429 if none became free within ``limits.read_wait_seconds``. Whoever is refused has waited for so long:
            clients that ask again at once do not keep the server busy with refusals.
    """
    limits, slots = services.settings.configuration.limits, services.read_slots  # a reload puts others in their place
    try:
        async with asyncio.timeout(limits.read_wait_seconds):
            await slots.acquire()
    except TimeoutError:
        detail = f"{limits.reads_at_once} reads run already (limits.reads_at_once): ask again later"
        raise Refused(429, "Too many reads", detail, retry_after=RetryAfter.SOON) from None
    try:
        yield
    finally:
        slots.release()
