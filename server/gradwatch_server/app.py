"""The web application: routes, problem documents, the page and security headers."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import cast

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradwatch_server.api import authorisation, openapi, problem
from gradwatch_server.api.routes import (
    alert_deliveries,
    alerts,
    deliveries,
    health,
    ingest,
    metrics,
    runs,
    session,
    status,
    stream,
    tile,
)
from gradwatch_server.errors import Refused
from gradwatch_server.services import Services, run_services
from gradwatch_server.settings import Settings

PAGE = Path(__file__).parent / "page"
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
        docs_url=None,
        redoc_url=None,
    )
    problem.install(app)
    parts = (session, ingest, runs, tile, alerts, alert_deliveries, deliveries, stream, status, metrics, health)
    for part in parts:
        app.include_router(part.router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    for address in authorisation.VIEWS:
        app.add_api_route(address, _page, include_in_schema=False)

    app.add_middleware(_Secured)
    openapi.complete(app)
    return app


class _Secured:
    """Asks who calls before a body is read, gives every answer its headers, and counts it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; what is not HTTP passes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, path = time.perf_counter(), scope["path"]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_SECURITY_HEADERS)
                static = path.startswith("/page/") or authorisation.is_view(scope["method"], path)
                # The page's files are asked for again after an upgrade, what they show is kept nowhere.
                headers.setdefault("Cache-Control", "no-cache" if static else "no-store")
                route = getattr(scope.get("route"), "path", "other")
                services = cast("Services", scope["app"].state.services)
                services.request_counts.add(scope["method"], route, message["status"], started)
            await send(message)

        follow = self._app
        try:
            await authorisation.check(Request(scope))
        except Refused as refusal:
            follow = problem.refuse(refusal)
        except (sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            follow = problem.out_of_reach(error)
        await follow(scope, receive, answer)


def _page(run_id: str = "") -> FileResponse:  # noqa: ARG001  # the page reads its own address
    return FileResponse(PAGE / "index.html")
