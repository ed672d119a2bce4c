"""Server-sent events: which runs have changed, within a second of the commit."""

from collections.abc import AsyncIterator
from typing import cast

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from gradwatch_server.services import Services

router = APIRouter(prefix="/api/v1", tags=["stream"])

STREAM_TYPE = "text/event-stream"


@router.get("/stream", response_class=StreamingResponse, responses={200: {"content": {STREAM_TYPE: {}}}})
async def stream(request: Request) -> StreamingResponse:
    """Stream ``runs`` events: a list of ``{id, last_step, sample_count}`` of runs that have changed."""
    services = cast("Services", request.app.state.services)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(services), media_type=STREAM_TYPE, headers=headers)


async def _events(services: Services) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n"
    async for changes in services.feed.listen():
        yield b"event: runs\ndata: " + msgspec.json.encode(changes) + b"\n\n" if changes else b": still here\n\n"
