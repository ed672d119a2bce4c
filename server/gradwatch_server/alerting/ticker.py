"""What goes by the server's clock: runs that have fallen silent and silences that end send no sample."""

import asyncio
import time
from abc import ABC, abstractmethod
from contextlib import suppress

import sqlalchemy as sa

from gradwatch_server.errors import Refused
from gradwatch_server.settings import Configuration
from gradwatch_server.store.group_commit import Writer

_LOOK_SECONDS = 1.0


class Clock(ABC):
    """Looks once a second, and has the writer do what is due."""

    def __init__(self, engine: sa.Engine, writer: Writer, configuration: Configuration, public_url: str) -> None:
        self._engine = engine
        self._writer = writer
        self._configuration = configuration
        self._public_url = public_url

    def configure(self, configuration: Configuration, public_url: str) -> None:
        """Use these thresholds, receivers, routes and links from the next look on."""
        self._configuration = configuration
        self._public_url = public_url

    async def run(self) -> None:
        """Look for as long as the server runs."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            with suppress(Refused, sa.exc.SQLAlchemyError):  # the queue is full, or the database out of reach
                await self.look(time.time())

    @abstractmethod
    async def look(self, now: float) -> None:
        """Do what is due at ``now``, Unix seconds."""
