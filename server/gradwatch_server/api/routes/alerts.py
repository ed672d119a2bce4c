"""Routes of alerts and silences: list and acknowledge alerts; list, add and end silences."""

import time
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request, Response

from gradwatch_server import steady_clock
from gradwatch_server.alerting import silences
from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import (
    check_named_project,
    in_document,
    in_query,
    of_alert,
    requires,
)
from gradwatch_server.api.dependencies import Engine, commit
from gradwatch_server.api.paging import Before, Limit, read_page
from gradwatch_server.api.problem import problems
from gradwatch_server.api.read_slots import ReadRoute
from gradwatch_server.errors import Refused
from gradwatch_server.store import schema

router = APIRouter(prefix="/api/v1", route_class=ReadRoute, tags=["alerts"])

AlertId = Annotated[str, Path(alias="id", max_length=64)]
Text = Annotated[str | None, Query(max_length=512)]
_has_run = schema.alerts.c.run.is_not(None)
"""The alerts of a deleted run are kept until their last delivery, but not listed."""


@router.get("/alerts", dependencies=[requires("read", in_query)], response_model=list[documents.Alert])
def list_alerts(
    request: Request,
    response: Response,
    engine: Engine,
    run: Text = None,
    project: Text = None,
    rule: Text = None,
    state: Literal["pending", "firing", "resolved"] | None = None,
    limit: Limit = 1_000,
    before: Before = None,
) -> Any:
    """List alerts, the newest first, by the time of the sample at which they began."""
    table = schema.alerts
    query = sa.select(table).where(_has_run)
    for column, wanted in ((table.c.run, run), (table.c.rule, rule), (table.c.state, state)):
        if wanted is not None:
            query = query.where(column == wanted)
    if project is not None:
        query = query.join(schema.runs, schema.runs.c.id == table.c.run).where(schema.runs.c.project == project)
    with engine.connect() as connection:
        return read_page(connection, query, (table.c.first_at, table.c.id), before, limit, (request, response))


@router.get(
    "/alerts/{id}",
    dependencies=[requires("read", of_alert)],
    response_model=documents.Alert,
    responses=problems(404),
)
def show_alert(engine: Engine, alert_id: AlertId) -> Any:
    """Show one alert."""
    with engine.connect() as connection:
        return _load_alert(connection, alert_id)


@router.post(
    "/alerts/{id}/acknowledge",
    dependencies=[requires("admin", of_alert)],
    response_model=documents.Alert,
    responses=problems(404, 409, 503),
)
async def acknowledge_alert(request: Request, alert_id: AlertId, acknowledgement: documents.Acknowledgement) -> Any:
    """Acknowledge a firing alert: receivers are notified when it resolves, but no longer when it becomes worse."""

    def work(connection: sa.Connection) -> Any:
        alert = _load_alert(connection, alert_id)
        if alert["state"] != "firing":
            raise Refused(409, "Alert does not fire", f"alert {alert_id!r} is {alert['state']}, not firing")
        acknowledged = {"acknowledged_at": steady_clock.now(), "acknowledged_by": acknowledgement.author}
        connection.execute(sa.update(schema.alerts).where(schema.alerts.c.id == alert_id).values(acknowledged))
        return alert | acknowledged

    return await commit(request, work)


@router.delete(
    "/alerts/{id}/acknowledge",
    dependencies=[requires("admin", of_alert)],
    response_model=documents.Alert,
    responses=problems(404, 409, 503),
)
async def withdraw_acknowledgement(request: Request, alert_id: AlertId) -> Any:
    """Withdraw an acknowledgement; receivers are notified now of what it held back."""

    def work(connection: sa.Connection) -> Any:
        alert = _load_alert(connection, alert_id)
        if alert["acknowledged_by"] is None:
            raise Refused(409, "Not acknowledged", f"nobody has acknowledged alert {alert_id!r}")
        withdrawn = {"acknowledged_at": None, "acknowledged_by": None}
        connection.execute(sa.update(schema.alerts).where(schema.alerts.c.id == alert_id).values(withdrawn))
        return alert | withdrawn

    return await commit(request, work)


def _load_alert(connection: sa.Connection, alert_id: str) -> dict[str, Any]:
    query = sa.select(schema.alerts).where(schema.alerts.c.id == alert_id, _has_run)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise _unknown(alert_id)
    return dict(row)


def _unknown(alert_id: str) -> Refused:
    return Refused(404, "Unknown alert", f"alert {alert_id!r} is not known here: GET /api/v1/alerts lists them")


@router.get(
    "/alerts/{id}/deliveries",
    dependencies=[requires("read", of_alert)],
    response_model=list[documents.AlertDelivery],
    responses=problems(404),
)
def list_alert_deliveries(engine: Engine, alert_id: AlertId) -> Any:
    """List an alert's deliveries in the order of its transitions, with their attempts."""
    attempts = schema.attempts
    with engine.connect() as connection:
        if connection.execute(sa.select(schema.alerts.c.id).where(schema.alerts.c.id == alert_id)).first() is None:
            raise _unknown(alert_id)
        listed = _load_deliveries(connection, alert_id)
        of_these = sa.select(attempts).where(attempts.c.delivery.in_(list(listed)))
        for attempt in connection.execute(of_these.order_by(attempts.c.delivery, attempts.c.number)).mappings():
            listed[attempt["delivery"]]["attempts"].append(dict(attempt))
    return list(listed.values())


def _load_deliveries(connection: sa.Connection, alert_id: str) -> dict[str, dict[str, Any]]:
    """Return the deliveries of an alert by their ids, without attempts, in the order of its transitions."""
    deliveries, transitions = schema.deliveries, schema.transitions
    rows = connection.execute(
        sa.select(deliveries, transitions.c.state.label("transition_state"), transitions.c.step)
        .join(transitions, transitions.c.id == deliveries.c.transition)
        .where(deliveries.c.alert == alert_id)
        .order_by(deliveries.c.number, deliveries.c.receiver)
    ).mappings()
    return {row["id"]: dict(row) | {"transition": row["transition_state"], "attempts": []} for row in rows}


@router.get("/silences", dependencies=[requires("read")], response_model=list[documents.Silence])
def list_silences(engine: Engine) -> Any:
    """List the silences in force, in the order in which they end."""
    with engine.connect() as connection:
        return [msgspec.structs.asdict(silence) for silence in silences.load(connection, time.time())]


@router.post(
    "/silences",
    dependencies=[requires("admin", in_document)],
    response_model=documents.Silence,
    status_code=201,
    responses=problems(409, 503),
)
async def add_silence(request: Request, silence: documents.NewSilence) -> Any:
    """Mute alerts for a while; they are still stored and shown."""
    check_named_project(request, silence.project)
    added = await commit(request, lambda connection: silences.add(connection, time.time(), **silence.model_dump()))
    return msgspec.structs.asdict(added)


@router.delete("/silences/{id}", dependencies=[requires("admin")], status_code=204, responses=problems(404, 503))
async def end_silence(request: Request, silence_id: Annotated[str, Path(alias="id", max_length=64)]) -> None:
    """End a silence now; receivers are notified within about a second of the alerts that still fire."""
    await commit(request, lambda connection: silences.end(connection, silence_id, time.time()))
