"""How routes reach the database: reads through the engine, writes in the writer's next transaction."""

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar, cast

import sqlalchemy as sa
from fastapi import Depends, Request

from gradwatch_server.services import Services

Result = TypeVar("Result")


async def _engine(request: Request) -> sa.Engine:
    return cast("Services", request.app.state.services).engine


Reads = Annotated[sa.Engine, Depends(_engine)]
"""The engine for a route that reads, which connects on its own thread and only while it reads.

The dependency is async because FastAPI would hand each request to another thread for one that is not.
"""


async def written(request: Request, work: Callable[[sa.Connection], Result]) -> Result:
    """Return what the work returns, once it is committed and synced."""
    services = cast("Services", request.app.state.services)
    return await asyncio.shield(asyncio.wrap_future(services.writer.submit(work)))
