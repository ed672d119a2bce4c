"""Access of the routes to the database: reads through the engine, writes in the writer's next transaction."""

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

import sqlalchemy as sa
from fastapi import Depends, Request

from gradwatch_server.services import Services

Result = TypeVar("Result")


async def _engine(request: Request) -> sa.Engine:
    return Services.of(request).engine


Engine = Annotated[sa.Engine, Depends(_engine)]
"""The engine for a route that reads: the route connects on its own thread and only while it reads.

The dependency is async because FastAPI would hand each request to another thread for one that is not.
"""


async def commit(request: Request, work: Callable[[sa.Connection], Result]) -> Result:
    """Run some work in the writer's next transaction; return its result once that is committed and synced."""
    return await asyncio.shield(asyncio.wrap_future(Services.of(request).writer.submit(work)))
