"""What has changed, told to the pages that watch: one poll of the database for all of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import sqlalchemy as sa

from gradwatch_server.store import schema

_POLL_SECONDS = 0.5
_QUIET_SECONDS = 15.0
"""A listener hears something at least this often, so that both sides notice a dead connection."""
_OVERLAP_SECONDS = 10.0
"""How far back each poll looks: a transaction takes its time before it commits."""

Change = dict[str, Any]


class _Listener:
    """What one listener has not been told yet: of each run the newest, however long it does not read."""

    def __init__(self) -> None:
        self._untold: dict[str, Change] = {}
        self._news = asyncio.Event()

    def tell(self, changes: Iterable[Change]) -> None:
        """Add what has changed."""
        self._untold |= {change["id"]: change for change in changes}
        self._news.set()

    async def next(self) -> list[Change]:
        """Wait for a change, or for a while, and return what has changed since the last call."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_QUIET_SECONDS):
                await self._news.wait()
        self._news.clear()
        untold, self._untold = self._untold, {}
        return list(untold.values())


class Feed:
    """Tells every listener which runs have changed.

    The database is the source, not this process's memory: what another server stored is told as well.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._listeners: set[_Listener] = set()
        self._known: dict[str, tuple[Any, ...]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._closed = False

    async def listen(self) -> AsyncIterator[list[Change]]:
        """Yield the runs that have changed, an empty list where nothing has for a while; ends when the server stops.

        It begins with what changed just before, so that nothing falls between a page's first look and its stream.
        """
        listener = _Listener()
        self._listeners.add(listener)
        if self._poller is None:
            self._known = {}
            self._poller = asyncio.create_task(self._poll())
        elif self._known:
            listener.tell(self._told(row) for row in self._known.values())
        try:
            while not self._closed:
                changes = await listener.next()
                if not self._closed:
                    yield changes
        finally:
            self._listeners.discard(listener)
            await self._rest()

    def close(self) -> None:
        """End every stream: the server stops."""
        self._closed = True
        for listener in self._listeners:
            listener.tell([])

    async def _rest(self) -> None:
        """Poll no more when nobody listens."""
        poller = self._poller
        if self._listeners or poller is None:
            return
        self._poller = None
        poller.cancel()
        with suppress(asyncio.CancelledError):
            await poller

    async def _poll(self) -> None:
        while True:
            with suppress(sa.exc.SQLAlchemyError):  # the database is out of reach: readiness says so, streams wait
                seen = await asyncio.to_thread(self._seen, time.time() - _OVERLAP_SECONDS)
                changes = [self._told(seen[run]) for run in seen if self._known.get(run) != seen[run]]
                self._known = seen
                if changes:
                    for listener in self._listeners:
                        listener.tell(changes)
            await asyncio.sleep(_POLL_SECONDS)

    def _seen(self, since: float) -> dict[str, tuple[Any, ...]]:
        """Return what was new since then of each run: its progress and its alerts, which may change without it."""
        runs, alerts = schema.runs, schema.alerts
        columns = runs.c["id", "project", "last_step", "sample_count", "finished_at", "last_seen_at", "attempt"]
        changed = sa.select(*alerts.c["run", "id", "state", "severity"]).where(
            (alerts.c.fired_at >= since) | (alerts.c.resolved_at >= since)
        )
        with self._engine.connect() as connection:
            told: dict[str, list[tuple[Any, ...]]] = {}
            for row in connection.execute(changed.order_by(alerts.c.id)):
                told.setdefault(row.run, []).append(tuple(row[1:]))
            wanted = (runs.c.last_seen_at >= since) | runs.c.id.in_(list(told))
            rows = connection.execute(sa.select(*columns).where(wanted)).all()
        return {row.id: (*row, told.get(row.id)) for row in rows}

    @staticmethod
    def _told(row: tuple[Any, ...]) -> Change:
        return {"id": row[0], "project": row[1], "last_step": row[2], "sample_count": row[3]}
