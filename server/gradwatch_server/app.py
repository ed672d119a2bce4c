"""The web application: its routes, problem documents, page, and the middleware around them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.middleware.gzip import GZipMiddleware

from gradwatch import __version__
from gradwatch_server.api import openapi, problem
from gradwatch_server.api.authorisation import RequestMiddleware, not_found
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
    app.mount("/page", GZipMiddleware(page.PageFiles()), name="page")
    app.router.default = not_found
    app.add_middleware(RequestMiddleware)
    openapi.install(app)
    return app
