"""Who may call what: the token of a request is checked before its body is read."""

import asyncio
import base64
import binascii
import time
from typing import cast

import sqlalchemy as sa
from fastapi import Request

from gradwatch_server import schema
from gradwatch_server.errors import Refused
from gradwatch_server.services import Services
from gradwatch_server.tokens import Grant, Scope

_OPEN = ("/healthz", "/readyz", "/page/")
_INGEST = "/api/v1/runs"


def needed_scope(method: str, path: str) -> Scope:
    """Return the scope that a request takes."""
    if method in ("GET", "HEAD"):
        return "read"
    return "ingest" if method == "POST" and (path == _INGEST or path.endswith("/samples")) else "admin"


def presented(authorization: str | None) -> str | None:
    """Return the token of an Authorization header: a bearer's, or the password that a browser asks for."""
    kind, _, value = (authorization or "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return None


async def check(request: Request) -> None:
    """Let a request pass, or refuse it.

    Raises:
        Refused: 401 without a valid token, 403 where it does not allow this.
    """
    path = request.url.path
    if path.startswith(_OPEN):
        return
    services = cast("Services", request.app.state.services)
    if not services.tokens.fresh:
        await asyncio.to_thread(services.tokens.refresh)
    token = presented(request.headers.get("authorization"))
    grant = services.tokens.check(token, needed_scope(request.method, path), time.time())
    request.state.grant = grant
    if grant.project is not None and path.startswith(("/api/", "/metrics")):
        await asyncio.to_thread(_check_project, services, grant, request)


def _check_project(services: Services, grant: Grant, request: Request) -> None:
    """Refuse what is of another project, or of all of them."""
    parts = request.url.path.split("/")
    if parts[3:4] == ["runs"] and len(parts) > 4:
        with services.engine.connect() as connection:
            found = sa.select(schema.runs.c.project).where(schema.runs.c.id == parts[4])
            project = connection.execute(found).scalar()
        if project not in (None, grant.project):
            raise Refused(403, "Another project", f"the token is for project {grant.project!r}, the run is of another")
    elif request.method != "POST" and request.query_params.get("project") != grant.project:
        raise Refused(403, "Every project", f"the token is for one project: add project={grant.project}")


def check_registration(request: Request, project: str) -> None:
    """Refuse to register a run in a project that the token is not for."""
    grant = cast("Grant", request.state.grant)
    if grant.project not in (None, project):
        raise Refused(403, "Another project", f"the token is for project {grant.project!r}, not for {project!r}")
