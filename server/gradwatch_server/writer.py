"""One writer, group commit: what arrives within a few milliseconds shares a transaction and its sync to disk."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
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
    """Runs pieces of work, each in a savepoint of its own, and answers each only after the commit is on disk.

    A piece that raises changes nothing and does not touch its neighbours.
    """

    def __init__(self, engine: sa.Engine, capacity: int) -> None:
        self._engine = engine
        self._waiting: queue.Queue[_Piece | None] = queue.Queue(capacity)
        self._closed = threading.Event()
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

        Raises:
            Refused: the queue is full, or the server is stopping.
        """
        future: Future[Result] = Future()
        if self._closed.is_set():
            raise Refused(503, "Stopping", "the server is stopping: send it again", retry_after_seconds=2)
        try:
            self._waiting.put_nowait(_Piece(run_id, work, future))
        except queue.Full:
            self.refused += 1
            detail = f"{self._waiting.maxsize} batches wait already (limits.queued_batches): send it again later"
            raise Refused(503, "Queue full", detail, retry_after_seconds=1) from None
        return future

    def close(self) -> None:
        """Finish what waits, then stop."""
        if not self._closed.is_set():
            self._closed.set()
            self._waiting.put(None)
        self._thread.join()

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
        settled: list[Callable[[], None]] = []
        started = time.perf_counter()
        try:
            with writing(self._engine) as connection:
                ordered = sorted(group, key=lambda piece: piece.run_id)
                settled += [self._run(connection, piece.work, piece.future) for piece in ordered]
        except BaseException as error:  # whoever waits for the answer gets the reason
            for piece in group:
                piece.future.set_exception(error)
            return
        self.commits += 1
        self.commit_seconds += time.perf_counter() - started
        for settle in settled:
            settle()

    def _run(self, connection: sa.Connection, work: Work, future: Future[Any]) -> Callable[[], None]:
        try:
            with connection.begin_nested():
                result = work(connection)
        except Exception as error:  # whoever waits for the answer gets the reason
            refusal = error
            return lambda: future.set_exception(refusal)
        return lambda: future.set_result(result)
