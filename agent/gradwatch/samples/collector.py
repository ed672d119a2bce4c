"""The collector: turns what the training thread handed over into batches in the spool, on a thread of its own."""

import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from gradwatch import wire
from gradwatch.clipping.agc import AGC
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.spool import Spool
from gradwatch.model.discovery import shorten_name
from gradwatch.model.registry import RegisteredParameters
from gradwatch.norms.buffers import BufferPool
from gradwatch.ranks.exchange import PartsDeadline, RankExchange
from gradwatch.ranks.parts import RankPart
from gradwatch.rounds import Ended, Message, Round
from gradwatch.samples.builder import Composer, Draft
from gradwatch.samples.loggers import ScalarLogger
from gradwatch.settings import LONGEST_NAME, can_be_stored

POLL_SECONDS: Final = 0.1
LARGEST_BATCH_BYTES: Final = 4 << 20
LARGEST_BATCH_SAMPLES: Final = 500
LARGEST_BATCH_VALUES: Final = 50_000
"""Losses and logged numbers."""
LARGEST_BATCH_EVENTS: Final = 5_000
LARGEST_BATCH_NAMES: Final = 200
"""All of these are well below what a server takes by default."""
MOST_NAMES: Final = 1_000
"""Different names that a run may log: the server keeps the latest value of each with the run."""
_OWN_NAMES: Final = ("loss", "clip_norm")
LONGEST_QUEUE: Final = 20_000
"""Steps that may wait for the collector; more are counted as dropped."""
_BACKLOG: Final = 8
"""Documents in the spool from which batches grow, since the server is the slower side."""
_GROWN_BATCH_SECONDS: Final = 2.0
_LAST_PARTS_SECONDS: Final = 2.0
"""How long the parts of other ranks are waited for at the end."""


class Collector:
    """Reads rounds, composes samples, writes batches.

    Args:
        spool: where batches go; None on a rank that leaves it to rank 0.
        slots: where read buffers are given back.
        dropped: counts what had to be dropped.
        template: the registration without its parameters.
        agc: how the agent clips.
        ranks: the way to the other ranks where parameters are sharded.
        written: called after each write to the spool.
        trouble: called at a sign of trouble: a non-finite number, a jump of the gradient norm; with whether everything
            is bad at once, so that nothing shows where it began.
        failed: called with an exception of this thread.
        warn: called with what the user has to know.
    """

    def __init__(
        self,
        spool: Spool | None,
        slots: BufferPool,
        dropped: Dropped,
        template: wire.Registration,
        agc: AGC | None,
        ranks: RankExchange | None,
        *,
        written: Callable[[], None],
        trouble: Callable[[bool], None],
        failed: Callable[[Exception], None],
        warn: Callable[[str], None],
    ) -> None:
        self._spool = spool
        self._slots = slots
        self._dropped = dropped
        self._template = template
        self._written = written
        self._trouble = trouble
        self._failed = failed
        self._warn = warn
        self._messages: deque[Message] = deque()
        self._wake = threading.Event()
        self._stop = False
        self._loggers: tuple[ScalarLogger, ...] = ()
        self._composer = Composer(dropped, agc, 0 if ranks is None else ranks.rank)
        self._ranks = ranks
        self._drafts: deque[tuple[Draft, PartsDeadline]] = deque()
        """Samples that the other ranks' parts are still missing from."""
        self._batch = _Batch()
        self._names: set[str] = set()
        """What was logged so far."""
        self._refused_name = False
        self.seconds = 0.0
        """Processor time that this thread has taken."""
        self._thread = threading.Thread(target=self._work, name="gradwatch-collector", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, message: Message) -> None:
        """Take a message from the training thread; never waits."""
        if len(self._messages) >= LONGEST_QUEUE and isinstance(message, Round):
            self._dropped.samples += message.sampled
            self._dropped.values += len(message.logged) + bool(message.losses) + bool(message.clips)
            if message.slot is not None:
                self._slots.release(message.slot)
            return
        self._messages.append(message)
        if self._slots.is_scarce:
            self._wake.set()

    def add_logger(self, logger: ScalarLogger) -> None:
        """Write the numbers of the whole run there, too."""
        self._loggers = (*self._loggers, logger)

    def finish(self, end: wire.End | None, timeout_seconds: float) -> None:
        """Write what is there, with ``end``, and stop the thread."""
        self._messages.append(Ended(end))
        self._stop = True
        self._wake.set()
        self._thread.join(timeout_seconds)

    def _work(self) -> None:
        while True:
            stopping = self._stop
            try:
                self._drain(wait=stopping)
                self._join(wait=stopping)
                self._flush(force=stopping)
            except Exception as error:
                self._failed(error)
            self.seconds = time.thread_time()
            if stopping:
                for logger in self._loggers:
                    with contextlib.suppress(Exception):
                        logger.close()
                return
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()

    def _drain(self, *, wait: bool) -> None:
        while self._messages:
            message = self._messages[0]
            if isinstance(message, Round) and message.slot is not None and not _arrived(message, wait=wait):
                return
            self._messages.popleft()
            self._take(message)
            if self._batch.full:
                self._flush(force=True)

    def _take(self, message: Message) -> None:
        if isinstance(message, RegisteredParameters):
            self._flush(force=True)
            self._composer.registered(message.watched, message.depths)
            if self._spool is None:
                return
            described = [watched.to_wire(message.depths[place]) for place, watched in enumerate(message.watched)]
            registration = msgspec.structs.replace(self._template, parameters=described)
            self._spool.append("registration", wire.encode(registration))
            self._written()
        elif isinstance(message, wire.Event):
            self._batch.events.append(message)
        elif isinstance(message, Ended):
            self._batch.end = message.end
        else:
            self._take_round(message)

    def _take_round(self, message: Round) -> None:
        try:
            draft, trail, events = self._composer.compose(message)
        finally:
            if message.slot is not None:
                self._slots.release(message.slot)
        if self._spool is not None:
            for name, value in trail.items():
                if self._allows(name):
                    self._batch_for(name).put(message.step, name, value)
            self._batch.events.extend(events)
            self._reflect(message.step, trail)
        if self._composer.trouble(trail, events, draft):
            self._trouble(self._composer.unclear)
        if draft is None:
            return
        if self._ranks is None:
            self._finish(draft, [])
        elif self._ranks.rank:
            self._ranks.publish(message.step, self._composer.part(draft))
        else:
            self._drafts.append((draft, PartsDeadline()))

    def _allows(self, name: str) -> bool:
        """Return whether the server will take a number of this name; else count it and say so once."""
        if name in self._names or name in _OWN_NAMES:
            return True
        if len(self._names) < MOST_NAMES and len(name) <= LONGEST_NAME and can_be_stored(name):
            self._names.add(name)
            return True
        self._dropped.values += 1
        if not self._refused_name:
            self._refused_name = True
            self._warn(
                f"log({name[:40]}=...) is dropped, as all is that has a name of more than {LONGEST_NAME} characters "
                f"or with NUL, or a new one beyond {MOST_NAMES:,}"
            )
        return False

    def _batch_for(self, name: str) -> "_Batch":
        """Return the batch that takes a number of this name: another one where this holds too many names."""
        if name not in self._batch.trail and len(self._batch.trail) >= LARGEST_BATCH_NAMES:
            self._flush(force=True)
        return self._batch

    def _join(self, *, wait: bool) -> None:
        """Finish the samples that the other ranks have added to."""
        if self._ranks is None or self._ranks.rank:
            return
        latest = time.monotonic() + _LAST_PARTS_SECONDS
        while self._drafts:
            draft, deadline = self._drafts[0]
            # Asked first: what is missing although a later step is complete was not measured by another rank.
            passed = len(self._drafts) > 1 and self._ranks.all_published(self._drafts[1][0].round.step)
            others = self._ranks.collect(draft.round.step)
            if others is not None:
                self._drafts.popleft()
                self._finish(draft, others)
            elif passed or deadline.has_passed or (wait and time.monotonic() > latest):
                self._drafts.popleft()
            elif wait:
                time.sleep(0.01)
            else:
                return

    def _finish(self, draft: Draft, others: Sequence[RankPart]) -> None:
        sample = self._composer.finish(draft, others)
        self._batch.samples.append(sample)
        self._batch.bytes += sum(4 * vector.size for vector in sample.statistics.values()) + 256
        self._batch.bytes += 32 * len(sample.scalars) + 9 * sum(map(len, sample.histograms.values()))
        if self._batch.full:
            self._flush(force=True)
        self._reflect(sample.step, {name: wire.number(value) for name, value in sample.scalars.items()})

    def _reflect(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers to the user's loggers; one that fails is left alone from then on."""
        for logger in self._loggers if scalars else ():
            try:
                logger.write(step, scalars)
            except Exception as error:  # a logger that was closed, a disk that is full: not the agent's fault
                self._loggers = tuple(other for other in self._loggers if other is not logger)
                self._warn(f"nothing more is mirrored to {type(logger).__name__}: {type(error).__name__}: {error}")

    def _flush(self, *, force: bool) -> None:
        batch = self._batch
        if batch.empty or self._spool is None:
            return
        behind = self._spool.pending > _BACKLOG
        if not force and behind and time.monotonic() - batch.opened_at < _GROWN_BATCH_SECONDS:
            return
        self._batch = _Batch()
        document = wire.Batch(
            id=secrets.token_hex(8),
            attempt=self._template.attempt,
            samples=batch.samples,
            trail={
                name: wire.Trail(steps=[step for step, _ in pairs], values=[wire.spell(value) for _, value in pairs])
                for name, pairs in batch.trail.items()
            },
            events=[
                event
                if event.parameter is None
                else msgspec.structs.replace(event, parameter=shorten_name(event.parameter))
                for event in batch.events
            ],
            dropped=msgspec.convert(self._dropped, wire.Dropped, from_attributes=True),
            end=batch.end,
        )
        self._spool.append("batch", wire.encode(document), len(batch.samples))
        self._written()


class _Batch:
    """A batch that is being filled."""

    def __init__(self) -> None:
        self.samples: list[wire.Sample] = []
        self.trail: dict[str, list[tuple[int, float]]] = {}
        self.events: list[wire.Event] = []
        self.end: wire.End | None = None
        self.bytes = 0
        self.values = 0
        self.opened_at = time.monotonic()

    def put(self, step: int, name: str, value: float) -> None:
        """Add a number that belongs to no sample; of one that is logged again after the last step the later counts."""
        pairs = self.trail.setdefault(name, [])
        if pairs and pairs[-1][0] == step:
            pairs.pop()
        pairs.append((step, value))
        self.values += 1
        self.bytes += 16

    @property
    def full(self) -> bool:
        return (
            self.bytes >= LARGEST_BATCH_BYTES
            or len(self.samples) >= LARGEST_BATCH_SAMPLES
            or self.values >= LARGEST_BATCH_VALUES
            or len(self.events) >= LARGEST_BATCH_EVENTS
        )

    @property
    def empty(self) -> bool:
        return not (self.samples or self.trail or self.events or self.end is not None)


def _arrived(round_: Round, *, wait: bool) -> bool:
    assert round_.slot is not None
    deadline = time.monotonic() + 5.0
    while not (arrived := round_.slot.arrived()) and wait and time.monotonic() < deadline:
        time.sleep(0.001)
    return arrived
