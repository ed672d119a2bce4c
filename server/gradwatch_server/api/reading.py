"""Where the routes of reads find the database: they connect on their own thread, and only while they read."""

from typing import Annotated, cast

import sqlalchemy as sa
from fastapi import Depends, Request

from gradwatch_server.services import Services


async def _engine(request: Request) -> sa.Engine:
    return cast("Services", request.app.state.services).engine


Reads = Annotated[sa.Engine, Depends(_engine)]
"""An async dependency: FastAPI hands a request to another thread for each part of one that is not."""
