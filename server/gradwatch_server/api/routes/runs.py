"""Routes of runs: list, show and delete them; read series, maps and profiles of what was measured."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request, Response
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch_server import steady_clock
from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import in_query, of_run, requires
from gradwatch_server.api.dependencies import Engine
from gradwatch_server.api.number_json import json_response, serialise
from gradwatch_server.api.paging import Before, read_page
from gradwatch_server.api.problem import problems
from gradwatch_server.api.read_slots import ReadRoute
from gradwatch_server.diagnosis.clip_advice import THRESHOLDS, advise, threshold_in_force
from gradwatch_server.errors import Refused
from gradwatch_server.services import Services
from gradwatch_server.store import schema
from gradwatch_server.store.deletion import delete_run
from gradwatch_server.store.parameters import load_depth_order, load_parameters
from gradwatch_server.store.rollups import queries
from gradwatch_server.store.runs import (
    RunState,
    check_run,
    describe_runs,
    load_events,
    load_resumable,
    load_run,
    select_runs,
    unknown_run,
)
from gradwatch_server.store.vectors import padded

ToJson = Callable[[NDArray[np.floating[Any]]], NDArray[np.floating[Any]] | list[Any]]

router = APIRouter(prefix="/api/v1", route_class=ReadRoute, tags=["runs"])

RunId = Annotated[str, Path(alias="id", max_length=64)]
Step = Annotated[int | None, Query(ge=0, le=wire.LARGEST_STEP)]
Text = Annotated[str | None, Query(max_length=wire.MOST_NAME_CHARACTERS)]


@router.get("/runs", dependencies=[requires("read", in_query)], response_model=list[documents.Run])
def list_runs(
    request: Request,
    response: Response,
    engine: Engine,
    project: Text = None,
    state: RunState | None = None,
    limit: Annotated[int, Query(ge=1, le=1_000, description="most runs in one response")] = 1_000,
    before: Before = None,
) -> Any:
    """List runs, the most recently active first; without scalars, if a run has more than 16,384 characters of them."""
    order = (schema.runs.c.last_seen_at, schema.runs.c.id)
    query = select_runs(project, state)
    with engine.connect() as connection:
        rows = read_page(connection, query, order, before, limit, (request, response))
        return describe_runs(connection, rows)


@router.get(
    "/runs/{id}",
    dependencies=[requires("read", of_run)],
    response_model=documents.RunDetail,
    responses=problems(404),
)
def show_run(engine: Engine, run_id: RunId) -> Any:
    """Show one run with its parameters in the order of depth and the last events of its agent."""
    with engine.connect() as connection:
        run = load_run(connection, run_id)
        listed = sorted(load_parameters(connection, run_id), key=lambda parameter: parameter.depth or 0)
        events = load_events(connection, run_id)
    return run | {"parameters": [msgspec.structs.asdict(parameter) for parameter in listed], "events": events}


@router.get(
    "/runs/{id}/series",
    dependencies=[requires("read", of_run)],
    response_class=Response,
    responses={200: {"model": documents.Series}, **problems(404)},
)
def show_series(
    engine: Engine,
    run_id: RunId,
    statistic: Annotated[
        str, Query(max_length=wire.MOST_NAME_CHARACTERS, description="of a parameter, or the name of a scalar")
    ],
    parameter: Text = None,
    from_step: Step = None,
    to_step: Step = None,
    points: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
) -> Response:
    """Show a statistic of one parameter, or a scalar of the run (``loss``), as min, max, mean and last of buckets.

    Without ``parameter``, a name that both a scalar and a statistic have is the scalar's: trainers log ``grad_norm``.
    """
    with engine.connect() as connection:
        if _is_statistic(connection, run_id, statistic, parameter):
            column = [_column(connection, run_id, statistic, parameter)]
            buckets = queries.read_statistic(connection, run_id, statistic, from_step, to_step, column, points)
            to_json: ToJson = serialise
        else:
            buckets = queries.read_scalar(connection, run_id, statistic, from_step, to_step, points)
            to_json = wire.serialise_numbers
    content = {
        "run": run_id,
        "statistic": statistic,
        "parameter": parameter,
        "steps": buckets.first_steps,
        "last_steps": buckets.last_steps,
        **_summary(buckets, (slice(None), 0), to_json),
    }
    return json_response(content)


def _is_statistic(connection: sa.Connection, run_id: str, name: str, parameter: str | None) -> bool:
    """Return whether a name is of a statistic of parameters, rather than of a scalar of the run."""
    if name in queries.STATISTIC_NAMES:
        return parameter is not None or not queries.has_scalar(connection, run_id, name)
    if parameter is not None:
        check_run(connection, run_id)
        known = ", ".join(queries.STATISTIC_NAMES)
        raise Refused(404, "Unknown statistic", f"{name!r} is not a statistic of parameters: {known}")
    return False


def _column(connection: sa.Connection, run_id: str, statistic: str, parameter: str | None) -> int:
    """Return the index of a parameter into the run's vectors."""
    order, names = load_depth_order(connection, run_id)
    if parameter is None:
        raise Refused(404, "Parameter missing", f"statistic {statistic!r} is of a parameter: add parameter=NAME")
    if parameter not in names:
        check_run(connection, run_id)
        raise Refused(404, "Unknown parameter", f"run {run_id!r} has no parameter {parameter!r}")
    return order[names.index(parameter)]


def _summary(
    buckets: queries.Buckets, selected: Any, to_json: ToJson = serialise, *, means: bool = True
) -> dict[str, Any]:
    """Return the planes of some buckets and parameters as JSON carries them.

    Args:
        buckets: their planes have shape (buckets, parameters).
        selected: index into a plane.
        to_json: how a plane of floats becomes JSON.
        means: whether the buckets have means.
    """
    return {
        "min": to_json(buckets.low[selected]),
        "max": to_json(buckets.high[selected]),
        **({"mean": to_json(buckets.mean[selected])} if means else {}),
        "last": to_json(buckets.last[selected]),
        "nonfinite": np.ascontiguousarray(buckets.nonfinite[selected]),
    }


@router.get(
    "/runs/{id}/map",
    dependencies=[requires("read", of_run)],
    response_class=Response,
    responses={200: {"model": documents.Map}, **problems(404)},
)
def show_map(
    engine: Engine,
    run_id: RunId,
    statistic: Annotated[Literal[queries.STATISTIC_NAMES], Query()] = "ratio",  # type: ignore[valid-type]
    from_step: Step = None,
    to_step: Step = None,
    points: Annotated[int, Query(ge=1, le=10_000)] = 500,
) -> Response:
    """Show the layer x step map: one statistic of all parameters over the steps."""
    with engine.connect() as connection:
        order, names = load_depth_order(connection, run_id)
        buckets = queries.read_statistic(connection, run_id, statistic, from_step, to_step, order, points, means=False)
    content: dict[str, Any] = {
        "run": run_id,
        "statistic": statistic,
        "parameters": names,
        "steps": buckets.first_steps,
        "last_steps": buckets.last_steps,
        **_summary(buckets, ..., means=False),
    }
    return json_response(content)


@router.get(
    "/runs/{id}/profile",
    dependencies=[requires("read", of_run)],
    response_class=Response,
    responses={200: {"model": documents.Profile}, **problems(404)},
)
def show_profile(
    engine: Engine,
    run_id: RunId,
    statistic: Annotated[Literal[queries.STATISTIC_NAMES], Query()] = "ratio",  # type: ignore[valid-type]
    from_step: Step = None,
    to_step: Step = None,
) -> Response:
    """Show one statistic of all parameters in the order of depth, over a range of steps or at one step."""
    with engine.connect() as connection:
        order, names = load_depth_order(connection, run_id)
        found = queries.read_statistic(connection, run_id, statistic, from_step, to_step, order, 1)
    if not len(found):
        raise Refused(404, "No samples", f"run {run_id!r} has no sample of {statistic!r} in this range: widen it")
    content = {
        "run": run_id,
        "statistic": statistic,
        "parameters": names,
        "first_step": int(found.first_steps[0]),
        "last_step": int(found.last_steps[0]),
        **_summary(found, 0),
    }
    return json_response(content)


@router.get(
    "/runs/{id}/latest",
    dependencies=[requires("read", of_run)],
    response_class=Response,
    responses={200: {"model": documents.Latest}, **problems(404)},
)
def show_latest(engine: Engine, run_id: RunId) -> Response:
    """Show everything measured at the newest sample, in the order of the run's parameters."""
    with engine.connect() as connection:
        newest = queries.read_latest(connection, run_id)
        if newest is None:
            check_run(connection, run_id)
            raise Refused(404, "No samples", f"run {run_id!r} has no sample yet")
        vectors = {name: getattr(newest, name) for name in wire.STATISTICS}
        positions, names = load_depth_order(connection, run_id)
    width = len(names)
    content = {
        "run": run_id,
        "step": newest.step,
        "at": newest.at,
        "parameters": [name for _, name in sorted(zip(positions, names, strict=True))],
        "statistics": {
            name: serialise(padded(vector, width)) for name, vector in vectors.items() if vector is not None
        },
        "scalars": newest.scalars,
    }
    return json_response(content)


@router.get(
    "/runs/{id}/clip-advice",
    dependencies=[requires("read", of_run)],
    response_model=documents.ClipAdvice,
    responses=problems(404),
)
def show_clip_advice(
    engine: Engine,
    run_id: RunId,
    from_step: Step = None,
    to_step: Step = None,
    points: Annotated[int, Query(ge=1, le=10_000)] = 500,
) -> Any:
    """Show what adaptive clipping would have done at several thresholds, and which one is recommended."""
    with engine.connect() as connection:
        run = load_run(connection, run_id)
        steps, histograms = queries.read_histograms(connection, run_id, from_step, to_step, points)
    found = advise(steps, histograms)
    first, middle, last = found.thirds.tolist()
    return {
        "run": run_id,
        "from_step": steps[0] if steps else None,
        "to_step": steps[-1] if steps else None,
        "samples": len(steps),
        "thresholds": list(THRESHOLDS),
        "shares": found.shares.tolist(),
        "thirds": {"first": first, "middle": middle, "last": last},
        "steps": steps,
        "rates": found.rates.tolist(),
        "clip": threshold_in_force(run["attributes"]),
        "recommended": found.recommended,
        "reason": found.reason,
    }


@router.delete("/runs/{id}", dependencies=[requires("admin", of_run)], status_code=204, responses=problems(404, 503))
async def remove_run(request: Request, run_id: RunId) -> Response:
    """Delete a run and everything stored about it; receivers are notified that its firing alerts are resolved."""
    services = Services.of(request)
    if not await delete_run(services.writer, run_id, services.alert_resolver()):
        raise unknown_run(run_id)
    services.notifier.wake()
    return Response(status_code=204)


@router.get("/resumable", dependencies=[requires("ingest", in_query)], response_model=list[documents.Resumable])
def list_resumable_runs(
    engine: Engine,
    project: Annotated[str, Query(max_length=wire.MOST_NAME_CHARACTERS)],
    job: Annotated[str | None, Query(pattern="^[0-9a-f]{10}$", description="begin of the ids of its runs")] = None,
    run: Annotated[str | None, Query(max_length=64)] = None,
) -> Any:
    """List the runs of a job, or the one named, that did not end by themselves: one of them may be resumed."""
    with engine.connect() as connection:
        return load_resumable(connection, project, job, run, steady_clock.now())
