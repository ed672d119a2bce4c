"""The application: routes, problem documents, the page, and the parts behind them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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
from gradwatch_server.services import Services
from gradwatch_server.settings import Settings
from gradwatch_server.store.deletion import delete_expired_runs
from gradwatch_server.store.rollups.downsampling import downsample_expired

PAGE = Path(__file__).parent / "page"
_RETENTION_SECONDS = 3_600
_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(settings: Settings, engine: sa.Engine) -> FastAPI:
    """Return the application over a prepared database; its parts run for as long as its lifespan does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.start(settings, engine)
        app.state.services = services
        notifying = asyncio.create_task(services.notifier.run())
        pruning = asyncio.create_task(_apply_retention(services))
        watching = asyncio.create_task(services.stalls.run())
        telling = asyncio.create_task(services.untold.run())
        exporting = None if services.exporter is None else asyncio.create_task(services.exporter.run())
        try:
            yield
        finally:
            pruning.cancel()
            watching.cancel()
            telling.cancel()
            services.notifier.stop()
            await notifying
            if exporting is not None:
                exporting.cancel()
                with suppress(asyncio.CancelledError):
                    await exporting
            await asyncio.to_thread(services.writer.close, services.settings.configuration.limits.drain_seconds)
            services.diagnosis_pool.close()

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
                headers.update(_SECURITY)
                static = path.startswith("/page/") or authorisation.is_view(scope["method"], path)
                # The page's files are asked for again after an upgrade, what they show is kept nowhere.
                headers.setdefault("Cache-Control", "no-cache" if static else "no-store")
                route = getattr(scope.get("route"), "path", "other")
                services = cast("Services", scope["app"].state.services)
                services.requests.add(scope["method"], route, message["status"], started)
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


async def _apply_retention(services: Services) -> None:
    """Delete expired runs and levels, now and once an hour, for as long as the server runs."""
    while True:
        retention = services.settings.configuration.retention
        with suppress(Refused, sa.exc.SQLAlchemyError):  # the queue is full, or the database out of reach: in an hour
            await delete_expired_runs(services.engine, services.writer, retention, services.alert_resolver())
            await downsample_expired(services.engine, services.writer, retention)
        await asyncio.sleep(_RETENTION_SECONDS)
