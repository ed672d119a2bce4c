"""Group commit: work that arrives within a few milliseconds shares a transaction and its sync to disk.

SQLite has one writer. PostgreSQL has two: while one waits for the database, the other works.
"""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import sqlalchemy as sa

from gradwatch_server.errors import Refused, RetryAfter, stopping
from gradwatch_server.store.database import writing

Result = TypeVar("Result")

_MOST_IN_ONE_COMMIT = 256
_COMMIT_SECONDS = 0.04
"""About how much processor time one commit gathers: the first work is not answered before the last is done."""
_POSTGRESQL_WRITERS = 2


class Deferred(NamedTuple, Generic[Result]):
    """The result of work that waits for something outside: the next work begins before this one is finished."""

    finish: Callable[[], Result]


class _WorkItem(NamedTuple):
    run_id: str
    """Servers that share a PostgreSQL lock runs in this order, so that they never wait for each other in a circle."""
    work: Callable[[sa.Connection], Any]
    future: Future[Any]


_Settle = Callable[[], None]
"""Sets the result or the exception of a future."""


class Writer:
    """Does work in one transaction a group, and answers each work only after the commit is on disk.

    Work that raises changes nothing and does not affect the rest of its group. Work on one run is done in the order in
    which it came. Work on another run may begin while earlier work waits for something.
    """

    def __init__(self, engine: sa.Engine, capacity: int, capacity_per_run: int) -> None:
        self._engine = engine
        self.capacity = capacity
        self._capacity_per_run = capacity_per_run
        self._of_run: Counter[str] = Counter()
        self.waiting = 0
        """Work that has been taken in and is not done: it is queued or under way."""
        self._lock = threading.Lock()
        self._closed = False
        self.commits = 0
        self.commit_seconds = 0.0
        self.refused = 0
        self._busy_since: dict[int, float] = {}
        """Writer's thread -> when its present group began, by the monotonic clock."""
        count = _POSTGRESQL_WRITERS if engine.dialect.name == "postgresql" else 1
        self._queues = [_RunQueue() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._loop, args=(items,), name="gradwatch-writer", daemon=True)
            for items in self._queues
        ]
        for thread in self._threads:
            thread.start()

    def configure(self, capacity: int, capacity_per_run: int) -> None:
        """Use other capacities from now on."""
        with self._lock:
            self.capacity, self._capacity_per_run = capacity, capacity_per_run

    def submit(self, work: Callable[[sa.Connection], Result | Deferred[Result]], run_id: str = "") -> Future[Result]:
        """Queue work on a run; the future holds its result once it is on disk.

        Args:
            work: may raise `Refused` only before it has written anything; any other exception undoes what it did.
            run_id: the run that it is about; empty: none.

        Raises:
            Refused: too much work on this run is under way, the queue is full, or the server is stopping.
        """
        future: Future[Result] = Future()
        with self._lock:
            self._check_capacity(run_id)
            self._queues[hash(run_id) % len(self._queues)].put(_WorkItem(run_id, work, future))
            self._of_run[run_id] += 1
            self.waiting += 1
        return future

    def _check_capacity(self, run_id: str) -> None:
        if self._closed:
            raise stopping()
        if run_id and self._of_run[run_id] >= self._capacity_per_run:
            self.refused += 1
            detail = f"{self._capacity_per_run} batches of run {run_id!r} wait already (limits.queued_batches_per_run)"
            raise Refused(429, "Too many batches", f"{detail}: wait for their answers", retry_after=RetryAfter.SOON)
        if self.waiting >= self.capacity:
            self.refused += 1
            detail = f"{self.capacity} batches wait already (limits.queued_batches): send it again later"
            raise Refused(503, "Queue full", detail, retry_after=RetryAfter.SOON)

    def busy_seconds(self) -> float:
        """Return for how long the slowest writer has been at its present group; 0.0 if none has work."""
        with self._lock:
            return max((time.monotonic() - since for since in self._busy_since.values()), default=0.0)

    def close(self, timeout_seconds: float) -> None:
        """Finish the work that waits, then stop; work that a stuck database keeps from being done is not answered."""
        end = time.monotonic() + timeout_seconds
        with self._lock:
            self._closed = True
            for items in self._queues:
                items.close()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _loop(self, items: "_RunQueue") -> None:
        usual_seconds = 0.0
        while group := items.take(_MOST_IN_ONE_COMMIT if not usual_seconds else int(_COMMIT_SECONDS / usual_seconds)):
            usual_seconds = 0.8 * usual_seconds + 0.2 * self._commit(group) / len(group)

    def _commit(self, group: list[_WorkItem]) -> float:
        """Do and answer a group; return the work's processor time in seconds, without the sync that ended it."""
        started, worked, failed = time.perf_counter(), 0.0, False
        with self._lock:
            self._busy_since[threading.get_ident()] = time.monotonic()
        wanted = [item for item in group if item.future.set_running_or_notify_cancel()]
        ordered = sorted(wanted, key=lambda item: item.run_id)
        try:
            try:
                settles, worked = self._in_transaction(ordered, _do_together)
            except _GroupFailedError:
                settles, worked = self._in_transaction(ordered, _do_in_savepoints)
        except BaseException as error:  # whoever waits for the answer gets the reason
            reason, failed = error, True
            settles = [partial(item.future.set_exception, reason) for item in ordered]
        with self._lock:
            if not failed:
                self.commits += 1
                self.commit_seconds += time.perf_counter() - started
            del self._busy_since[threading.get_ident()]
            self._of_run -= Counter(item.run_id for item in group)
            self.waiting -= len(group)
        for settle in settles:
            settle()
        return worked

    def _in_transaction(
        self, group: list[_WorkItem], do: Callable[[sa.Connection, list[_WorkItem]], list[_Settle]]
    ) -> tuple[list[_Settle], float]:
        """Commit a group; return the functions that settle its futures, and the work's processor time in seconds."""
        with writing(self._engine) as connection:
            started = time.thread_time()  # not the time that passes: much of it is spent waiting for other threads
            return do(connection, group), time.thread_time() - started


class _RunQueue:
    """Work that waits for a writer. Runs take turns: however much waits on one, work on another comes next."""

    def __init__(self) -> None:
        self._of_run: OrderedDict[str, deque[_WorkItem]] = OrderedDict()
        """Run -> its work in the order in which it came; the runs in the order of their turns."""
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: _WorkItem) -> None:
        """Queue work behind what waits on its run."""
        with self._changed:
            self._of_run.setdefault(item.run_id, deque()).append(item)
            self._changed.notify()

    def close(self) -> None:
        """End once nothing waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, most: int) -> list[_WorkItem]:
        """Wait for work; return up to ``most`` pieces, at least one, or none if the queue is closed and empty."""
        group: list[_WorkItem] = []
        with self._changed:
            while not self._of_run and not self._closed:
                self._changed.wait()
            while self._of_run and len(group) < min(max(most, 1), _MOST_IN_ONE_COMMIT):
                run_id, items = self._of_run.popitem(last=False)
                group.append(items.popleft())
                if items:
                    self._of_run[run_id] = items
        return group


class _GroupFailedError(Exception):
    """Work broke the transaction that it shared."""


def _do_together(connection: sa.Connection, group: list[_WorkItem]) -> list[_Settle]:
    """Do work, ordered by run, in the transaction of the group; return the functions that settle the futures.

    What waits for something outside is finished once all work has begun, or when the next work is on the same run.
    """
    settles: list[_Settle] = []
    waiting: deque[tuple[_WorkItem, Deferred[Any]]] = deque()

    def finish_all() -> None:
        while waiting:
            item, deferred = waiting.popleft()
            settles.append(partial(item.future.set_result, deferred.finish()))

    try:
        for item in group:
            if waiting and waiting[-1][0].run_id == item.run_id:
                finish_all()
            try:
                result = item.work(connection)
            except Refused as refusal:
                settles.append(partial(item.future.set_exception, refusal))
                continue
            if isinstance(result, Deferred):
                waiting.append((item, result))
            else:
                settles.append(partial(item.future.set_result, result))
        finish_all()
    except Exception as error:
        raise _GroupFailedError from error
    return settles


def _do_in_savepoints(connection: sa.Connection, group: list[_WorkItem]) -> list[_Settle]:
    """Do each work in a savepoint of its own; return the functions that settle the futures."""
    return [_do_alone(connection, item) for item in group]


def _do_alone(connection: sa.Connection, item: _WorkItem) -> _Settle:
    try:
        with connection.begin_nested():
            result = item.work(connection)
            if isinstance(result, Deferred):
                result = result.finish()
    except Exception as error:  # whoever waits for the answer gets the reason
        return partial(item.future.set_exception, error)
    return partial(item.future.set_result, result)
