"""Route of server-sent events, which tell which runs have changed within a second of the commit."""

import time
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from gradwatch_server.api.authorisation import Access, AuthorisedRoute, in_query
from gradwatch_server.api.problem import problems
from gradwatch_server.errors import Refused, RetryAfter
from gradwatch_server.services import Services

router = APIRouter(prefix="/api/v1", route_class=AuthorisedRoute, tags=["stream"])

STREAM_TYPE = "text/event-stream"


_ACCESS = Access("read", in_query)


@router.get(
    "/stream",
    dependencies=[Depends(_ACCESS)],
    response_class=StreamingResponse,
    responses={200: {"content": {STREAM_TYPE: {}}}, **problems(503)},
)
async def stream(request: Request, project: Annotated[str | None, Query(max_length=512)] = None) -> StreamingResponse:
    """Stream ``runs`` events: a list of ``{id, project, last_step, sample_count}`` of runs that have changed.

    A ``beat`` comes first, and whenever nothing has changed for ``seconds``, which it tells: a client that hears
    nothing for longer has lost its connection, even if it was never closed.
    """
    services = Services.of(request)
    most = services.settings.configuration.connections.streams
    if services.change_stream.listeners >= most:
        detail = f"{most} event streams are open, as many as connections.streams allows"
        raise Refused(503, "Too many streams", detail, retry_after=RetryAfter.STREAMS)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(request, project), media_type=STREAM_TYPE, headers=headers)


async def _events(request: Request, project: str | None) -> AsyncIterator[bytes]:
    services = Services.of(request)
    limits = services.settings.configuration.connections
    ends_at = time.monotonic() + limits.stream_seconds
    beat = b"event: beat\ndata: " + msgspec.json.encode({"seconds": limits.stream_beat_seconds}) + b"\n\n"
    greeting = b"retry: 1000\n\n"  # it comes once this stream is counted
    async for changes in services.change_stream.listen(limits.stream_beat_seconds):
        if time.monotonic() > ends_at:
            return
        try:
            await _ACCESS(request)  # a token may expire while its stream is open
        except Refused:
            return
        seen = [change for change in changes if project in (None, change["project"])]
        told = b"event: runs\ndata: " + msgspec.json.encode(seen) + b"\n\n" if seen else beat
        yield greeting + told
        greeting = b""
