"""Route of the state of the server and of its receivers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from fastapi import APIRouter, Request

from gradwatch import __version__
from gradwatch_server import steady_clock
from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import requires
from gradwatch_server.api.dependencies import Engine
from gradwatch_server.api.read_slots import ReadRoute
from gradwatch_server.notify.receivers import AnyReceiver as Receiver
from gradwatch_server.services import Services
from gradwatch_server.store import schema

router = APIRouter(prefix="/api/v1", route_class=ReadRoute, tags=["health"])

_RECENT_SECONDS = 86_400.0


@router.get("/server", dependencies=[requires("read")], response_model=documents.Overview)
def show_server(request: Request, engine: Engine) -> Any:
    """Show the state of the server and of its receivers."""
    services = Services.of(request)
    with engine.connect() as connection:
        runs = _count_runs(connection)
        receivers = _load_receivers(connection, services.settings.configuration.receivers)
    return (
        runs
        | _count_ingest(services)
        | {
            "version": __version__,
            "ready": services.ready,
            "database": services.engine.dialect.name,
            "receivers": receivers,
        }
    )


def _count_runs(connection: sa.Connection) -> dict[str, Any]:
    """Return the counts of what is stored of all runs, and of what their agents dropped."""
    runs = schema.runs
    count, samples, parameters = connection.execute(
        sa.select(sa.func.count(), sa.func.sum(runs.c.sample_count), sa.func.sum(runs.c.parameter_count))
    ).one()
    dropped = Counter[str]()
    for counts in connection.execute(sa.select(runs.c.dropped)).scalars():
        dropped.update(counts)
    return {"runs": count, "parameters": parameters or 0, "samples": samples or 0, "dropped": dropped}


def _count_ingest(services: Services) -> dict[str, Any]:
    """Return the counts of batches stored since the server started, and of work that waits."""
    writer, ingest = services.writer, services.ingest
    return {
        "stored_batches": ingest.batches,
        "duplicate_batches": ingest.duplicates,
        "stored_values": ingest.values,
        "queued_batches": writer.waiting,
        "queue_capacity": writer.capacity,
        "commits": writer.commits,
        "mean_commit_seconds": writer.commit_seconds / writer.commits if writer.commits else None,
    }


def _load_receivers(connection: sa.Connection, configured: Sequence[Receiver]) -> list[dict[str, Any]]:
    """Return the health of the configured receivers, and of others to which deliveries go."""
    by_name = {receiver.name: receiver for receiver in configured}
    health = {name: _unused(name, receiver) for name, receiver in by_name.items()}
    for name, state, count, delivered_at in connection.execute(_deliveries_by_state):
        entry = health.setdefault(name, _unused(name, None))
        entry[state] = count
        entry["last_delivered_at"] = delivered_at or entry["last_delivered_at"]
    for name, error, at in connection.execute(_recent_errors, {"since": steady_clock.now() - _RECENT_SECONDS}):
        if health[name]["last_error"] is None:  # the newest comes first
            health[name] |= {"last_error": error, "last_error_at": at}
    for row in connection.execute(sa.select(schema.disabled_receivers)):
        health.setdefault(row.name, _unused(row.name, by_name.get(row.name)))["disabled"] = row.reason
    return list(health.values())


_deliveries, _attempts = schema.deliveries, schema.attempts
_deliveries_by_state = sa.select(
    _deliveries.c.receiver, _deliveries.c.state, sa.func.count(), sa.func.max(_deliveries.c.delivered_at)
).group_by(_deliveries.c.receiver, _deliveries.c.state)
_recent_errors = (
    sa.select(_deliveries.c.receiver, _attempts.c.error, _attempts.c.at)
    .join(_deliveries, _deliveries.c.id == _attempts.c.delivery)
    .where(_attempts.c.error != "", _attempts.c.at > sa.bindparam("since"))
    .order_by(_attempts.c.at.desc())
    .limit(1_000)
)


def _unused(name: str, receiver: Receiver | None) -> dict[str, Any]:
    return {
        "name": name,
        "host": urlsplit(getattr(receiver, "url", "")).hostname or "",
        "signed": getattr(receiver, "secret", None) is not None,
        "configured": receiver is not None,
        "due": 0,
        "delivered": 0,
        "dead": 0,
        "last_delivered_at": None,
        "last_error": None,
        "last_error_at": None,
        "disabled": None,
    }
