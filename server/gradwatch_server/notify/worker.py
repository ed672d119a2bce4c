"""One receiver's way out: its own claims, connections and circuit, so that none waits for another."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import sqlalchemy as sa

from gradwatch_server.errors import Refused
from gradwatch_server.notify import outbox
from gradwatch_server.notify.circuit_breaker import Circuit
from gradwatch_server.notify.delivery_result import Answer
from gradwatch_server.notify.outbox import Attempt, Delivery, Due
from gradwatch_server.notify.receivers import Message, Receiver, Way
from gradwatch_server.store.group_commit import Writer

_POLL_SECONDS = 1.0
_PAUSE_SECONDS = 0.2

log = logging.getLogger(__name__)
Result = TypeVar("Result")


async def written(writer: Writer, work: Callable[[sa.Connection], Result]) -> Result:
    """Have a piece of work done and committed; waits while the writer's queue is full."""
    while True:
        try:
            return await asyncio.shield(asyncio.wrap_future(writer.submit(work)))
        except Refused:
            await asyncio.sleep(_PAUSE_SECONDS)


class Lane:
    """Delivers what is due to one receiver; woken by commits, and at least once a second."""

    def __init__(self, writer: Writer, receiver: Receiver, pace: Delivery, results: Counter[tuple[str, str]]) -> None:
        self._writer = writer
        self._receiver = receiver
        self._pace = pace
        self._at_once = min(pace.at_once, receiver.most_at_once)
        self._results = results
        self._circuit = Circuit(pace.circuit_failures, pace.circuit_seconds)
        self._work = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._settled: list[Attempt] = []
        self._closing = False

    def close(self) -> None:
        """Claim no more, record what is under way, then end."""
        self._closing = True
        self.wake()

    def wake(self) -> None:
        """Look for due deliveries now."""
        self._work.set()

    async def run(self) -> None:
        """Deliver until closed; if it is cancelled, what is under way comes back when its lease ends."""
        async with self._receiver.way(self._pace.timeout_seconds, self._at_once) as way:
            try:
                while self._under_way or self._settled or not self._closing:
                    await self._round(way)
                    with suppress(TimeoutError):  # not wait_for: Python 3.11's swallows a cancel that comes with a wake
                        async with asyncio.timeout(_POLL_SECONDS):
                            await self._work.wait()
                    self._work.clear()
            finally:
                for task in self._under_way:
                    task.cancel()

    async def _round(self, way: Way) -> None:
        """Record what has come back and claim as much as there is room for, in one transaction."""
        settled, self._settled = self._settled, []
        most = 0 if self._closing else self._circuit.room(time.time(), self._at_once)
        room = most - len(self._under_way)
        if not settled and room <= 0:
            return
        try:
            due, states = await written(self._writer, lambda connection: self._turn(connection, settled, room))
        except Exception:
            self._settled = settled + self._settled
            log.exception("receiver %s: a round of deliveries failed; the next one tries again", self._receiver.name)
            return
        for attempt, state in zip(settled, states, strict=True):
            self._tell(attempt, state)
        for delivery in due:
            task = asyncio.create_task(self._deliver(way, delivery))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    def _turn(self, connection: sa.Connection, settled: list[Attempt], room: int) -> tuple[list[Due], list[str]]:
        states = outbox.record(connection, settled, self._pace) if settled else []
        if room <= 0:
            return [], states
        return outbox.claim(connection, self._receiver.name, time.time(), room, self._pace.lease_seconds), states

    async def _deliver(self, way: Way, due: Due) -> None:
        at, started = time.time(), time.perf_counter()
        try:
            answer = await way.send(Message(due.id, due.payload, due.created_at), at)
        except Exception as error:  # else it would come back at the end of each lease, for ever
            log.exception("delivery %s to %s could not be attempted", due.id, self._receiver.name)
            answer = Answer(None, f"{type(error).__name__}: the server's log says more")
        self._circuit.note(answer, time.time())
        self._settled.append(Attempt(due, answer, at, time.perf_counter() - started))
        self.wake()

    def _tell(self, attempt: Attempt, state: str) -> None:
        self._results[self._receiver.name, state] += 1
        if attempt.answer.verdict != "delivered":
            log.warning(
                "delivery %s to %s: %s; it is %s", attempt.due.id, self._receiver.name, attempt.answer.error, state
            )
