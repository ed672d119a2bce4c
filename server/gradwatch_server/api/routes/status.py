"""How the server and its receivers are."""

import time
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gradwatch_server.api.authorisation import AuthorisedRoute, requires
from gradwatch_server.api.dependencies import Engine
from gradwatch_server.notify.receivers import AnyReceiver as Receiver
from gradwatch_server.services import Services
from gradwatch_server.store import schema

router = APIRouter(prefix="/api/v1", route_class=AuthorisedRoute, tags=["health"])

_RECENT_SECONDS = 86_400.0


class ReceiverHealth(BaseModel):
    """A receiver and what became of its deliveries."""

    name: str
    host: str = Field(description="of its address; the rest may hold a secret")
    signed: bool
    configured: bool = Field(description="false: deliveries name it, the configuration no longer does")
    due: int
    delivered: int
    dead: int
    last_delivered_at: float | None
    last_error: str | None = Field(description="of the last failed attempt within a day")
    last_error_at: float | None
    disabled: str | None = Field(description="why nothing is sent there; null: it is in use")


class Overview(BaseModel):
    """The server in numbers."""

    version: str
    ready: bool
    database: str
    runs: int
    parameters: int
    samples: int = Field(description="samples taken in, over all runs")
    stored_batches: int = Field(description="since the server started, as all that follows")
    duplicate_batches: int
    stored_values: int
    queued_batches: int
    queue_capacity: int
    commits: int
    mean_commit_seconds: float | None
    dropped: dict[str, int] = Field(description="what agents had to give up, over all runs")
    receivers: list[ReceiverHealth]


@router.get("/server", dependencies=[requires("read")], response_model=Overview)
def show_server(request: Request, engine: Engine) -> Any:
    """Show how the server and its receivers are."""
    services = Services.of(request)
    runs, writer, ingest = schema.runs, services.writer, services.ingest
    with engine.connect() as connection:
        count, samples, parameters = connection.execute(
            sa.select(sa.func.count(), sa.func.sum(runs.c.sample_count), sa.func.sum(runs.c.parameter_count))
        ).one()
        dropped: dict[str, int] = {}
        for lost in connection.execute(sa.select(runs.c.dropped)).scalars():
            for name, number in lost.items():
                dropped[name] = dropped.get(name, 0) + number
        receivers = _receivers(connection, services.settings.configuration.receivers)
    return {
        "version": metadata.version("gradwatch"),
        "ready": services.ready,
        "database": services.engine.dialect.name,
        "runs": count,
        "parameters": parameters or 0,
        "samples": samples or 0,
        "stored_batches": ingest.batches,
        "duplicate_batches": ingest.duplicates,
        "stored_values": ingest.values,
        "queued_batches": writer.waiting,
        "queue_capacity": services.writer.capacity,
        "commits": writer.commits,
        "mean_commit_seconds": writer.commit_seconds / writer.commits if writer.commits else None,
        "dropped": dropped,
        "receivers": receivers,
    }


def _receivers(connection: sa.Connection, configured: list[Receiver]) -> list[dict[str, Any]]:
    table, attempts = schema.deliveries, schema.attempts
    known = {receiver.name: receiver for receiver in configured}
    health = {name: _unused(name, receiver) for name, receiver in known.items()}
    counted = connection.execute(
        sa.select(table.c.receiver, table.c.state, sa.func.count(), sa.func.max(table.c.delivered_at)).group_by(
            table.c.receiver, table.c.state
        )
    )
    for name, state, number, delivered_at in counted:
        of = health.setdefault(name, _unused(name, None))
        of[state] = number
        of["last_delivered_at"] = delivered_at or of["last_delivered_at"]
    failed = connection.execute(
        sa.select(table.c.receiver, attempts.c.error, attempts.c.at)
        .join(table, table.c.id == attempts.c.delivery)
        .where(attempts.c.error != "", attempts.c.at > time.time() - _RECENT_SECONDS)
        .order_by(attempts.c.at.desc())
        .limit(1_000)
    )
    for name, error, at in failed:
        if health[name]["last_error"] is None:
            health[name] |= {"last_error": error, "last_error_at": at}
    for row in connection.execute(sa.select(schema.disabled_receivers)):
        health.setdefault(row.name, _unused(row.name, known.get(row.name)))["disabled"] = row.reason
    return list(health.values())


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
