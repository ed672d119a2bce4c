"""Routes of deliveries and receivers: list them, show what was sent, replay dead letters, enable a receiver."""

from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request, Response

from gradwatch_server import steady_clock
from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import of_delivery, requires
from gradwatch_server.api.dependencies import Engine, commit
from gradwatch_server.api.paging import Before, Limit, read_page
from gradwatch_server.api.problem import problems
from gradwatch_server.api.read_slots import ReadRoute
from gradwatch_server.errors import Refused
from gradwatch_server.notify import outbox
from gradwatch_server.services import Services
from gradwatch_server.store import schema

router = APIRouter(prefix="/api/v1", route_class=ReadRoute, tags=["deliveries"])

Id = Annotated[str, Path(alias="id", max_length=64)]
Name = Annotated[str, Path(max_length=512)]
Text = Annotated[str | None, Query(max_length=512)]
_table = schema.deliveries


@router.get("/deliveries", dependencies=[requires("read")], response_model=list[documents.Delivery])
def list_deliveries(
    request: Request,
    response: Response,
    engine: Engine,
    alert: Text = None,
    receiver: Text = None,
    state: Literal["due", "delivered", "dead"] | None = None,
    limit: Limit = 1_000,
    before: Before = None,
) -> Any:
    """List deliveries, the newest first."""
    query = sa.select(_table)
    for column, wanted in ((_table.c.alert, alert), (_table.c.receiver, receiver), (_table.c.state, state)):
        if wanted is not None:
            query = query.where(column == wanted)
    with engine.connect() as connection:
        return read_page(connection, query, (_table.c.created_at, _table.c.id), before, limit, (request, response))


@router.get(
    "/deliveries/{id}",
    dependencies=[requires("read", of_delivery)],
    response_model=documents.DeliveryDetail,
    responses=problems(404),
)
def show_delivery(engine: Engine, delivery_id: Id) -> Any:
    """Show one delivery with what was sent and every attempt."""
    query = sa.select(_table, schema.transitions.c.payload).join(
        schema.transitions, schema.transitions.c.id == _table.c.transition
    )
    with engine.connect() as connection:
        row = connection.execute(query.where(_table.c.id == delivery_id)).mappings().one_or_none()
        if row is None:
            raise _unknown(delivery_id)
        log = sa.select(schema.attempts).where(schema.attempts.c.delivery == delivery_id).order_by("number")
        attempts = [dict(entry) for entry in connection.execute(log).mappings()]
    return dict(row) | {"payload": msgspec.json.decode(row["payload"]), "log": attempts}


@router.post(
    "/deliveries/{id}/replay",
    dependencies=[requires("admin", of_delivery)],
    response_model=documents.Replayed,
    responses=problems(404, 503),
)
async def replay_delivery(request: Request, delivery_id: Id) -> Any:
    """Send a delivery again under its old id, and then the ones that followed it; deliveries that are due stay so."""

    def work(connection: sa.Connection) -> int:
        if connection.execute(sa.select(_table.c.id).where(_table.c.id == delivery_id)).one_or_none() is None:
            raise _unknown(delivery_id)
        return outbox.replay(connection, _table.c.id == delivery_id, steady_clock.now())

    return await _replayed(request, await commit(request, work))


@router.post(
    "/receivers/{name}/replay",
    dependencies=[requires("admin")],
    response_model=documents.Replayed,
    responses=problems(503),
)
async def replay_dead(request: Request, name: Name) -> Any:
    """Send every dead delivery of a receiver again, each with the ones of the same alert that followed it."""
    chosen = (_table.c.receiver == name) & (_table.c.state == "dead")
    return await _replayed(
        request, await commit(request, lambda connection: outbox.replay(connection, chosen, steady_clock.now()))
    )


@router.get("/receivers", dependencies=[requires("read")], response_model=list[documents.Receiver])
def list_receivers(request: Request, engine: Engine) -> Any:
    """List the configured receivers, without their addresses and secrets."""
    with engine.connect() as connection:
        disabled = {row.name: row.reason for row in connection.execute(sa.select(schema.disabled_receivers))}
        counts = sa.select(_table.c.receiver, _table.c.state, sa.func.count().label("deliveries"))
        grouped = counts.where(_table.c.state != "delivered").group_by(_table.c.receiver, _table.c.state)
        waiting = {(row.receiver, row.state): row.deliveries for row in connection.execute(grouped)}
    return [
        {
            "name": receiver.name,
            "type": receiver.__struct_config__.tag,
            "disabled": disabled.get(receiver.name),
            "due": waiting.get((receiver.name, "due"), 0),
            "dead": waiting.get((receiver.name, "dead"), 0),
        }
        for receiver in Services.of(request).settings.configuration.receivers
    ]


@router.post(
    "/receivers/{name}/enable",
    dependencies=[requires("admin")],
    status_code=204,
    responses=problems(404, 503),
)
async def enable_receiver(request: Request, name: Name) -> None:
    """Enable a receiver that was disabled because it responded 410."""
    if not await commit(request, lambda connection: outbox.enable(connection, name)):
        raise Refused(404, "Not disabled", f"receiver {name!r} is not disabled: GET /api/v1/receivers says which are")


async def _replayed(request: Request, count: int) -> dict[str, int]:
    Services.of(request).notifier.wake()
    return {"deliveries": count}


def _unknown(delivery_id: str) -> Refused:
    detail = f"delivery {delivery_id!r} is not known here: GET /api/v1/deliveries lists them"
    return Refused(404, "Unknown delivery", detail)
