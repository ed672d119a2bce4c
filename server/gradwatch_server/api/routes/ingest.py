"""What agents call: register a run, store a batch."""

import asyncio
import secrets
import time
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from gradwatch import wire
from gradwatch_server.api import body, documents
from gradwatch_server.api.authorisation import AuthorisedRoute, check_named_project, in_document, of_run, requires
from gradwatch_server.api.problem import problems
from gradwatch_server.services import Services

_RIGHT_SECONDS = 5.0

router = APIRouter(prefix="/api/v1", route_class=AuthorisedRoute, tags=["ingest"])


def _takes(document: type) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{document.__name__}"}
    return {
        "requestBody": {"required": True, "content": {wire.JSON_TYPE: {"schema": schema}, wire.MESSAGEPACK_TYPE: {}}}
    }


@router.post(
    "/runs",
    dependencies=[requires("ingest", in_document)],
    status_code=201,
    response_model=documents.Registered,
    responses={
        200: {"model": documents.Registered, "description": "Known already"},
        **problems(408, 409, 413, 415, 429, 503, 507),
    },
    openapi_extra=_takes(wire.Registration),
)
async def register_run(request: Request) -> Response:
    """Make a run known; with the id of a known run, start its next attempt or add parameters to it."""
    services = Services.of(request)
    with services.byte_budget.reserve() as reservation:
        registration = await body.read(request, wire.Registration, services.settings.configuration.limits, reservation)
        check_named_project(request, registration.project)
        run_id = secrets.token_hex(8) if registration.id is None else registration.id
        ahead = _ahead_seconds(request)
        work = partial(services.ingest.register, run_id=run_id, registration=registration, ahead_seconds=ahead)
        registered = await asyncio.wrap_future(services.writer.submit(work, run_id))
    return _json(registered, 201 if registered.created else 200)


@router.post(
    "/runs/{run_id}/samples",
    dependencies=[requires("ingest", of_run)],
    response_model=documents.Stored,
    responses=problems(404, 408, 413, 415, 429, 503, 507),
    openapi_extra=_takes(wire.Batch),
)
async def store_batch(request: Request, run_id: str) -> Response:
    """Store a batch; answers 2xx only when it is committed and synced to disk. Sending it again changes nothing."""
    services = Services.of(request)
    with services.byte_budget.reserve() as reservation:
        batch = await body.read(request, wire.Batch, services.settings.configuration.limits, reservation)
        work = partial(services.ingest.begin, run_id=run_id, batch=batch)
        stored = await asyncio.wrap_future(services.writer.submit(work, run_id))
    services.ingest.count(stored, batch)
    services.notifier.wake()
    return _json(stored, 200)


def _ahead_seconds(request: Request) -> float:
    """Return how far the sender's clock is ahead of this one; 0 where it tells no time, or is right within seconds."""
    try:
        clock = float(request.headers.get(wire.CLOCK_HEADER, "nan"))
    except ValueError:
        return 0.0
    if not 0 <= clock <= wire.LARGEST_TIME:
        return 0.0
    ahead = clock - time.time()
    return ahead if abs(ahead) > _RIGHT_SECONDS else 0.0


def _json(answer: msgspec.Struct, status: int) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type=wire.JSON_TYPE)
