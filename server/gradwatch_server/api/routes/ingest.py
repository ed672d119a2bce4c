"""Routes for agents: register a run, store a batch."""

import asyncio
import secrets
from functools import partial
from typing import Annotated, Any, cast

import msgspec
from fastapi import APIRouter, Query, Request, Response

from gradwatch import wire
from gradwatch_server import steady_clock
from gradwatch_server.api import body, documents
from gradwatch_server.api.authorisation import (
    AuthorisedRoute,
    check_named_project,
    in_document,
    of_run,
    requires,
)
from gradwatch_server.api.problem import problems
from gradwatch_server.services import Services

_CLOCK_TOLERANCE_SECONDS = 5.0

router = APIRouter(prefix="/api/v1", route_class=AuthorisedRoute, tags=["ingest"])


def _request_body(document: type) -> dict[str, Any]:
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
        200: {"model": documents.Registered, "description": "The run existed already"},
        **problems(408, 409, 413, 415, 429, 503, 507),
    },
    openapi_extra=_request_body(wire.Registration),
)
async def register_run(
    request: Request,
    after: Annotated[
        int | None,
        Query(ge=0, le=wire.LARGEST_STEP, description="refuse unless this is the run's latest attempt until now"),
    ] = None,
) -> Response:
    """Register a run; with the id of an existing run, start its next attempt or add parameters to it."""
    services = Services.of(request)
    with services.byte_budget.reserve() as reservation:
        registration = await body.read(request, wire.Registration, services.settings.configuration.limits, reservation)
        check_named_project(request, registration.project)
        run_id = secrets.token_hex(8) if registration.id is None else registration.id
        ahead = _ahead_seconds(request)
        work = partial(
            services.ingest.register, run_id=run_id, registration=registration, ahead_seconds=ahead, after=after
        )
        registered = await asyncio.wrap_future(services.writer.submit(work, run_id))
    return _json(registered, 201 if registered.created else 200)


@router.post(
    "/runs/{run_id}/samples",
    dependencies=[requires("ingest", of_run)],
    response_model=documents.Stored,
    responses=problems(404, 408, 413, 415, 429, 503, 507),
    openapi_extra=_request_body(wire.Batch),
)
async def store_batch(request: Request, run_id: str) -> Response:
    """Store a batch. The response is 2xx only once it is committed and synced; sending it again changes nothing."""
    services = Services.of(request)
    with services.byte_budget.reserve() as reservation:
        batch = await body.read(request, wire.Batch, services.settings.configuration.limits, reservation)
        work = partial(services.ingest.begin, run_id=run_id, batch=batch)
        stored = await asyncio.wrap_future(services.writer.submit(work, run_id))
    services.ingest.count(stored, batch)
    services.notifier.wake()
    return _json(stored, 200)


batch_route = cast("AuthorisedRoute", router.routes[-1])
"""The route of batches, which are most of all requests."""


def _ahead_seconds(request: Request) -> float:
    """Return by how many seconds the sender's clock is ahead; 0 if it sent none, or is right within a few seconds."""
    try:
        told = float(request.headers.get(wire.CLOCK_HEADER, "nan"))
    except ValueError:
        return 0.0
    if not 0 <= told <= wire.LARGEST_TIME:
        return 0.0
    ahead = told - steady_clock.now()
    return ahead if abs(ahead) > _CLOCK_TOLERANCE_SECONDS else 0.0


def _json(document: msgspec.Struct, status: int) -> Response:
    return Response(msgspec.json.encode(document), status, media_type=wire.JSON_TYPE)
