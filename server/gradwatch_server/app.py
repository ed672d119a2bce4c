"""The web application: its routes, problem documents, page, and the middleware around them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gradwatch import __version__
from gradwatch_server.api import openapi, problem
from gradwatch_server.api.authorisation import AuthorisedRoute, RequestMiddleware, not_found
from gradwatch_server.api.routes import (
    alerts,
    deliveries,
    health,
    ingest,
    metrics,
    page,
    runs,
    session,
    status,
    stream,
    tile,
)
from gradwatch_server.services import run_services
from gradwatch_server.settings import Settings

ROUTED = (
    ingest,  # routes are tried in this order: what agents send most often comes first
    session,
    runs,
    tile,
    alerts,
    deliveries,
    stream,
    status,
    metrics,
    health,
    page,
    openapi,
)
"""Modules with routes."""


def create_app(settings: Settings, engine: sa.Engine) -> FastAPI:
    """Return the application for a prepared database; the services run as long as its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with run_services(settings, engine) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="gradwatch",
        version=__version__,
        description="Health of gradients in PyTorch training: samples in, series, maps, alerts and metrics out.",
        lifespan=lifespan,
        redirect_slashes=False,  # it would lead to whatever host the request names
        openapi_url=None,  # the module openapi has a route for it
        docs_url=None,
        redoc_url=None,
    )
    problem.install(app)
    for part in ROUTED:
        app.include_router(part.router)
    app.mount("/page", page.PageFiles(), name="page")
    app.router.default = not_found
    app.add_middleware(DirectRoutes, routes=[ingest.batch_route])
    app.add_middleware(RequestMiddleware)
    openapi.install(app)
    return app


class DirectRoutes:
    """Handles requests to routes whose endpoints take the request and what their path names; passes others on.

    FastAPI matches a path in each included router, twice, and resolves dependencies on two stacks of contexts. That
    takes as long as everything else that the event loop does for a small batch. Access, exception handlers and the
    OpenAPI document are those of the routes as FastAPI knows them.
    """

    def __init__(self, app: ASGIApp, routes: list[AuthorisedRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        for route in self._routes if scope["type"] == "http" else ():
            if scope["method"] in (route.methods or ()) and (found := route.path_regex.fullmatch(scope["path"])):
                scope.update(route=route, path_params=found.groupdict())
                response = await _respond(route, Request(scope, receive))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _respond(route: AuthorisedRoute, request: Request) -> Response:
    try:
        await route.access(request)
        return cast("Response", await route.endpoint(request, **request.path_params))
    except Exception as error:  # as FastAPI does: the handler of its kind makes the response
        handle = _handler(request.app, error)
        if handle is None:
            raise
        return await handle(request, error)


def _handler(app: FastAPI, error: Exception) -> Callable[[Request, Exception], Awaitable[Response]] | None:
    """Return the application's handler of an exception, if it has one."""
    kinds = type(error).__mro__
    found = next((app.exception_handlers[kind] for kind in kinds if kind in app.exception_handlers), None)
    return cast("Callable[[Request, Exception], Awaitable[Response]] | None", found)
