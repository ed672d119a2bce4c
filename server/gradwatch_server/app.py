"""The application: routes, problem documents, the page, and the parts behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from gradwatch import wire
from gradwatch_server.api import (
    access,
    alert_deliveries,
    alerts,
    deliveries,
    health,
    ingest,
    metrics,
    overview,
    problem,
    runs,
    stream,
    tile,
)
from gradwatch_server.errors import Refused
from gradwatch_server.retention import delete_overdue
from gradwatch_server.services import Services
from gradwatch_server.settings import Settings

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
            await asyncio.to_thread(services.writer.close)

    app = FastAPI(
        title="gradwatch",
        version=metadata.version("gradwatch"),
        description="Health of gradients in PyTorch training: samples in, series, maps, alerts and metrics out.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    problem.install(app)
    for part in (ingest, runs, tile, alerts, alert_deliveries, deliveries, stream, overview, metrics, health):
        app.include_router(part.router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.get("/", include_in_schema=False)
    @app.get("/runs/{run_id}", include_in_schema=False)
    @app.get("/alerts", include_in_schema=False)
    @app.get("/server", include_in_schema=False)
    def page(run_id: str = "") -> FileResponse:  # noqa: ARG001  # the page reads its own address
        return FileResponse(PAGE / "index.html")

    @app.middleware("http")
    async def secure(request: Request, follow: Callable[[Request], Any]) -> Response:
        started = time.perf_counter()
        try:
            await access.check(request)
            response: Response = await follow(request)
        except Refused as refusal:
            response = problem.refuse(refusal)
        response.headers.update(_SECURITY)
        route = getattr(request.scope.get("route"), "path", "other")
        request.app.state.services.requests.add(request.method, route, response.status_code, started)
        return response

    _describe_documents(app)
    return app


async def _prune(services: Services) -> None:
    """Remove the runs whose time is over, now and once an hour, for as long as the server runs."""
    while True:
        retention = services.settings.configuration.retention
        with suppress(Refused, sa.exc.SQLAlchemyError):  # the queue is full, or the database out of reach: in an hour
            work = partial(delete_overdue, retention=retention)
            await asyncio.wrap_future(services.writer.submit(work))
        await asyncio.sleep(_PRUNE_SECONDS)


def _describe_documents(app: FastAPI) -> None:
    """Add the wire format's documents to the OpenAPI description."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = made()
            _, components = msgspec.json.schema_components(
                [wire.Registration, wire.Batch], schema_hook=_vector_schema, ref_template="#/components/schemas/{name}"
            )
            described["components"]["schemas"] = components | described["components"]["schemas"]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _vector_schema(_kind: type) -> dict[str, Any]:
    element = {"anyOf": [{"type": "number"}, {"type": "null"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
    return {"type": "array", "items": element, "description": "one value for each parameter; null: missing"}
