"""The thread that ships: gathers what the training thread hands over, spools it, delivers it in order."""

import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from gradwatch import wire
from gradwatch.post import Client, Reply, Verdict, deliver
from gradwatch.spool import Entry, Spool, abandoned

log = logging.getLogger("gradwatch")

GATHER_SECONDS = 0.2
"""What arrives within this time shares a batch."""
MOST_SAMPLES = 256
"""In one batch."""
MOST_WAITING = 4096
"""Items that may wait between the training thread and this one; further ones are dropped and counted."""
_REQUEST_SECONDS = 10.0
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0


@dataclass
class Scalar:
    """One scalar of one step, sampled or not."""

    name: str
    step: int
    value: float


Item = wire.Sample | wire.Event | wire.End | wire.Registration | Scalar
Deferred = Callable[[], Item | None]
"""Made on the training thread, evaluated on this one; returns none where it has nothing to tell."""


@dataclass
class _Gathered:
    """The parts of the next batch."""

    samples: list[wire.Sample] = field(default_factory=list)
    events: list[wire.Event] = field(default_factory=list)
    trail: dict[str, tuple[list[int], list[wire.Number]]] = field(default_factory=dict)
    end: wire.End | None = None

    def add(self, item: Item) -> None:
        match item:
            case wire.Sample():
                self.samples.append(item)
            case wire.Event():
                self.events.append(item)
            case wire.End():
                self.end = item
            case Scalar():
                steps, values = self.trail.setdefault(item.name, ([], []))
                steps.append(item.step)
                values.append(item.value)
            case wire.Registration():
                raise AssertionError("a registration is a document of its own")

    def __bool__(self) -> bool:
        return bool(self.samples or self.events or self.trail or self.end)


class Sender:
    """Delivers one run from a thread of its own; ``put`` never waits and never raises."""

    def __init__(self, client: Client, spool: Spool, run_id: str, attempt: int) -> None:
        self._client = client
        self._spool = spool
        self._run_id = run_id
        self._attempt = attempt
        self._items: deque[Item | Deferred] = deque()
        self._wake = threading.Event()
        self._deadline: float | None = None
        self._registration: bytes | None = None
        self._retry_seconds = 0.0
        self._next_attempt = 0.0
        self._left = False
        self._reached = False
        self._inherited = False
        self._warned: set[str] = set()
        self._dropped_samples = 0
        self._dropped_bytes = 0
        self.errors = 0
        self._thread = threading.Thread(target=self._run, name="gradwatch-sender", daemon=True)
        self._thread.start()

    def put(self, item: Item | Deferred) -> None:
        """Hand over what is to be shipped."""
        if len(self._items) >= MOST_WAITING:
            self._dropped_samples += 1
            return
        self._items.append(item)

    def close(self, timeout_seconds: float) -> bool:
        """Deliver what waits, for at most this long; return whether all of it was delivered."""
        self._deadline = time.monotonic() + timeout_seconds
        self._wake.set()
        self._thread.join(timeout_seconds + 1.0)
        return not self._thread.is_alive() and not self._left

    @property
    def closed(self) -> bool:
        """Return whether ``close`` has been called."""
        return self._deadline is not None

    def abandon(self) -> None:
        """In a forked child: there is no thread here, and the spool is the parent's."""
        self._deadline = 0.0
        self._items.clear()

    def _run(self) -> None:
        try:
            while True:
                self._wake.wait(
                    GATHER_SECONDS if self._retry_seconds == 0 else min(self._retry_seconds, GATHER_SECONDS)
                )
                last = self.closed
                self._gather()
                self._deliver(last=last)
                if not last and self._reached and not self._inherited and self._spool.first() is None:
                    self._inherit()
                if last and not self._items:
                    break
        except Exception:
            log.warning("gradwatch ships no more: its sender has failed", exc_info=True)
        finally:
            self._left = self._spool.first() is not None
            if self._left:
                self._warn("left", f"{self._client.url} was not reached: what is left waits in {self._spool.path}")
            self._spool.close()
            self._client.close()

    def _gather(self) -> None:
        gathered = _Gathered()
        while self._items:
            made = self._items.popleft()
            item = made() if callable(made) else made
            if item is None:
                continue
            if isinstance(item, wire.Registration):
                self._spool_batch(gathered)
                gathered = _Gathered()
                self._registration = wire.encode(item)
                self._spool.append("run", 0, self._registration)
                continue
            gathered.add(item)
            if len(gathered.samples) >= MOST_SAMPLES:
                self._spool_batch(gathered)
                gathered = _Gathered()
        self._spool_batch(gathered)

    def _spool_batch(self, gathered: _Gathered) -> None:
        if not gathered:
            return
        batch = wire.Batch(
            id=secrets.token_hex(8),
            attempt=self._attempt,
            samples=gathered.samples,
            trail={name: wire.Trail(steps=steps, values=values) for name, (steps, values) in gathered.trail.items()},
            events=gathered.events,
            dropped=wire.Dropped(
                samples=self._dropped_samples + self._spool.dropped_samples,
                bytes=self._dropped_bytes + self._spool.dropped_bytes,
                errors=self.errors,
            ),
            end=gathered.end,
        )
        self._spool.append("batch", len(batch.samples), wire.encode(batch))
        if self._spool.broken is not None:
            self._warn("spool", f"no disk for what is not delivered yet, so it is kept in memory: {self._spool.broken}")

    def _deliver(self, *, last: bool) -> None:
        started = time.monotonic()
        while (entry := self._spool.first()) is not None:
            if not last and self._next_attempt > time.monotonic():
                return
            reply = self._send(entry)
            if reply.verdict is Verdict.LATER and last and self._remaining() > 0:
                threading.Event().wait(min(0.1, self._remaining()))
            if not self._settle(entry, reply, last=last):
                return
            if not last and time.monotonic() - started > GATHER_SECONDS and self._items:
                return

    def _inherit(self) -> None:
        """Deliver what agents that are gone have left for this server, once the way to it is known to be free."""
        self._inherited = True
        for spool in abandoned(self._spool.path.parent):
            with closing(spool):
                if spool.url == self._spool.url:
                    deliver(spool, self._client, time.monotonic() + _REQUEST_SECONDS)

    def _remaining(self) -> float:
        return _REQUEST_SECONDS if self._deadline is None else self._deadline - time.monotonic()

    def _send(self, entry: Entry) -> Reply:
        seconds = min(_REQUEST_SECONDS, self._remaining())
        if entry.kind == "run":
            return self._client.register(entry.body, seconds)
        return self._client.store(self._run_id, entry.body, seconds)

    def _settle(self, entry: Entry, reply: Reply, *, last: bool) -> bool:
        """Act on an answer; return whether the next document may follow at once."""
        if reply.verdict is Verdict.ACKNOWLEDGED:
            self._spool.remove(entry)
            self._retry_seconds = 0.0
            self._reached = True
            return True
        if reply.verdict is Verdict.REFUSED:
            self._spool.remove(entry)
            self._dropped_samples += entry.samples
            self._dropped_bytes += len(entry.body)
            self._warn("refused", f"the server refuses what is sent, which is lost: {reply.reason}")
            return True
        if reply.verdict is Verdict.UNKNOWN_RUN and self._registration is not None:
            again = self._client.register(self._registration, min(_REQUEST_SECONDS, self._remaining()))
            if again.verdict is Verdict.ACKNOWLEDGED:
                return True
        self._warn("later", f"{self._client.url} does not take what is sent, which is kept meanwhile: {reply.reason}")
        if last:
            return self._remaining() > 0
        self._retry_seconds = min(max(2 * self._retry_seconds, _FIRST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)
        jittered = self._retry_seconds * random.Random().uniform(0.8, 1.2)  # noqa: S311  # spreads retries, no secret
        self._next_attempt = time.monotonic() + max(jittered, reply.retry_after_seconds or 0.0)
        return False

    def _warn(self, kind: str, text: str) -> None:
        """Warn once of each kind of trouble."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("gradwatch: %s", text)
