"""Who may call what: the origin and the token of a request are checked before its body is read."""

import asyncio
import base64
import binascii
import time
from typing import cast
from urllib.parse import urlsplit

import sqlalchemy as sa
from fastapi import Request

from gradwatch_server.errors import Refused
from gradwatch_server.notify.address_guard import is_loopback
from gradwatch_server.services import Services
from gradwatch_server.settings import Settings
from gradwatch_server.store import schema
from gradwatch_server.store.tokens import Grant, Scope

VIEWS = ("/", "/runs/{run_id}", "/alerts", "/server")
"""Addresses of the page. It holds no data: what it shows, it asks the API for, with the token of its login."""

_OPEN = ("/healthz", "/readyz", "/page/", "/api/v1/session")
_INGEST = "/api/v1/runs"
_SAFE = ("GET", "HEAD", "OPTIONS")


def needed_scope(method: str, path: str) -> Scope:
    """Return the scope that a request takes."""
    if method in ("GET", "HEAD"):
        return "read"
    return "ingest" if method == "POST" and (path == _INGEST or path.endswith("/samples")) else "admin"


def shown(request: Request) -> str | None:
    """Return the token of a request: of its Authorization header, or else of the page's cookie."""
    authorization = request.headers.get("authorization")
    return request.cookies.get(cookie(request)) if authorization is None else _presented(authorization)


def cookie(request: Request) -> str:
    """Return the name of the page's cookie, with the port at which people reach the server.

    A browser keeps one jar for all ports of a host: two servers would log each other out.
    """
    services = cast("Services", request.app.state.services)
    address = services.settings.configuration.public_url or f"//{request.headers.get('host', '')}"
    try:
        port = urlsplit(address).port
    except ValueError:
        port = None
    return "gradwatch_token" if port is None else f"gradwatch_token_{port}"


def _presented(authorization: str) -> str | None:
    """Return the token of an Authorization header: a bearer's, or a password as `curl -u` and Prometheus send it."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return None


def encrypted(request: Request) -> bool:
    """Return whether people reach this server over https."""
    services = cast("Services", request.app.state.services)
    return request.url.scheme == "https" or services.settings.public_url.startswith("https:")


async def refresh(request: Request) -> None:
    """Have the tokens of the database at hand."""
    tokens = cast("Services", request.app.state.services).tokens
    if not tokens.fresh:
        await asyncio.to_thread(tokens.refresh)


async def check(request: Request) -> None:
    """Let a request pass, or refuse it.

    Raises:
        Refused: 401 without a valid token, 403 where it does not allow this or another site's page asks for it, 421
            for a host that is not this server's while no token is asked for.
    """
    path: str = request.scope["path"]  # the Host header moves request.url.path in older versions of Starlette
    _check_origin(request)
    if path.startswith(_OPEN) or is_view(request.method, path):
        return
    await refresh(request)
    services = cast("Services", request.app.state.services)
    if not services.tokens.required:
        _check_host(request, services.settings)
    grant = services.tokens.check(shown(request), needed_scope(request.method, path), time.time())
    request.state.grant = grant
    if grant.project is not None and path.startswith(("/api/", "/metrics")):
        await asyncio.to_thread(_check_project, services, grant, request)


def is_view(method: str, path: str) -> bool:
    """Return whether a request asks for a view of the page."""
    if method not in ("GET", "HEAD"):
        return False
    return path in VIEWS or (path.startswith("/runs/") and path.count("/") == 2)


def _check_origin(request: Request) -> None:
    """Refuse to change anything for another site's page: a browser tells where the page that asks comes from.

    A cookie goes with a request that the page of this server did not make only where a browser ignores SameSite; such
    a request has to name its origin. Where no token is asked for, any site could reach a server on the same machine.
    """
    if request.method in _SAFE:
        return
    origin = request.headers.get("origin")
    if origin is None:
        by_cookie = "authorization" not in request.headers and cookie(request) in request.cookies
        allowed = not by_cookie or request.headers.get("sec-fetch-site") == "same-origin"
    else:
        services = cast("Services", request.app.state.services)
        here = (request.headers.get("host", ""), urlsplit(services.settings.public_url).netloc)
        scheme, _, rest = origin.partition("://")
        allowed = scheme in ("http", "https") and rest in here
    if not allowed:
        detail = f"origin {origin!r} may change nothing here: send the request from this server's page, or without one"
        raise Refused(403, "Another origin", detail)


def _check_host(request: Request, settings: Settings) -> None:
    """Refuse a host that is not this server's: where no token is asked for, nothing else keeps a site's page out.

    Its owner has the name lead to 127.0.0.1 once the page is loaded (DNS rebinding): a browser takes the server's
    answers for that site's own. No such site is named localhost, or by an address.
    """
    given = request.headers.get("host", "")
    host, ours = _hostname(f"//{given}"), (_hostname(settings.address), _hostname(settings.public_url))
    if host is not None and (host in ours or is_loopback(host)):
        return
    detail = f"host {given!r:.200} is not known here, and no token is asked for: set public_url to the address at which"
    raise Refused(421, "Another host", f"{detail} this server is reached, or make a token (gradwatch token create)")


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # a bracket that is not closed
        return None


def _check_project(services: Services, grant: Grant, request: Request) -> None:
    """Refuse what is of another project, or of all of them."""
    path, here = request.scope["path"].strip("/").split("/")[2:], request.query_params.get("project")
    match path:
        case ["runs" | "silences"] if request.method == "POST":
            return  # the document names the project: its route calls check_named_project
        case ["runs" | "alerts" | "stream"]:
            if here == grant.project:
                return
            raise Refused(403, "Every project", f"the token is for one project: add project={grant.project}")
        case ["runs" | "alerts" | "deliveries" as kind, identity, *_]:
            with services.engine.connect() as connection:
                project = connection.execute(_projects[kind], {"id": identity}).scalar()
            if project in (None, grant.project):
                return
            raise Refused(403, "Another project", f"the token is for project {grant.project!r}, this is of another")
        case _:
            raise Refused(
                403, "Every project", f"the token is for project {grant.project!r}, this takes one for every project"
            )


def check_named_project(request: Request, project: str) -> None:
    """Refuse a document that names a project which the token is not for."""
    grant = cast("Grant", request.state.grant)
    if grant.project not in (None, project):
        raise Refused(403, "Another project", f"the token is for project {grant.project!r}, not for {project!r}")


_run_project = sa.select(schema.runs.c.project)
_alert_project = _run_project.join(schema.alerts, schema.alerts.c.run == schema.runs.c.id)
_projects = {
    "runs": _run_project.where(schema.runs.c.id == sa.bindparam("id")),
    "alerts": _alert_project.where(schema.alerts.c.id == sa.bindparam("id")),
    "deliveries": _alert_project.join(schema.deliveries, schema.deliveries.c.alert == schema.alerts.c.id).where(
        schema.deliveries.c.id == sa.bindparam("id")
    ),
}
