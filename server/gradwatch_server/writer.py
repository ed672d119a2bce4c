"""One writer, group commit: what arrives within a few milliseconds shares a transaction and its sync to disk."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa

from gradwatch_server.database import writing
from gradwatch_server.errors import Refused

Result = TypeVar("Result")
Work = Callable[[sa.Connection], Any]

_MOST_IN_ONE_COMMIT = 64


class _Piece(NamedTuple):
    run_id: str
    """Servers that share a PostgreSQL lock runs in this order: none waits for another in a circle."""
    work: Work
    future: Future[Any]


class Writer:
    """Runs pieces of work in one transaction a group, and answers each only after the commit is on disk.

    A piece that raises changes nothing and does not touch its neighbours.
    """

    def __init__(self, engine: sa.Engine, capacity: int, capacity_per_run: int) -> None:
        self._engine = engine
        self._waiting: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._most = capacity
        self._most_of_run = capacity_per_run
        self._of_run: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="gradwatch-writer", daemon=True)
        self.commits = 0
        self.commit_seconds = 0.0
        self.refused = 0
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pieces of work that wait now."""
        return self._waiting.qsize()

    def submit(self, work: Callable[[sa.Connection], Result], run_id: str = "") -> Future[Result]:
        """Queue a piece of work on a run; the future holds its result once it is on disk.

        Args:
            work: may raise `Refused` only before it has written anything; any other exception undoes what it did.
            run_id: the run that it is about; empty: none.

        Raises:
            Refused: too many pieces of this run wait, the queue is full, or the server is stopping.
        """
        future: Future[Result] = Future()
        with self._counting:
            if self._closed:
                raise Refused(503, "Stopping", "the server is stopping: send it again", retry_after_seconds=2)
            if run_id and self._of_run[run_id] >= self._most_of_run:
                self.refused += 1
                detail = f"{self._most_of_run} batches of run {run_id!r} wait already (limits.queued_batches_per_run)"
                raise Refused(429, "Too many batches", f"{detail}: wait for their answers", retry_after_seconds=1)
            if self.waiting >= self._most:
                self.refused += 1
                detail = f"{self._most} batches wait already (limits.queued_batches): send it again later"
                raise Refused(503, "Queue full", detail, retry_after_seconds=1)
            self._waiting.put(_Piece(run_id, work, future))
            self._of_run[run_id] += 1
        return future

    def close(self, timeout_seconds: float) -> None:
        """Finish what waits, then stop; what a stuck database keeps from being done in time is not answered."""
        with self._counting:
            self._closed = True
            self._waiting.put(None)
        self._thread.join(timeout_seconds)

    def _loop(self) -> None:
        while (first := self._waiting.get()) is not None:
            group, last = [first], False
            while len(group) < _MOST_IN_ONE_COMMIT and not last:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    last = True
                else:
                    group.append(following)
            self._commit(group)
            if last:
                return

    def _commit(self, group: list[_Piece]) -> None:
        started = time.perf_counter()
        wanted = [piece for piece in group if piece.future.set_running_or_notify_cancel()]
        ordered = sorted(wanted, key=lambda piece: piece.run_id)
        try:
            try:
                settled = self._done(ordered, _together)
            except _Failed:
                settled = self._done(ordered, _apart)
        except BaseException as error:  # whoever waits for the answer gets the reason
            reason = error
            settled = [partial(piece.future.set_exception, reason) for piece in ordered]
        else:
            self.commits += 1
            self.commit_seconds += time.perf_counter() - started
        with self._counting:
            self._of_run -= Counter(piece.run_id for piece in group)
        for settle in settled:
            settle()

    def _done(
        self, group: list[_Piece], one: Callable[[sa.Connection, _Piece], Callable[[], None]]
    ) -> list[Callable[[], None]]:
        """Commit a group; return what settles its futures."""
        with writing(self._engine) as connection:
            return [one(connection, piece) for piece in group]


class _Failed(Exception):
    """A piece of work broke the transaction that it shared."""


def _together(connection: sa.Connection, piece: _Piece) -> Callable[[], None]:
    """Do a piece of work in the group's transaction."""
    try:
        result = piece.work(connection)
    except Refused as refusal:
        return partial(piece.future.set_exception, refusal)
    except Exception as error:
        raise _Failed from error
    return partial(piece.future.set_result, result)


def _apart(connection: sa.Connection, piece: _Piece) -> Callable[[], None]:
    """Do a piece of work in a savepoint of its own."""
    try:
        with connection.begin_nested():
            result = piece.work(connection)
    except Exception as error:  # whoever waits for the answer gets the reason
        return partial(piece.future.set_exception, error)
    return partial(piece.future.set_result, result)
