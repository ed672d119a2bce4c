"""The collector: turns what the training thread handed over into batches in the spool, on a thread of its own."""

import contextlib
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradwatch import wire
from gradwatch.agc import AGC
from gradwatch.buffers import Slots
from gradwatch.mirrors import Mirror
from gradwatch.model import LONGEST_NAME, Watched, shortened
from gradwatch.provenance import of_seen
from gradwatch.ranks import Joined, Part, Patience, Ranks, joined, shares, unclipped
from gradwatch.rounds import Clip, Ended, Message, Reading, Registered, Round, Scalar, Update
from gradwatch.spool import Losses, Spool
from gradwatch.statistics import (
    UNIT_EPS,
    ByParameter,
    by_parameter,
    clip_coefficient,
    clipped_by_agc,
    histogram,
    norms,
)

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
MOST_RATES: Final = 16
"""Parameter groups up to which the learning rate of each is told."""
LONGEST_QUEUE: Final = 20_000
"""Steps that may wait for the collector; more are counted as dropped."""
_BACKLOG: Final = 8
"""Documents in the spool from which batches grow, since the server is the slower side."""
_GROWN_BATCH_SECONDS: Final = 2.0
_LAST_PARTS_SECONDS: Final = 2.0
"""How long the parts of other ranks are waited for at the end."""
_JUMP: Final = 10.0
"""A global gradient norm this many times the usual one is a sign of trouble."""


class Collector:
    """Reads rounds, composes samples, writes batches.

    Args:
        spool: where batches go; None on a rank that leaves it to rank 0.
        slots: where read buffers are given back.
        losses: what had to be given up is counted here.
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
        slots: Slots,
        losses: Losses,
        template: wire.Registration,
        agc: AGC | None,
        ranks: Ranks | None,
        *,
        written: Callable[[], None],
        trouble: Callable[[bool], None],
        failed: Callable[[Exception], None],
        warn: Callable[[str], None],
    ) -> None:
        self._spool = spool
        self._slots = slots
        self._losses = losses
        self._template = template
        self._written = written
        self._trouble = trouble
        self._failed = failed
        self._warn = warn
        self._messages: deque[Message] = deque()
        self._wake = threading.Event()
        self._stop = False
        self._mirrors: tuple[Mirror, ...] = ()
        self._composer = Composer(losses, agc, 0 if ranks is None else ranks.rank)
        self._ranks = ranks
        self._drafts: deque[tuple[Draft, Patience]] = deque()
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
            self._losses.samples += message.sampled
            self._losses.values += len(message.logged) + bool(message.losses) + bool(message.clips)
            if message.slot is not None:
                self._slots.give_back(message.slot)
            return
        self._messages.append(message)
        if self._slots.scarce:
            self._wake.set()

    def add_mirror(self, mirror: Mirror) -> None:
        """Write the numbers of the whole run there, too."""
        self._mirrors = (*self._mirrors, mirror)

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
                for mirror in self._mirrors:
                    with contextlib.suppress(Exception):
                        mirror.close()
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
        if isinstance(message, Registered):
            self._flush(force=True)
            self._composer.registered(message.watched, message.depths)
            if self._spool is None:
                return
            described = [watched.described(message.depths[place]) for place, watched in enumerate(message.watched)]
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
                self._slots.give_back(message.slot)
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
            self._ranks.offer(message.step, self._composer.part(draft))
        else:
            self._drafts.append((draft, Patience()))

    def _allows(self, name: str) -> bool:
        """Return whether the server will take a number of this name; else count it and say so once."""
        if name in self._names or name in _OWN_NAMES:
            return True
        if len(self._names) < MOST_NAMES and len(name) <= LONGEST_NAME and _is_text(name):
            self._names.add(name)
            return True
        self._losses.values += 1
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
        deadline = time.monotonic() + _LAST_PARTS_SECONDS
        while self._drafts:
            draft, patience = self._drafts[0]
            # Asked first: what is missing although a later step is complete was not measured by another rank.
            passed = len(self._drafts) > 1 and self._ranks.is_passed(self._drafts[1][0].round.step)
            others = self._ranks.collect(draft.round.step)
            if others is not None:
                self._drafts.popleft()
                self._finish(draft, others)
            elif passed or patience.over or (wait and time.monotonic() > deadline):
                self._drafts.popleft()
            elif wait:
                time.sleep(0.01)
            else:
                return

    def _finish(self, draft: "Draft", others: Sequence[Part]) -> None:
        sample = self._composer.finish(draft, others)
        self._batch.samples.append(sample)
        self._batch.bytes += sum(4 * vector.size for vector in sample.statistics.values()) + 256
        self._batch.bytes += 32 * len(sample.scalars) + 9 * sum(map(len, sample.histograms.values()))
        if self._batch.full:
            self._flush(force=True)
        self._reflect(sample.step, {name: wire.number(value) for name, value in sample.scalars.items()})

    def _reflect(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers to the user's loggers; one that fails is left alone from then on."""
        for mirror in self._mirrors if scalars else ():
            try:
                mirror.write(step, scalars)
            except Exception as error:  # a logger that was closed, a disk that is full: not the agent's fault
                self._mirrors = tuple(other for other in self._mirrors if other is not mirror)
                self._warn(f"nothing more is mirrored to {type(mirror).__name__}: {type(error).__name__}: {error}")

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
                else msgspec.structs.replace(event, parameter=shortened(event.parameter))
                for event in batch.events
            ],
            dropped=self._losses.counted(),
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
        """Add a number that belongs to no sample."""
        self.trail.setdefault(name, []).append((step, value))
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


class Composer:
    """Computes the statistics of samples from what was read.

    Args:
        losses: source of the counts that each sample carries.
        agc: how the agent clips.
        rank: of this process.
    """

    def __init__(self, losses: Losses, agc: AGC | None, rank: int) -> None:
        self._losses = losses
        self._rank = rank
        self._shares = shares([], rank)
        self._agc = agc
        self._eps = UNIT_EPS if agc is None else agc.eps
        self._tensor_wise = agc is not None and agc.granularity == "tensor"
        self._third = np.zeros(0, np.intp)
        """Third of the depth in which each parameter lies, 0 to 2."""
        self._weight_norm = np.zeros(0, np.float32)
        self._usual_norm = 0.0
        self._was_finite = True
        self.skipped_steps = 0
        self.unclear = False
        """Whether everything was bad at once."""

    def registered(self, watched: Sequence[Watched], depths: Sequence[int]) -> None:
        """There are these parameters, of these depths, from now on."""
        count = len(depths)
        self._shares = shares(watched, self._rank)
        self._weight_norm = np.append(self._weight_norm, np.zeros(count - self._weight_norm.size, np.float32))
        self._third = 3 * np.asarray(depths, np.intp) // max(count, 1)

    def compose(self, round_: Round) -> tuple["Draft | None", dict[str, float], list[wire.Event]]:
        """Return what this rank measured in a round (None: nothing), its numbers of every step, and its events."""
        trail = {name: number(value) for name, value in round_.logged.items()}
        if round_.losses:
            trail.setdefault("loss", sum(map(number, round_.losses)))
        if round_.clips and not round_.clips[-1].partial:
            trail["clip_norm"] = number(round_.clips[-1].total_norm)
        events: list[wire.Event] = []
        if any(reading.found_inf is not None and number(reading.found_inf) for reading in round_.readings):
            round_.skip()  # a fused optimizer looks for itself
        if round_.skipped:
            self.skipped_steps += 1
            events.append(
                wire.Event(
                    step=round_.step, at=round_.at, kind="skipped_step", message="the loss scaler skipped this step"
                )
            )
        origin = of_seen(round_.seen)
        if origin is not None:
            events.append(origin.event(round_.step, round_.at))
        return self._draft(round_) if round_.readings else None, trail, events

    def trouble(self, trail: dict[str, float], events: Sequence[wire.Event], draft: "Draft | None") -> bool:
        """Return whether a round shows a sign of trouble."""
        troubled = bool(events) or not all(map(math.isfinite, trail.values()))
        self.unclear = not math.isfinite(trail.get("loss", 0.0))
        if draft is None:
            return troubled
        norm, count = _total(draft.vectors.grad_norm), draft.vectors.nonfinite_count
        self.unclear |= bool((count != wire.MISSING).any() and (count[count != wire.MISSING] > 0).all())
        finite = math.isfinite(norm)
        troubled |= self._was_finite and not finite
        self._was_finite = finite
        if finite:
            troubled |= 0 < self._usual_norm * _JUMP < norm
            self._usual_norm = norm if not self._usual_norm else 0.95 * self._usual_norm + 0.05 * norm
        return troubled

    def _draft(self, round_: Round) -> "Draft":
        vectors = _Vectors(self._weight_norm.size)
        for reading in sorted(round_.readings, key=lambda reading: reading.before_clip):
            clips = reading.earlier if reading.before_clip else round_.clips
            self._enter(reading, vectors, _coefficients(clips, self._weight_norm.size))
        for index in round_.empty:
            vectors.set_zero(index)
        for update in round_.updates:
            _enter_update(update, vectors)
        vectors.weight_norm = self._weight_norm.copy()
        return Draft(round_, vectors, self._histograms(round_.readings, round_.spared))

    def finish(self, draft: "Draft", others: Sequence[Part]) -> wire.Sample:
        """Return the sample of a draft, of all ranks together where there are others."""
        round_, vectors = draft.round, draft.vectors
        if others:
            whole = joined(
                [self.part(draft), *others],
                self._shares,
                self._eps,
                vectors.limits,
                tensor_wise=self._tensor_wise,
            )
            vectors.take(whole)
            for clip, total in zip(round_.clips, whole.totals, strict=True):
                if clip.partial:
                    vectors.undo(clip, total)
        statistics = vectors.statistics(
            clipped=bool(round_.clips) or round_.value_clipped or self._agc is not None,
            by_agc=self._agc is not None,
            updated=bool(round_.updates) and not others,
        )
        scalars = self._scalars(round_, statistics)
        if self._agc is not None:
            scalars["removed_grad_norm"] = _total(vectors.removed_norm)
        if others and round_.clips and round_.clips[-1].partial:
            scalars["clip_norm"] = whole.totals[-1]
        return wire.Sample(
            step=round_.step,
            at=round_.at,
            statistics=statistics,
            scalars={name: wire.spell(value) for name, value in scalars.items()},
            histograms=draft.histograms,
        )

    def part(self, draft: "Draft") -> Part:
        """Return what this rank adds to a sample."""
        vectors, mine = draft.vectors, self._shares.mine & (draft.vectors.grad_norm != wire.MISSING)
        units = vectors.units
        # What AGC did to a unit that lies on several ranks shows only when they are put together.
        after = np.where(self._shares.whole & ~self._tensor_wise, vectors.clipped_grad_norm, vectors.found_norm)
        with np.errstate(all="ignore"):
            rows = np.stack(
                [
                    vectors.zero_unit_share * units,
                    units,
                    vectors.nonfinite_count,
                    vectors.clipped_unit_share * units,
                    np.square(vectors.removed_norm, dtype=np.float64),
                    np.square(after, dtype=np.float64),
                    np.square(vectors.grad_norm, dtype=np.float64),
                ]
            )
            weights = np.square(vectors.weight_norm, dtype=np.float64)
        sums = np.vstack([np.where(mine, rows, 0.0), np.where(self._shares.mine, weights, 0.0)])
        largest = np.where(mine, vectors.max_unit_ratio, wire.MISSING).astype(np.float64)
        return Part(sums, largest, [number(clip.total_norm) for clip in draft.round.clips])

    def _enter(self, reading: Reading, vectors: "_Vectors", coefficients: NDArray[np.float64]) -> None:
        plan = reading.claim.plan
        indices = np.array([plan.indices[position] for position in plan.measured], np.intp)
        weight_units = reading.claim.weight_units()
        if plan.grads is None:
            self._weight_norm[indices] = norms(weight_units, plan.starts)
            return
        grad_units = reading.claim.grad_units()
        measured = by_parameter(grad_units, weight_units, plan.starts, self._eps)
        grad_norm, nonfinite = _repaired(measured, indices, reading)
        scale = 1.0 if reading.scale is None else number(reading.scale)
        vectors.units[indices] = plan.measured_units
        with np.errstate(all="ignore"):
            now = grad_norm / scale
            factor = coefficients[indices]
            vectors.grad_norm[indices] = now / factor
            vectors.max_unit_ratio[indices] = measured.max_unit_ratio / scale / factor
            if not reading.before_clip:
                vectors.clipped_grad_norm[indices] = vectors.found_norm[indices] = now
        vectors.zero_unit_share[indices] = measured.zero_unit_share
        vectors.nonfinite_count[indices] = nonfinite
        self._weight_norm[indices] = measured.weight_norm
        if self._agc is not None and reading.limits is not None:
            vectors.limits[plan.indices] = reading.limits
            by_agc = clipped_by_agc(
                grad_units / scale,
                weight_units,
                plan.starts,
                reading.limits[plan.measured],
                self._eps,
                whole=self._tensor_wise,
            )
            vectors.clipped_unit_share[indices] = by_agc.unit_share
            vectors.clipped_grad_norm[indices] = np.where(by_agc.unit_share > 0, by_agc.grad_norm, now)
            vectors.removed_norm[indices] = by_agc.removed_norm

    def _histograms(self, readings: Sequence[Reading], spared: Collection[int]) -> dict[str, list[float]]:
        """Return the histograms of the units' ratios that AGC sees, or would see, by thirds of the depth."""
        thirds = np.zeros((3, wire.HISTOGRAM_EDGES.size + 1))
        for reading in readings:
            plan = reading.claim.plan
            if plan.grads is None or reading.before_clip:
                continue
            grad_units, weight_units = reading.claim.grad_units(), reading.claim.weight_units()
            if reading.scale is not None:
                with np.errstate(all="ignore"):
                    grad_units /= number(reading.scale)
            # One bin for each parameter and ratio at once; what is left alone goes to a fourth row.
            row = [
                3 if plan.indices[position] in spared else self._third[plan.indices[position]]
                for position in plan.measured
            ]
            thirds += histogram(grad_units, weight_units, self._eps, np.repeat(row, plan.measured_units))[:3]
        if not thirds.any():
            return {}
        return {name: counts.tolist() for name, counts in zip(wire.HISTOGRAMS, thirds, strict=True)}

    def _scalars(self, round_: Round, statistics: dict[wire.Statistic, wire.Vector]) -> dict[str, float]:
        scalars = {name: number(value) for name, value in round_.scalars.items()} | _rates(round_.rates)
        scalars["global_grad_norm"] = _total(statistics["grad_norm"])
        if "clipped_grad_norm" in statistics:
            scalars["clipped_global_grad_norm"] = _total(statistics["clipped_grad_norm"])
        limit = _limit(round_.clips, statistics["grad_norm"])
        if math.isfinite(limit):
            scalars["global_grad_norm_limit"] = limit
        scalars["skipped_steps"] = float(self.skipped_steps)
        scalars["agent_seconds"] = round_.agent_seconds
        scalars["dropped_samples"] = float(self._losses.samples)
        scalars["dropped_bytes"] = float(self._losses.bytes)
        return scalars


@dataclass(slots=True)
class Draft:
    """A sample of which this rank has done its part."""

    round: Round
    vectors: "_Vectors"
    histograms: dict[str, list[float]]


class _Vectors:
    """The statistics of one sample while they are filled in, each of shape (parameters,)."""

    def __init__(self, count: int) -> None:
        (
            self.grad_norm,
            self.clipped_grad_norm,
            self.max_unit_ratio,
            self.zero_unit_share,
            self.nonfinite_count,
            self.clipped_unit_share,
            self.removed_norm,
            self.update_norm,
            self.found_norm,
        ) = (np.full(count, wire.MISSING, np.float32) for _ in range(9))
        self.weight_norm = np.zeros(count, np.float32)
        self.units = np.zeros(count)
        self.limits = np.full(count, np.inf)
        """Largest ratio that AGC let through."""

    def take(self, whole: Joined) -> None:
        """Take the statistics of the whole parameters for those of this rank's part."""
        self.grad_norm = whole.grad_norm.astype(np.float32)
        self.clipped_grad_norm = whole.clipped_grad_norm.astype(np.float32)
        self.weight_norm = whole.weight_norm.astype(np.float32)
        self.max_unit_ratio = whole.max_unit_ratio.astype(np.float32)
        self.zero_unit_share = whole.zero_unit_share.astype(np.float32)
        self.nonfinite_count = whole.nonfinite_count.astype(np.float32)
        self.clipped_unit_share = whole.clipped_unit_share.astype(np.float32)
        self.removed_norm = whole.removed_norm.astype(np.float32)

    def undo(self, clip: Clip, total: float) -> None:
        """Take a clipping by norm out of what was measured after it."""
        chosen = sorted(clip.indices)
        for vector in (self.grad_norm, self.max_unit_ratio):
            vector[chosen] = unclipped(vector[chosen].astype(np.float64), total, number(clip.max_norm))

    def set_zero(self, index: int) -> None:
        for vector in (
            self.grad_norm,
            self.clipped_grad_norm,
            self.max_unit_ratio,
            self.zero_unit_share,
            self.nonfinite_count,
            self.clipped_unit_share,
            self.removed_norm,
            self.found_norm,
        ):
            vector[index] = 0.0

    def statistics(self, *, clipped: bool, by_agc: bool, updated: bool) -> dict[wire.Statistic, wire.Vector]:
        statistics: dict[wire.Statistic, wire.Vector] = {
            "grad_norm": self.grad_norm,
            "weight_norm": self.weight_norm,
            "max_unit_ratio": self.max_unit_ratio,
            "zero_unit_share": self.zero_unit_share,
            "nonfinite_count": self.nonfinite_count,
        }
        if clipped:
            statistics["clipped_grad_norm"] = self.clipped_grad_norm
        if by_agc:
            statistics["clipped_unit_share"] = self.clipped_unit_share
        if updated:
            statistics["update_norm"] = self.update_norm
        return statistics


def number(value: Scalar) -> float:
    """Return a scalar as a float; one on a device is waited for, in this thread only."""
    return float(value.detach().cpu().reshape(())) if isinstance(value, Tensor) else float(value)


def _arrived(round_: Round, *, wait: bool) -> bool:
    assert round_.slot is not None
    deadline = time.monotonic() + 5.0
    while not (arrived := round_.slot.arrived()) and wait and time.monotonic() < deadline:
        time.sleep(0.001)
    return arrived


def _repaired(
    measured: ByParameter, indices: NDArray[np.intp], reading: Reading
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return norms and counts of non-finite elements, with what unit norms could not say put right."""
    grad_norm, nonfinite = measured.grad_norm, measured.nonfinite_units
    if not reading.repairs:
        return grad_norm, nonfinite
    place = {int(index): position for position, index in enumerate(indices)}
    for index, repair in reading.repairs.items():
        nonfinite[place[index]] = count = number(repair.nonfinite)
        if repair.norm is not None and not count:
            grad_norm[place[index]] = number(repair.norm)
    return grad_norm, nonfinite


def _coefficients(clips: Sequence[Clip], count: int) -> NDArray[np.float64]:
    """Return what each parameter's gradient was multiplied by before the step, shape (parameters,)."""
    coefficients = np.ones(count)
    for clip in clips:
        if clip.partial:
            continue
        coefficient = clip_coefficient(number(clip.total_norm), number(clip.max_norm))
        coefficients[np.fromiter(clip.indices, np.intp, len(clip.indices))] *= coefficient
    return coefficients


def _limit(clips: Sequence[Clip], grad_norm: wire.Vector) -> float:
    """Return the limit that clipping set to the L2 norm of the whole gradient; infinite where it set none."""
    present = set(np.flatnonzero(grad_norm != wire.MISSING).tolist())
    whole = (clip for clip in clips if clip.norm_type == 2.0 and clip.indices >= present)
    return min((limit for clip in whole if (limit := number(clip.max_norm)) > 0), default=math.inf)


def _enter_update(update: Update, vectors: _Vectors) -> None:
    units = update.units.detach().cpu().double().numpy()
    vectors.update_norm[list(update.indices)] = norms(units, update.starts)


def _rates(rates: Sequence[Scalar]) -> dict[str, float]:
    """Return the learning rate of each group; of many groups the first one's, the lowest and the highest."""
    told = list(map(number, rates))
    if len(told) > MOST_RATES:
        return {
            "learning_rate": told[0],
            "learning_rate.lowest": min(told),
            "learning_rate.highest": max(told),
        }
    return {f"learning_rate.{place}" if place else "learning_rate": rate for place, rate in enumerate(told)}


def _is_text(name: str) -> bool:
    """Return whether a database keeps it."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in name)


def _total(vector: wire.Vector) -> float:
    present = vector[vector != wire.MISSING].astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.sum(present * present)))
