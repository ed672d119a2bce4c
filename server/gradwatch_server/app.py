"""The web application: routes, problem documents, the page and security headers."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

import sqlalchemy as sa
from fastapi import FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradwatch_server.api import openapi, problem
from gradwatch_server.api.authorisation import check_origin
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
from gradwatch_server.errors import Refused
from gradwatch_server.services import Services, run_services
from gradwatch_server.settings import Settings

ROUTED = (
    session,
    ingest,
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
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(settings: Settings, engine: sa.Engine) -> FastAPI:
    """Return the application for a prepared database; the services run as long as its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with run_services(settings, engine) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="gradwatch",
        version=metadata.version("gradwatch"),
        description="Health of gradients in PyTorch training: samples in, series, maps, alerts and metrics out.",
        lifespan=lifespan,
        openapi_url=None,  # the module openapi has a route for it
        docs_url=None,
        redoc_url=None,
    )
    problem.install(app)
    for part in ROUTED:
        app.include_router(part.router)
    app.mount("/page", page.PageFiles(), name="page")
    app.add_middleware(_RequestMiddleware)
    openapi.install(app)
    return app


class _RequestMiddleware:
    """Refuses requests of another site's page, gives every response its headers, and counts it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; pass on anything that is not HTTP."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_SECURITY_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                route = getattr(scope.get("route"), "path", "other")
                services = Services.of(Request(scope))
                services.request_counts.add(scope["method"], route, message["status"], started)
            await send(message)

        application = self._app
        try:
            check_origin(Request(scope))
        except Refused as refusal:
            application = problem.refusal_response(refusal)
        await application(scope, receive, send_with_headers)
