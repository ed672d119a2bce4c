"""The collector: a thread that turns the records of the training thread into batches in the spool.

The training thread only puts messages into a queue. Everything that takes time happens here: waiting for numbers from
the device, building samples, joining ranks, encoding, writing to disk, writing to the user's loggers.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from gradwatch import wire
from gradwatch.clipping.agc import AGC
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.processor_time import ProcessorTime, samples_share
from gradwatch.delivery.spool import Spool
from gradwatch.norms.buffers import BufferPool
from gradwatch.ranks.exchange import RankExchange
from gradwatch.ranks.holdings import RegisteredParameters
from gradwatch.ranks.parts import JoinedStatistics
from gradwatch.samples.batch import Batch, ScalarNames, StepNumbers
from gradwatch.samples.builder import Draft, SampleBuilder
from gradwatch.samples.joining import JoiningCallbacks, joining_for
from gradwatch.samples.loggers import ScalarLogger, UserLoggers
from gradwatch.steps.state import StepRecord

WRITE_SECONDS: Final = 0.8
"""Time after which everything that waits is written: after a kill no more than the last second is missing."""
_COPY_SECONDS: Final = 0.1  # pause while a copy from a device is waited for

LONGEST_QUEUE: Final = 20_000
"""Steps that may wait for the collector; further ones are dropped and counted."""
_MOST_NUMBERS: Final = 4096  # steps without a record that are one message
_BACKLOG: Final = 8
"""Documents in the spool from which on batches grow: the server is slower than the training then."""
_GROWN_BATCH_SECONDS: Final = 2.0  # age at which a batch is written all the same
_LAST_COPIES_SECONDS: Final = 5.0
"""Longest wait for all copies from the devices when the run ends."""
_FAILED_DEVICE_SECONDS: Final = 0.2  # what a device that has failed has not copied yet will not come


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of the attempt; the last message."""

    end: wire.End | None
    """None: the launcher ends the run."""


Message = StepRecord | StepNumbers | RegisteredParameters | Ended | wire.Event
"""Messages from the training thread: numbers that may still be on the device, with nothing computed yet."""


class Collector:
    """Builds samples on a thread of its own and writes them to the spool in batches.

    Args:
        spool: takes the batches; None on a rank that leaves them to rank 0.
        pool: takes back the buffers of samples that were read.
        dropped: counts steps that are dropped because too many wait.
        template: the registration without its parameters.
        agc: how the agent clips; None: it does not.
        ranks: exchange with the other ranks; None where this rank measures alone.
        written: called after each write to the spool.
        trouble: called at a sign of trouble (a non-finite number, a jump of the gradient norm) with True if everything
            is non-finite at once, so that nothing shows where it began.
        failed: called with an exception of this thread.
        not_measured: called with the reason why something of the other ranks is not measured.
        needless: called on another rank if nothing of it is needed, on rank 0 if nothing of the others is.
        agreed: called with the first step of a burst of samples that all ranks take.
        warn: called with a warning for the user.
    """

    def __init__(
        self,
        spool: Spool | None,
        pool: BufferPool,
        dropped: Dropped,
        template: wire.Registration,
        agc: AGC | None,
        ranks: RankExchange | None,
        *,
        written: Callable[[], None],
        trouble: Callable[[bool], None],
        failed: Callable[[Exception], None],
        not_measured: Callable[[str], None],
        needless: Callable[[], None],
        agreed: Callable[[int], None],
        warn: Callable[[str], None],
    ) -> None:
        self._spool = spool
        self._pool = pool
        self._dropped = dropped
        self._template = template
        self._written = written
        self._trouble = trouble
        self._failed = failed
        self._warn = warn
        self._ranks = ranks
        self._messages: deque[Message] = deque()
        self._numbers: StepNumbers | None = None
        """The last message, if it takes the numbers of further steps."""
        self._earlier = StepNumbers()
        """The last numbers that were taken out of the queue: one more may just have been appended to them."""
        self._wake = threading.Event()
        self._stop = False
        self._given_up = False
        self._loggers = UserLoggers(warn)
        self._builder = SampleBuilder(dropped, agc)
        callbacks = JoiningCallbacks(
            registered=self._register_run,
            finished=self._finish_sample,
            loss=self._add_loss,
            not_measured=not_measured,
            needless=needless,
            agreed=agreed,
        )
        self._joining = None if ranks is None else joining_for(ranks, self._builder, callbacks)
        """None where this rank measures alone."""
        self._registered = False
        """Whether batches may be written: a server takes none of a run that it does not know."""
        self._batch = Batch()
        self._names = ScalarNames()
        self._waits_for_device = False
        self._last_copies = 0.0
        """Monotonic time until which copies from the devices are waited for when the run ends."""
        self.time = ProcessorTime()
        self._thread = threading.Thread(target=self._work, name="gradwatch-collector", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, message: Message) -> None:
        """Queue a message from the training thread, without waiting; a step is dropped if too many wait."""
        if len(self._messages) >= LONGEST_QUEUE and isinstance(message, StepRecord):
            self._drop(message)
            return
        self._numbers = None
        self._messages.append(message)
        if not isinstance(message, StepRecord) or message.urgent:
            self._wake.set()
        if isinstance(message, StepRecord) and message.buffers is not None and self._pool.is_scarce:
            self._wake.set()

    def add_numbers(self, step: int, loss: float | None, clip_norm: float | None) -> None:
        """Queue the numbers of a step without a record, without waiting; only the thread that trains may call this."""
        numbers = self._numbers
        if numbers is None or len(numbers.steps) >= _MOST_NUMBERS:
            if len(self._messages) >= LONGEST_QUEUE:
                self._dropped.values += (loss is not None) + (clip_norm is not None)
                return
            if numbers is not None:
                self._wake.set()
            numbers = StepNumbers()
            self._messages.append(numbers)
            self._numbers = numbers
        numbers.clip_norms.append(clip_norm)
        numbers.losses.append(loss)
        numbers.steps.append(step)  # last: the collector takes as many as there are steps

    def _drop(self, record: StepRecord) -> None:
        """Count a step as dropped. A device may still write to its buffers: they are used again only if it did."""
        self._dropped.samples += record.sampled
        self._dropped.values += len(record.logged) + bool(record.losses) + bool(record.clips)
        if record.buffers is not None:
            (self._pool.release if record.buffers.arrived() else self._pool.abandon)(record.buffers)

    def ask_burst(self, step: int) -> None:
        """Have all ranks sample from a step on, without waiting; any thread may call this."""
        if self._joining is not None:
            self._joining.bursts.ask(step)
            self._wake.set()

    def add_logger(self, logger: ScalarLogger) -> None:
        """Write the run-level scalars to this logger, too."""
        self._loggers.add(logger)

    def finish(self, end: wire.End | None, timeout_seconds: float, *, device_failed: bool) -> None:
        """Write everything that waits, and ``end``, to the spool; stop the thread and wait for it.

        Args:
            end: the end of the attempt.
            timeout_seconds: longest wait.
            device_failed: whether a device has failed, so that what it has not copied yet will not come.
        """
        self._messages.append(Ended(end))
        copies_seconds = _FAILED_DEVICE_SECONDS if device_failed else _LAST_COPIES_SECONDS
        self._last_copies = time.monotonic() + min(copies_seconds, timeout_seconds / 2)
        self._stop = True
        self._wake.set()
        self.join(timeout_seconds)

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait until everything is written, or until the time is over."""
        self._thread.join(timeout_seconds)

    @property
    def is_running(self) -> bool:
        """Whether the thread has not written everything yet."""
        return self._thread.is_alive()

    def give_up(self, timeout_seconds: float) -> None:
        """Stop the thread, whatever still waits, and wait until it calls PyTorch no more."""
        self._given_up = self._stop = True
        if self._ranks is not None:
            self._ranks.given_up = True
        self._wake.set()
        self.join(timeout_seconds)
        left = sum(isinstance(message, StepRecord) for message in self._messages)
        if left and timeout_seconds:
            self._warn(f"the program ends before the last {left:,} steps with samples or events are written")

    def _work(self) -> None:
        while True:
            stopping = self._stop
            try:
                self._process_messages(wait=stopping)
                if self._joining is not None:
                    self._joining.poll(wait=stopping)
                self._write_batch(force=stopping)
            except Exception as error:
                self._failed(error)
            self.time.book()
            if stopping:
                self._loggers.close()
                return
            ranks_seconds = math.inf if self._joining is None else self._joining.poll_seconds
            waits = min(ranks_seconds, _COPY_SECONDS if self._waits_for_device else WRITE_SECONDS)
            while not self._wake.wait(waits) and self._is_idle and ranks_seconds == math.inf:
                pass
            self._wake.clear()

    @property
    def _is_idle(self) -> bool:
        numbers = self._messages[-1] if self._messages else None
        nothing_new = numbers is None or (
            len(self._messages) == 1 and isinstance(numbers, StepNumbers) and numbers.read == len(numbers.steps)
        )
        return nothing_new and self._batch.is_empty

    def _process_messages(self, *, wait: bool) -> None:
        """Process the queue up to the first step whose numbers have not arrived from the device.

        With ``wait`` give the copies some seconds; then drop what has not arrived. A step whose numbers cannot arrive
        is dropped in any case.
        """
        self._waits_for_device = False
        self._take_numbers(self._earlier)
        while self._messages and not self._given_up:
            message = self._messages[0]
            if isinstance(message, StepNumbers) and len(self._messages) == 1:
                self._take_numbers(message)  # it stays: more may come
                return
            if isinstance(message, StepRecord) and message.buffers is not None and not message.buffers.arrived():
                if not message.buffers.is_lost and not wait:
                    self._waits_for_device = True
                    return
                if wait and time.monotonic() < self._last_copies:
                    time.sleep(0.001)
                else:
                    self._drop(message)
                    self._messages.popleft()
                continue
            self._messages.popleft()
            self._process(message)
            if (full := self._batch.is_full) or self._batch.age_seconds > WRITE_SECONDS:
                self._write_batch(force=full)
        if self._messages and isinstance(last := self._messages[-1], Ended):  # it was given up before it came to it
            self._batch.end = last.end

    def _process(self, message: Message) -> None:
        if isinstance(message, RegisteredParameters):
            unreadable = [index for index, info in enumerate(message.watched) if info.unreadable]
            names = [info.name for info in message.watched]
            self._builder.register(names, message.depths, message.held, unreadable)
            if self._joining is None:
                self._register_run(message.described())
            else:
                self._joining.register(message)
        elif isinstance(message, wire.Event):
            self._batch.events.append(message)
        elif isinstance(message, StepNumbers):
            self._take_numbers(message)
            self._earlier = message
        elif isinstance(message, Ended):
            self._batch.end = message.end
        else:
            self._process_step(message)

    def _register_run(self, parameters: Sequence[wire.Parameter]) -> None:
        if self._spool is None:
            return
        if self._registered:
            self._write_batch(force=True)
        self._registered = True
        registration = msgspec.structs.replace(self._template, parameters=list(parameters))
        self._spool.append("registration", wire.encode(registration))
        self._written()

    def _take_numbers(self, numbers: StepNumbers) -> None:
        """Put the numbers that are new into the batch; they are finite, and show no sign of trouble."""
        first, last = numbers.read, len(numbers.steps)
        if first == last:
            return
        numbers.read = last
        steps = numbers.steps[first:last]
        if self._joining is not None:
            for step, loss in zip(steps, numbers.losses[first:last], strict=True):
                self._joining.take(step, loss, None)
        if self._spool is None:
            return
        for name, values in ("loss", numbers.losses[first:last]), ("clip_norm", numbers.clip_norms[first:last]):
            known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
            if known:
                self._batch_for(name).add_values(name, known)
            for step, value in known if self._loggers else ():
                self._loggers.write(step, {name: value})

    def _process_step(self, record: StepRecord) -> None:
        # 1. Read the numbers, and give the buffers back.
        if record.measurements:
            self.time.book()
        try:
            draft, trail, events = self._builder.draft(record)
        finally:
            if record.buffers is not None:
                self._pool.release(record.buffers)
        # 2. The numbers and events of every step go into the batch.
        if self._spool is not None:
            for name, value in trail.items():
                if self._accepts(name):
                    self._batch_for(name).add_value(record.step, name, value)
            self._batch.events.extend(events)
            self._loggers.write(record.step, trail)
        # 3. Trouble makes the agent sample more often.
        if self._builder.shows_trouble(trail, events, draft):
            self._trouble(self._builder.all_nonfinite)
        # 4. A sampled step becomes a sample, on rank 0 once the other ranks have published their parts.
        if self._joining is not None:
            self._joining.take(record.step, trail.get("loss"), draft)
        elif draft is not None:
            self._finish_sample(draft, None)
        if draft is not None:
            self.time.book_samples("build", 1)

    def _accepts(self, name: str) -> bool:
        """Return whether the server takes a scalar of this name; count it as dropped, and warn once, if not."""
        if self._names.accept(name):
            return True
        self._dropped.values += 1
        if warning := self._names.warning(name):
            self._warn(warning)
        return False

    def _batch_for(self, name: str) -> Batch:
        """Return the batch that takes a scalar of this name: a new one if the current one has too many names."""
        if not self._batch.takes(name):
            self._write_batch(force=True)
        return self._batch

    def _finish_sample(self, draft: Draft, joined: JoinedStatistics | None) -> None:
        sample = self._builder.finish(draft, joined)
        if joined is not None:
            self.time.book_samples("join", 1)
        self._batch.add_sample(sample)
        if self._batch.is_full:
            self._write_batch(force=True)
        self._loggers.write(sample.step, {name: wire.deserialise(value) for name, value in sample.scalars.items()})

    def _add_loss(self, step: int, value: float) -> None:
        """Add the loss of a step that another rank has."""
        self._batch.add_value(step, "loss", value)
        self._loggers.write(step, {"loss": value})

    def _write_batch(self, *, force: bool) -> None:
        """Write the batch to the spool; while the server is slow let it grow for a while, unless forced."""
        batch = self._batch
        if batch.is_empty or self._spool is None or not (self._registered or self._stop):
            return
        is_behind = self._spool.pending > _BACKLOG
        if not force and is_behind and batch.age_seconds < _GROWN_BATCH_SECONDS:
            return
        self._batch = Batch()
        self.time.book()
        dropped = msgspec.convert(self._dropped, wire.Dropped, from_attributes=True)
        body = wire.encode(batch.to_wire(self._template.attempt, dropped))
        self._spool.append("batch", body, len(batch.samples))
        self.time.book_samples("write", len(batch.samples), samples_share(len(batch.samples), len(body)))
        self._written()
