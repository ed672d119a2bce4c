"""Change stream: tells the pages that watch which runs have changed, by one poll of the database for all of them."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import sqlalchemy as sa

from gradwatch_server import steady_clock
from gradwatch_server.store import schema

_POLL_SECONDS = 0.5
_OVERLAP_SECONDS = 10.0
"""How far back each poll looks: a transaction takes its time before it commits."""

Change = dict[str, Any]


class _Listener:
    """The changes that one listener has not read yet: the newest of each run, however slowly it reads."""

    def __init__(self) -> None:
        self._unread: dict[str, Change] = {}
        self._arrived = asyncio.Event()

    def notify(self, changes: Iterable[Change]) -> None:
        """Add changes."""
        self._unread |= {change["id"]: change for change in changes}
        self._arrived.set()

    async def next(self, beat_seconds: float) -> list[Change]:
        """Wait for a change, at most for so long; return the changes since the last call."""
        with suppress(TimeoutError):
            async with asyncio.timeout(beat_seconds):
                await self._arrived.wait()
        self._arrived.clear()
        unread, self._unread = self._unread, {}
        return list(unread.values())


class ChangeStream:
    """Notifies every listener of the runs that have changed.

    It reads the database and not this process's memory, so it includes what another server has stored.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._listeners: set[_Listener] = set()
        self._known: dict[str, tuple[Any, ...]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def listeners(self) -> int:
        """Return how many listen."""
        return len(self._listeners)

    async def listen(self, beat_seconds: float) -> AsyncIterator[list[Change]]:
        """Yield the runs that have changed, or an empty list if none has for ``beat_seconds``; ends with the server.

        An empty list comes first, as soon as it listens; then what changed just before, so that nothing falls between a
        page's first request and its stream.
        """
        listener = _Listener()
        self._listeners.add(listener)
        if self._poller is None:
            self._known = {}
            self._poller = asyncio.create_task(self._poll())
        elif self._known:
            listener.notify(_change(row) for row in self._known.values())
        try:
            yield []
            while not self._closed:
                changes = await listener.next(beat_seconds)
                if not self._closed:
                    yield changes
        finally:
            self._listeners.discard(listener)
            await self._stop_polling_if_unused()

    def close(self) -> None:
        """End every stream: the server stops."""
        self._closed = True
        for listener in self._listeners:
            listener.notify([])

    async def _stop_polling_if_unused(self) -> None:
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
                recent = await asyncio.to_thread(self._load_recent, steady_clock.now() - _OVERLAP_SECONDS)
                changes = [_change(recent[run]) for run in recent if self._known.get(run) != recent[run]]
                self._known = recent
                if changes:
                    for listener in self._listeners:
                        listener.notify(changes)
            await asyncio.sleep(_POLL_SECONDS)

    def _load_recent(self, since: float) -> dict[str, tuple[Any, ...]]:
        """Return run -> its progress and alerts, of the runs that reported or whose alerts changed since a time."""
        runs, alerts = schema.runs, schema.alerts
        columns = runs.c["id", "project", "last_step", "sample_count", "finished_at", "last_seen_at", "attempt"]
        changed = sa.select(*alerts.c["run", "id", "state", "severity"]).where(
            (alerts.c.fired_at >= since) | (alerts.c.resolved_at >= since)
        )
        with self._engine.connect() as connection:
            alerts_of: dict[str, list[tuple[Any, ...]]] = {}
            for row in connection.execute(changed.order_by(alerts.c.id)):
                alerts_of.setdefault(row.run, []).append(tuple(row[1:]))
            wanted = (runs.c.last_seen_at >= since) | runs.c.id.in_(list(alerts_of))
            rows = connection.execute(sa.select(*columns).where(wanted)).all()
        return {row.id: (*row, alerts_of.get(row.id)) for row in rows}


def _change(row: tuple[Any, ...]) -> Change:
    return {"id": row[0], "project": row[1], "last_step": row[2], "sample_count": row[3]}
