"""Routes for probes: whether the process lives, and whether the server is ready for requests."""

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request

from gradwatch import __version__
from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import OPEN, AuthorisedRoute
from gradwatch_server.api.problem import problems
from gradwatch_server.errors import Refused, RetryAfter, stopping
from gradwatch_server.services import Services

router = APIRouter(route_class=AuthorisedRoute, tags=["health"])


@router.get("/healthz", dependencies=[OPEN], response_model=documents.Health)
async def healthz() -> Any:  # async: all threads may be waiting for the database
    """Respond 200 while the process lives."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz", dependencies=[OPEN], response_model=documents.Health, responses=problems(503))
def readyz(request: Request) -> Any:
    """Respond 200 while the server accepts requests: it is not stopping, and its database responds."""
    services = Services.of(request)
    if not services.ready:
        raise stopping()
    try:
        with services.engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
    except sa.exc.SQLAlchemyError as error:
        reason = error.orig if isinstance(error, sa.exc.OperationalError) else type(error).__name__
        raise Refused(503, "Database out of reach", str(reason).strip(), retry_after=RetryAfter.DATABASE) from None
    return {"status": "ready", "version": __version__}
