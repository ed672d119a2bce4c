"""Authorisation of HTTP requests by token: each route declares the scope and the project that it requires.

A route has one ``Access`` among its dependencies: ``requires("read", of_run)`` or ``OPEN``. ``AuthorisedRoute`` refuses
to make a route without one, checks it before a body is read, and describes it in the OpenAPI document. The origin
of a request does not depend on the route: the middleware checks it before any route is looked for, and gives every
response its security headers.
"""

import asyncio
import base64
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import sqlalchemy as sa
from fastapi import Depends, Request, Response, params
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ConnectionScope

from gradwatch_server.api.body import read_document
from gradwatch_server.api.problem import failure_response, refusal_response
from gradwatch_server.errors import Refused
from gradwatch_server.notify.http_client import is_loopback
from gradwatch_server.services import Services
from gradwatch_server.settings import Settings
from gradwatch_server.store import schema
from gradwatch_server.store.tokens import Grant, Scope

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
SECURITY_SCHEMES = {
    "token": {"type": "http", "scheme": "bearer"},
    "password": {"type": "http", "scheme": "basic", "description": "any user name, the token as the password"},
}
"""Ways to show a token, by their names in the OpenAPI document."""


class ProjectRule(Protocol):
    """Says whether a token that is for one project allows a request."""

    def __call__(self, request: Request, services: Services, project: str, /) -> None:
        """Return if the token allows the request.

        Raises:
            Refused: 403, the request is about another project or about all of them.
        """


def of_every_project(_request: Request, _services: Services, project: str) -> None:
    """Refuse a token for one project: the route is about the server or about every project."""
    detail = f"the token is for project {project!r}, this takes one for every project"
    raise Refused(403, "Every project", detail)


def of_any_project(_request: Request, _services: Services, _project: str) -> None:
    """Accept a token for any one project: the response holds no project's data."""


def in_document(_request: Request, _services: Services, _project: str) -> None:
    """Accept a token for any one project: the route calls ``check_named_project`` once it has read its document."""


def in_query(request: Request, _services: Services, project: str) -> None:
    """Accept a request whose parameter ``project`` is the token's project."""
    if request.query_params.get("project") != project:
        raise Refused(403, "Every project", f"the token is for one project: add project={project}")


class StoredProject:
    """Accepts a request whose path holds the id of something of the token's project.

    What has no project, because its run was deleted, is of no token's project: to these it does not exist.

    Args:
        kind: what the id is of, in words.
        query: selects the project of the entry whose id is bound to ``id``.
    """

    def __init__(self, kind: str, query: sa.Select[Any]) -> None:
        self._kind = kind
        self._query = query

    def __call__(self, request: Request, services: Services, project: str) -> None:
        """Look the project up in the database.

        Raises:
            Refused: 403 for another project, 404 for none.
        """
        (identity,) = request.path_params.values()
        with services.engine.connect() as connection:
            found = connection.execute(self._query, {"id": identity}).scalar()
        if found is None:
            detail = f"{self._kind} {identity!r} is not known here, or not in project {project!r}"
            raise Refused(404, f"Unknown {self._kind}", detail)
        if found != project:
            detail = f"the token is for project {project!r}, this is of another"
            raise Refused(403, "Another project", detail)


_run_project = sa.select(schema.runs.c.project)
_alert_project = _run_project.join(schema.alerts, schema.alerts.c.run == schema.runs.c.id)
_delivery_project = _alert_project.join(schema.deliveries, schema.deliveries.c.alert == schema.alerts.c.id)
of_run = StoredProject("run", _run_project.where(schema.runs.c.id == sa.bindparam("id")))
of_alert = StoredProject("alert", _alert_project.where(schema.alerts.c.id == sa.bindparam("id")))
of_delivery = StoredProject("delivery", _delivery_project.where(schema.deliveries.c.id == sa.bindparam("id")))


class Access:
    """The access that a route requires of its caller; a dependency of that route.

    Args:
        scope: the scope that the token needs; None: the route is open to everybody.
        project_rule: decides which requests a token for one project allows.
    """

    def __init__(self, scope: Scope | None, project_rule: ProjectRule = of_every_project) -> None:
        self.scope = scope
        self._project_rule = project_rule

    @property
    def security(self) -> list[dict[str, list[Scope]]]:
        """The value of ``security`` in OpenAPI; a request without a token is valid as long as none was made."""
        if self.scope is None:
            return []
        return [{name: [self.scope]} for name in SECURITY_SCHEMES] + [{}]

    async def __call__(self, request: Request) -> None:
        """Let a request pass and keep what its token grants in ``request.state.grant``, or refuse it.

        Raises:
            Refused: 401 without a valid token, 403 where it does not allow this, 421 for a host that is not this
                server's while no token is required.
        """
        if self.scope is None:
            return
        services = Services.of(request)
        await refresh_tokens(request)
        if not services.tokens.required:
            _check_host(request, services.settings)
        grant = services.tokens.check(presented_token(request), self.scope, time.time())
        request.state.grant = grant
        if grant.project is not None:
            await asyncio.to_thread(self._project_rule, request, services, grant.project)


def requires(scope: Scope, project_rule: ProjectRule = of_every_project) -> params.Depends:
    """Return the dependency of a route that requires a token of this scope."""
    return cast("params.Depends", Depends(Access(scope, project_rule)))


OPEN: params.Depends = Depends(Access(None))
"""The dependency of a route that everybody may call."""


async def not_found(scope: ConnectionScope, receive: Receive, _send: Send) -> None:
    """Refuse a path that no route has: with 404, but below ``/api/`` only to a caller that may read everything.

    Raises:
        Refused: 401 or 403, as from the routes of the interface.
        HTTPException: 404.
    """
    if scope["path"].startswith("/api/"):
        await Access("read")(Request(scope, receive))
    raise HTTPException(404)


def declared_access(dependencies: Sequence[params.Depends]) -> Access | None:
    """Return the access that a route with these dependencies declares."""
    return next((found for entry in dependencies if isinstance(found := entry.dependency, Access)), None)


class AuthorisedRoute(APIRoute):
    """A route that declares its access, checks it before its body is read, and describes it in OpenAPI."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        access = declared_access(options.get("dependencies") or [])
        if access is None:
            raise TypeError(f"route {path} declares no authorisation: add requires(...) or OPEN to its dependencies")
        self.access = access
        options["openapi_extra"] = {"security": access.security} | (options.get("openapi_extra") or {})
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, which calls dependencies first, but only after it has read a declared body."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def check_access_first(request: Request) -> Response:
            await self.access(request)
            await read_document(request, Services.of(request).settings.configuration.limits)
            return await handle(request)

        return check_access_first


def check_named_project(request: Request, project: str) -> None:
    """Refuse a document that names a project which the token is not for."""
    grant: Grant = request.state.grant
    if grant.project not in (None, project):
        raise Refused(403, "Another project", f"the token is for project {grant.project!r}, not for {project!r}")


async def refresh_tokens(request: Request) -> None:
    """Read the tokens of the database again if they were read too long ago."""
    tokens = Services.of(request).tokens
    if not tokens.fresh:
        await asyncio.to_thread(tokens.refresh)


def presented_token(request: Request) -> str | None:
    """Return the token of a request: of its Authorization header, or else of the page's cookie.

    The header has it as a bearer token, or as the password that `curl -u` and Prometheus send.
    """
    authorization = request.headers.get("authorization")
    if authorization is None:
        return request.cookies.get(cookie_name(request))
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, no ASCII, or no UTF-8
            return ""
    return None


def cookie_name(request: Request) -> str:
    """Return the name of the page's cookie, with the port at which people reach the server.

    A browser keeps one jar for all ports of a host: two servers would log each other out.
    """
    address = Services.of(request).settings.configuration.public_url or f"//{request.headers.get('host', '')}"
    try:
        port = urlsplit(address).port
    except ValueError:
        port = None
    return "gradwatch_token" if port is None else f"gradwatch_token_{port}"


def is_encrypted(request: Request) -> bool:
    """Return whether people reach this server over https."""
    return request.url.scheme == "https" or Services.of(request).settings.public_url.startswith("https:")


class RequestMiddleware:
    """Refuses requests of another site's page, gives every response its headers, and counts it.

    A route takes HEAD as GET: the HTTP server leaves the body out. An error of the application becomes a response here
    and is raised again, for the server to log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: ConnectionScope, receive: Receive, send: Send) -> None:
        """Handle one request; pass on anything that is not HTTP."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        response = _Response(scope["method"], asked, send)
        try:
            await self._application(asked)(asked, receive, response.send)
        except Exception as error:
            if not response.started:
                await failure_response(error)(asked, receive, response.send)
            raise

    def _application(self, scope: ConnectionScope) -> ASGIApp:
        """Return what handles a request: the application, or the refusal of its origin."""
        try:
            _check_origin(Request(scope))
        except Refused as refusal:
            return refusal_response(refusal)
        return self._app


class _Response:
    """The response to one request, whose headers are completed and which is counted as it begins."""

    def __init__(self, method: str, scope: ConnectionScope, send: Send) -> None:
        self.started = False
        self._method = method
        self._scope = scope
        self._send = send
        self._asked_at = time.perf_counter()
        self._complete = False

    async def send(self, message: Message) -> None:
        """Send a part of the response; to HEAD nothing after its headers, so that a stream ends as well."""
        if self._complete:
            return
        if message["type"] == "http.response.start":
            self._begin(message)
        elif self._method == "HEAD":
            message = {"type": "http.response.body"}
            self._complete = True
        await self._send(message)

    def _begin(self, message: Message) -> None:
        self.started = True
        headers = MutableHeaders(scope=message)
        headers.update(_SECURITY_HEADERS)
        headers.setdefault("Cache-Control", "no-store")
        route = getattr(self._scope.get("route"), "path", "other")
        services = Services.of(Request(self._scope))
        services.request_counts.add(self._method, route, message["status"], self._asked_at)


def _check_origin(request: Request) -> None:
    """Refuse a request by which another site's page would change something: a browser names the origin of a page.

    Only a browser that ignores SameSite sends our cookie with a request of another page; a request with the cookie has
    to come from this origin. If no token is required, any site could reach a server on the same machine.

    Raises:
        Refused: 403.
    """
    if request.method in _SAFE_METHODS:
        return
    origin = request.headers.get("origin")
    if origin is None:
        by_cookie = "authorization" not in request.headers and cookie_name(request) in request.cookies
        allowed = not by_cookie or request.headers.get("sec-fetch-site") == "same-origin"
    else:
        here = (request.headers.get("host", ""), urlsplit(Services.of(request).settings.public_url).netloc)
        scheme, _, rest = origin.partition("://")
        allowed = scheme in ("http", "https") and rest in here
    if not allowed:
        detail = f"origin {origin!r} may change nothing here: send the request from this server's page, or without one"
        raise Refused(403, "Another origin", detail)


def _check_host(request: Request, settings: Settings) -> None:
    """Refuse a host name that is not this server's: if no token is required, nothing else keeps other sites' pages out.

    The owner of a site can let its name point to 127.0.0.1 once its page is loaded (DNS rebinding), and a browser takes
    our responses for that site's own. Such a site is never named localhost, nor by an address.
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
