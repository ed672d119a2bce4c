"""Routes for probes: whether the process lives, and whether the server is ready for requests."""

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request

from gradwatch import __version__
from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import OPEN, AuthorisedRoute
from gradwatch_server.api.problem import DATABASE_SILENT, problems
from gradwatch_server.errors import Refused, RetryAfter, stopping
from gradwatch_server.services import Services

_STANDSTILL_SECONDS = 60.0
"""Longest time for which a part may make no progress: longer than any statement or attempt takes."""

router = APIRouter(route_class=AuthorisedRoute, tags=["health"])


@router.get("/healthz", dependencies=[OPEN], response_model=documents.Health)
async def healthz() -> Any:  # async: all threads may be waiting for the database
    """Respond 200 while the process lives."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz", dependencies=[OPEN], response_model=documents.Health, responses=problems(503))
def readyz(request: Request) -> Any:
    """Respond 200 while the server works: it is not stopping, its database responds, and no part stands still."""
    services = Services.of(request)
    if not services.ready:
        raise stopping()
    try:
        with services.engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
    except sa.exc.SQLAlchemyError:
        raise Refused(503, "Database out of reach", DATABASE_SILENT, retry_after=RetryAfter.DATABASE) from None
    _check_parts(services)
    return {"status": "ready", "version": __version__}


def _check_parts(services: Services) -> None:
    """Refuse if a part has made no progress for long."""
    for part, seconds in (
        ("the writer", services.writer.busy_seconds()),
        ("the notifier", services.notifier.idle_seconds()),
    ):
        if seconds > _STANDSTILL_SECONDS:
            detail = f"{part} has made no progress for {seconds:.0f} s"
            raise Refused(503, "Standstill", detail, retry_after=RetryAfter.DATABASE)
