"""The application: routes, problem documents, the page, and the parts behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import cast

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradwatch_server.alerting.run_alerts import resolve_deleted
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
from gradwatch_server.store.deletion import delete_some
from gradwatch_server.store.retention import Retention
from gradwatch_server.store.rollups.downsampling import Piece, fade, overdue

PAGE = Path(__file__).parent / "page"
_PRUNE_SECONDS = 3_600
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
        pruning = asyncio.create_task(_prune(services))
        checking_stalls = asyncio.create_task(services.stall_check.run())
        checking_mutes = asyncio.create_task(services.unmute_check.run())
        exporting = None if services.exporter is None else asyncio.create_task(services.exporter.run())
        try:
            yield
        finally:
            pruning.cancel()
            checking_stalls.cancel()
            checking_mutes.cancel()
            services.notifier.stop()
            await notifying
            if exporting is not None:
                exporting.cancel()
                with suppress(asyncio.CancelledError):
                    await exporting
            await asyncio.to_thread(services.writer.close, services.settings.configuration.limits.drain_seconds)
            services.examiner.close()

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


async def _prune(services: Services) -> None:
    """Remove what is over its time, now and once an hour, for as long as the server runs."""
    while True:
        retention = services.settings.configuration.retention
        with suppress(Refused, sa.exc.SQLAlchemyError):  # the queue is full, or the database out of reach: in an hour
            await _delete(services)
            await _fade(services, retention)
        await asyncio.sleep(_PRUNE_SECONDS)


async def _delete(services: Services) -> None:
    """Remove the runs that are over their time, in pieces between which others write."""

    def look() -> Sequence[str]:
        with services.engine.connect() as connection:
            return services.settings.configuration.retention.overdue(connection, time.time())

    for run_id in await asyncio.to_thread(look):
        settings = services.settings
        configuration, public_url = settings.configuration, settings.public_url
        resolve = partial(resolve_deleted, configuration=configuration, public_url=public_url)
        work = partial(delete_some, run_id=run_id, resolve_alerts=resolve, retention=configuration.retention)
        while await asyncio.wrap_future(services.writer.submit(work, run_id)) == "some":
            pass


async def _fade(services: Services, retention: Retention) -> None:
    """Remove the levels that are over their time, in pieces between which others write."""

    def look() -> list[Piece]:
        with services.engine.connect() as connection:
            return overdue(connection, retention, time.time())

    while pieces := await asyncio.to_thread(look):
        for piece in pieces:
            while await asyncio.wrap_future(services.writer.submit(partial(fade, piece=piece), piece.run_id)):
                pass
