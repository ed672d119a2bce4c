"""Group commit: what arrives within a few milliseconds shares a transaction and its sync to disk.

SQLite has one writer. PostgreSQL has two: while one waits for the database, the other works.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import sqlalchemy as sa

from gradwatch_server.errors import Refused, stopping
from gradwatch_server.store.database import writing

Result = TypeVar("Result")
Work = Callable[[sa.Connection], Any]

_MOST_IN_ONE_COMMIT = 64
_COMMIT_SECONDS = 0.04
"""Work that one commit gathers, about: the first of it is not answered before the last is done."""
_POSTGRESQL_WRITERS = 2


class Deferred(NamedTuple, Generic[Result]):
    """What a piece of work returns that waits for something outside: the next one begins before it is finished."""

    finish: Callable[[], Result]


class _Piece(NamedTuple):
    run_id: str
    """Servers that share a PostgreSQL lock runs in this order: none waits for another in a circle."""
    work: Work
    future: Future[Any]


class Writer:
    """Runs pieces of work in one transaction a group, and answers each only after the commit is on disk.

    A piece that raises changes nothing and does not touch its neighbours. Pieces of one run are done one after the
    other, in the order in which they came; of others, one may begin while the one before it waits for something.
    """

    def __init__(self, engine: sa.Engine, capacity: int, capacity_per_run: int) -> None:
        self._engine = engine
        self.most = capacity
        self._most_of_run = capacity_per_run
        self._of_run: Counter[str] = Counter()
        self.waiting = 0
        """Pieces that have been taken in and are not done: they wait, or a writer is at them."""
        self._counting = threading.Lock()
        self._closed = False
        self.commits = 0
        self.commit_seconds = 0.0
        self.refused = 0
        count = _POSTGRESQL_WRITERS if engine.dialect.name == "postgresql" else 1
        self._queues: list[queue.SimpleQueue[_Piece | None]] = [queue.SimpleQueue() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._loop, args=(waiting,), name="gradwatch-writer", daemon=True)
            for waiting in self._queues
        ]
        for thread in self._threads:
            thread.start()

    def configure(self, capacity: int, capacity_per_run: int) -> None:
        """Let so many pieces be under way from now on."""
        with self._counting:
            self.most, self._most_of_run = capacity, capacity_per_run

    def submit(self, work: Callable[[sa.Connection], Result | Deferred[Result]], run_id: str = "") -> Future[Result]:
        """Queue a piece of work on a run; the future holds its result once it is on disk.

        Args:
            work: may raise `Refused` only before it has written anything; any other exception undoes what it did.
            run_id: the run that it is about; empty: none.

        Raises:
            Refused: too many pieces of this run are under way, the queue is full, or the server is stopping.
        """
        future: Future[Result] = Future()
        with self._counting:
            if self._closed:
                raise stopping()
            if run_id and self._of_run[run_id] >= self._most_of_run:
                self.refused += 1
                detail = f"{self._most_of_run} batches of run {run_id!r} wait already (limits.queued_batches_per_run)"
                raise Refused(429, "Too many batches", f"{detail}: wait for their answers", retry_after_seconds=1)
            if self.waiting >= self.most:
                self.refused += 1
                detail = f"{self.most} batches wait already (limits.queued_batches): send it again later"
                raise Refused(503, "Queue full", detail, retry_after_seconds=1)
            self._queues[hash(run_id) % len(self._queues)].put(_Piece(run_id, work, future))
            self._of_run[run_id] += 1
            self.waiting += 1
        return future

    def close(self, timeout_seconds: float) -> None:
        """Finish what waits, then stop; what a stuck database keeps from being done in time is not answered."""
        end = time.monotonic() + timeout_seconds
        with self._counting:
            self._closed = True
            for waiting in self._queues:
                waiting.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _loop(self, waiting: queue.SimpleQueue[_Piece | None]) -> None:
        usual_seconds = 0.0
        while (first := waiting.get()) is not None:
            group, last = [first], False
            most = min(_MOST_IN_ONE_COMMIT, max(1, int(_COMMIT_SECONDS / max(usual_seconds, 1e-6))))
            while len(group) < most and not last:
                try:
                    following = waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    last = True
                else:
                    group.append(following)
            usual_seconds = 0.8 * usual_seconds + 0.2 * self._commit(group) / len(group)
            if last:
                return

    def _commit(self, group: list[_Piece]) -> float:
        """Do and answer a group; return how long the work took, without the sync that ended it."""
        started, worked, failed = time.perf_counter(), 0.0, False
        wanted = [piece for piece in group if piece.future.set_running_or_notify_cancel()]
        ordered = sorted(wanted, key=lambda piece: piece.run_id)
        try:
            try:
                settled, worked = self._done(ordered, _together)
            except _Failed:
                settled, worked = self._done(ordered, _apart)
        except BaseException as error:  # whoever waits for the answer gets the reason
            reason, failed = error, True
            settled = [partial(piece.future.set_exception, reason) for piece in ordered]
        with self._counting:
            if not failed:
                self.commits += 1
                self.commit_seconds += time.perf_counter() - started
            self._of_run -= Counter(piece.run_id for piece in group)
            self.waiting -= len(group)
        for settle in settled:
            settle()
        return worked

    def _done(
        self, group: list[_Piece], work: Callable[[sa.Connection, list[_Piece]], list[Callable[[], None]]]
    ) -> tuple[list[Callable[[], None]], float]:
        """Commit a group; return what settles its futures, and how long the work took."""
        with writing(self._engine) as connection:
            started = time.perf_counter()
            return work(connection, group), time.perf_counter() - started


class _Failed(Exception):
    """A piece of work broke the transaction that it shared."""


def _together(connection: sa.Connection, group: list[_Piece]) -> list[Callable[[], None]]:
    """Do pieces of work, ordered by their runs, in the group's transaction; return what settles their futures."""
    settled: list[Callable[[], None]] = []
    waiting: tuple[_Piece, Deferred[Any]] | None = None

    def finish() -> None:
        nonlocal waiting
        if waiting is not None:
            piece, begun = waiting
            waiting = None
            settled.append(partial(piece.future.set_result, begun.finish()))

    try:
        for piece in group:
            if waiting is not None and waiting[0].run_id == piece.run_id:
                finish()
            try:
                result = piece.work(connection)
            except Refused as refusal:
                settled.append(partial(piece.future.set_exception, refusal))
                continue
            finish()
            if isinstance(result, Deferred):
                waiting = (piece, result)
            else:
                settled.append(partial(piece.future.set_result, result))
        finish()
    except Exception as error:
        raise _Failed from error
    return settled


def _apart(connection: sa.Connection, group: list[_Piece]) -> list[Callable[[], None]]:
    """Do pieces of work, each in a savepoint of its own; return what settles their futures."""
    return [_alone(connection, piece) for piece in group]


def _alone(connection: sa.Connection, piece: _Piece) -> Callable[[], None]:
    try:
        with connection.begin_nested():
            result = piece.work(connection)
            if isinstance(result, Deferred):
                result = result.finish()
    except Exception as error:  # whoever waits for the answer gets the reason
        return partial(piece.future.set_exception, error)
    return partial(piece.future.set_result, result)
