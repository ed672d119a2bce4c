"""A piece of work in the writer's next transaction, for the length of one request."""

import asyncio
from collections.abc import Callable
from typing import TypeVar, cast

import sqlalchemy as sa
from fastapi import Request

from gradwatch_server.services import Services

Result = TypeVar("Result")


async def written(request: Request, work: Callable[[sa.Connection], Result]) -> Result:
    """Return what the work returns, once it is committed and synced."""
    services = cast("Services", request.app.state.services)
    return await asyncio.shield(asyncio.wrap_future(services.writer.submit(work)))
