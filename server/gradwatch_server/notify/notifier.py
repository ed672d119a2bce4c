"""Notifier: delivers the notifications of the outbox, with one delivery worker per receiver.

Every worker has its own claims, connections and circuit breaker, so that a receiver that is down or slow delays no
other. The workers are replaced when the configuration is reloaded.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa

from gradwatch_server import steady_clock
from gradwatch_server.errors import Refused
from gradwatch_server.notify import outbox
from gradwatch_server.notify.http_client import DeliveryResult
from gradwatch_server.notify.outbox import Attempt, ClaimedDelivery, DeliverySettings
from gradwatch_server.notify.receivers import Alertmanager, Notification, Receiver, Transport
from gradwatch_server.notify.reminder import remind
from gradwatch_server.store.group_commit import Writer

_POLL_SECONDS = 1.0
_WRITE_AGAIN_SECONDS = 0.2
_RESTART_SECONDS = 1.0
_CLEANUP_SECONDS = 5.0
_DRAIN_SECONDS = 3.0
_LONGEST_OPEN_SECONDS = 300.0
"""Longest time for which a circuit breaker stays open."""

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Notifier:
    """Runs a delivery worker for every configured receiver until it is stopped."""

    def __init__(
        self, engine: sa.Engine, writer: Writer, receivers: Sequence[Receiver], settings: DeliverySettings
    ) -> None:
        self._engine = engine
        self._writer = writer
        self._receivers = list(receivers)
        self._settings = settings
        self._workers: list[DeliveryWorker] = []
        self._changed = asyncio.Event()
        self._stopped = False
        self.results: Counter[tuple[str, str]] = Counter()
        """Number of attempts by (receiver, state of the delivery after the attempt)."""

    def wake(self) -> None:
        """Look for due deliveries now."""
        for worker in self._workers:
            worker.wake()

    def idle_seconds(self) -> float:
        """Return for how long the slowest worker has not looked for due deliveries, though it does every second."""
        return max((time.monotonic() - worker.looked_at for worker in self._workers), default=0.0)

    def configure(self, receivers: Sequence[Receiver], settings: DeliverySettings) -> None:
        """Deliver to these receivers from now on."""
        self._receivers, self._settings = list(receivers), settings
        self._changed.set()

    def stop(self) -> None:
        """Claim nothing more, wait a few seconds for the attempts under way, and end."""
        self._stopped = True
        self._changed.set()

    async def run(self) -> None:
        """Deliver until stopped.

        After a reload, new workers start at once; the old ones end when their attempts under way have ended.
        """
        running: set[asyncio.Task[None]] = set()
        while not self._stopped:
            self._changed.clear()
            self._workers = [
                DeliveryWorker(self._writer, each, self._settings, self.results) for each in self._receivers
            ]
            background = self._start_background_tasks()
            for worker in self._workers:
                task = asyncio.create_task(_run_with_restarts(worker))
                running.add(task)
                task.add_done_callback(running.discard)
            try:
                await self._changed.wait()
            finally:
                for task in background:
                    task.cancel()
            for worker in self._workers:
                worker.close()
        if running:
            await asyncio.wait(running, timeout=_DRAIN_SECONDS)
        for task in running:
            task.cancel()

    def _start_background_tasks(self) -> list[asyncio.Task[None]]:
        """Start the clean-up of the outbox, and a reminder for every Alertmanager."""
        names = sorted(receiver.name for receiver in self._receivers)
        alertmanagers = [receiver for receiver in self._receivers if isinstance(receiver, Alertmanager)]
        reminders = [remind(self._engine, self._writer, receiver, self._settings) for receiver in alertmanagers]
        return [asyncio.create_task(work) for work in (self._clean_up(names), *reminders)]

    async def _clean_up(self, names: list[str]) -> None:
        """Every few seconds, give up deliveries that no receiver takes, and delete the alerts of deleted runs."""

        def work(connection: sa.Connection) -> int:
            outbox.delete_orphaned_alerts(connection, steady_clock.now())
            return outbox.give_up(connection, names, steady_clock.now())

        while True:
            try:
                given_up = await _write(self._writer, work)
                if given_up:
                    log.warning("gave up deliveries whose receivers are disabled or not configured: %d", given_up)
            except Exception:
                log.exception("cleaning up the outbox failed; trying again in %g s", _CLEANUP_SECONDS)
            await asyncio.sleep(_CLEANUP_SECONDS)


async def _run_with_restarts(worker: "DeliveryWorker") -> None:
    """Run a worker; after an unexpected error, log it and start the worker again."""
    ended = False
    while not ended:
        try:
            await worker.run()
            ended = True
        except Exception:
            log.exception("a delivery worker failed; restarting it")
            await asyncio.sleep(_RESTART_SECONDS)


class DeliveryWorker:
    """Delivers to one receiver; looks for due deliveries when woken by a commit, and at least once a second."""

    def __init__(
        self, writer: Writer, receiver: Receiver, settings: DeliverySettings, results: Counter[tuple[str, str]]
    ) -> None:
        self._writer = writer
        self._receiver = receiver
        self._settings = settings
        self._at_once = min(settings.at_once, receiver.most_at_once)
        self._results = results
        self._breaker = CircuitBreaker(settings.circuit_failures, settings.circuit_seconds)
        self._woken = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._ended: list[Attempt] = []
        """Attempts that have ended and are not recorded yet."""
        self._closing = False
        self.looked_at = time.monotonic()
        """When it last looked for due deliveries, by the monotonic clock."""

    def close(self) -> None:
        """Claim nothing more, record the attempts under way, then end."""
        self._closing = True
        self.wake()

    def wake(self) -> None:
        """Look for due deliveries now."""
        self._woken.set()

    async def run(self) -> None:
        """Deliver until closed; if cancelled, the claims under way become due again when their leases end."""
        async with self._receiver.transport(self._settings.timeout_seconds, self._at_once) as transport:
            try:
                while self._under_way or self._ended or not self._closing:
                    await self._record_and_claim(transport)
                    self.looked_at = time.monotonic()
                    with suppress(TimeoutError):  # not wait_for: Python 3.11's swallows a cancel that comes with a wake
                        async with asyncio.timeout(_POLL_SECONDS):
                            await self._woken.wait()
                    self._woken.clear()
            finally:
                for task in self._under_way:
                    task.cancel()

    async def _record_and_claim(self, transport: Transport) -> None:
        """Record the attempts that have ended and claim as many due deliveries as may start, in one transaction."""
        ended, self._ended = self._ended, []
        allowed = 0 if self._closing else self._breaker.allowed(time.monotonic(), self._at_once)
        most = allowed - len(self._under_way)
        if not ended and most <= 0:
            return
        try:
            claimed, states = await _write(self._writer, lambda connection: self._transact(connection, ended, most))
        except Exception:
            self._ended = ended + self._ended
            log.exception("receiver %s: recording and claiming deliveries failed; trying again", self._receiver.name)
            return
        for attempt, state in zip(ended, states, strict=True):
            self._count_and_log(attempt, state)
        for delivery in claimed:
            task = asyncio.create_task(self._attempt(transport, delivery))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    def _transact(
        self, connection: sa.Connection, ended: list[Attempt], most: int
    ) -> tuple[list[ClaimedDelivery], list[str]]:
        states = outbox.record(connection, ended, self._settings) if ended else []
        if most <= 0:
            return [], states
        lease_seconds = self._settings.lease_seconds
        return outbox.claim(connection, self._receiver.name, steady_clock.now(), most, lease_seconds), states

    async def _attempt(self, transport: Transport, delivery: ClaimedDelivery) -> None:
        at, started = steady_clock.now(), time.perf_counter()
        lease_seconds = delivery.lease_ends - time.monotonic()
        if lease_seconds <= 0:  # this process stood still: another server may have sent it, and what follows, by now
            log.warning("delivery %s to %s: its lease ended before it was sent", delivery.id, self._receiver.name)
            return
        notification = Notification(delivery.id, delivery.payload, delivery.created_at)
        try:
            async with asyncio.timeout(lease_seconds):
                result = await transport.send(notification, time.time())
        except TimeoutError:
            result = DeliveryResult(None, f"no answer within the lease of {self._settings.lease_seconds:g} s")
        except Exception as error:  # else the delivery would come back at the end of each lease, for ever
            log.exception("delivery %s to %s could not be attempted", delivery.id, self._receiver.name)
            result = DeliveryResult(None, f"{type(error).__name__}: the server's log says more")
        self._breaker.record(result, time.monotonic())
        self._ended.append(Attempt(delivery, result, at, time.perf_counter() - started))
        self.wake()

    def _count_and_log(self, attempt: Attempt, state: str) -> None:
        receiver, delivery, result = self._receiver.name, attempt.delivery, attempt.result
        self._results[receiver, state] += 1
        if result.verdict != "delivered":
            log.warning("delivery %s to %s: %s; it is %s", delivery.id, receiver, result.error, state)


async def _write(writer: Writer, work: Callable[[sa.Connection], Result]) -> Result:
    """Have the writer run and commit a piece of work; wait while its queue is full."""
    while True:
        try:
            return await asyncio.shield(asyncio.wrap_future(writer.submit(work)))
        except Refused:
            await asyncio.sleep(_WRITE_AGAIN_SECONDS)


@dataclass
class CircuitBreaker:
    """Circuit breaker of one receiver; pure.

    Closed at first; opens after ``opens_after`` failures in a row; then half-open: one delivery is tried as a probe.
    Responses that blame the delivery itself (4xx) are not failures.
    """

    opens_after: int
    open_seconds: float
    """How long it stays open at first; the time doubles with each failed probe."""
    failures: int = 0
    open_until: float = 0.0

    def allowed(self, now: float, at_once: int) -> int:
        """Return how many deliveries may be under way at ``now``; closed: ``at_once``, half-open: 1, open: 0."""
        if now < self.open_until:
            return 0
        return 1 if self.failures >= self.opens_after else at_once

    def record(self, result: DeliveryResult, now: float) -> None:
        """Count the result of an attempt, and open or close."""
        if result.verdict != "failed":
            self.failures = 0
            return
        self.failures += 1
        if result.retry_after_seconds is not None and result.status in (429, 503):
            self._open(now, result.retry_after_seconds)
        if self.failures >= self.opens_after:
            self._open(now, self.open_seconds * 2 ** min(self.failures - self.opens_after, 10))

    def _open(self, now: float, seconds: float) -> None:
        self.open_until = max(self.open_until, now + min(seconds, _LONGEST_OPEN_SECONDS))
