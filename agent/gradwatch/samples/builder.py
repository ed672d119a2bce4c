"""The composer: makes the statistics of a sample out of what was measured of a round."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradwatch import wire
from gradwatch.clipping.agc import AGC
from gradwatch.delivery.dropped import Dropped
from gradwatch.model.discovery import ParameterInfo
from gradwatch.norms.scalars import Scalar
from gradwatch.ranks.parts import JoinedStatistics, RankPart, join_parts, ownership, undo_norm_clip
from gradwatch.rounds import Acted, Clip, Reading, Round, Update
from gradwatch.samples.origin import origin_in_flags
from gradwatch.statistics import (
    UNIT_EPS,
    ByParameter,
    by_parameter,
    clip_coefficient,
    clipped_by_agc,
    histogram,
    norms,
)

MOST_RATES: Final = 16
"""Parameter groups up to which the learning rate of each is told."""
_JUMP: Final = 10.0
"""A global gradient norm this many times the usual one is a sign of trouble."""


class Composer:
    """Computes the statistics of samples from what was read.

    Args:
        dropped: source of the counts that each sample carries.
        agc: how the agent clips.
        rank: of this process.
    """

    def __init__(self, dropped: Dropped, agc: AGC | None, rank: int) -> None:
        self._dropped = dropped
        self._rank = rank
        self._ownership = ownership([], rank)
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

    def registered(self, watched: Sequence[ParameterInfo], depths: Sequence[int]) -> None:
        """There are these parameters, of these depths, from now on."""
        count = len(depths)
        self._ownership = ownership(watched, self._rank)
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
        if any(map(number, round_.found_infs)):
            round_.skip()  # a fused optimizer looks for itself
        if round_.skipped:
            self.skipped_steps += 1
            events.append(
                wire.Event(
                    step=round_.step, at=round_.at, kind="skipped_step", message="the loss scaler skipped this step"
                )
            )
        origin = origin_in_flags(round_.seen)
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
        # What was read before it was clipped stands over what was read then; of several, what was read first.
        before = [reading for reading in round_.readings if reading.before_clip]
        for reading in [*(reading for reading in round_.readings if not reading.before_clip), *reversed(before)]:
            self._enter(reading, vectors)
        for index in round_.empty:
            vectors.set_zero(index)
        for update in round_.updates:
            _enter_update(update, vectors)
        vectors.weight_norm = self._weight_norm.copy()
        return Draft(round_, vectors, self._histograms(round_.readings, round_.excluded))

    def finish(self, draft: "Draft", others: Sequence[RankPart]) -> wire.Sample:
        """Return the sample of a draft, of all ranks together where there are others."""
        round_, vectors = draft.round, draft.vectors
        if others:
            whole = join_parts(
                [self.part(draft), *others],
                self._ownership,
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

    def part(self, draft: "Draft") -> RankPart:
        """Return what this rank adds to a sample."""
        vectors, mine = draft.vectors, self._ownership.owned & (draft.vectors.grad_norm != wire.MISSING)
        units = vectors.units
        # What AGC did to a unit that lies on several ranks shows only when they are put together.
        after = np.where(
            self._ownership.whole_units & ~self._tensor_wise, vectors.clipped_grad_norm, vectors.found_norm
        )
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
        sums = np.vstack([np.where(mine, rows, 0.0), np.where(self._ownership.owned, weights, 0.0)])
        largest = np.where(mine, vectors.max_unit_ratio, wire.MISSING).astype(np.float64)
        return RankPart(sums, largest, [number(clip.total_norm) for clip in draft.round.clips])

    def _enter(self, reading: Reading, vectors: "_Vectors") -> None:
        plan = reading.norms.plan
        indices = np.array([plan.indices[position] for position in plan.measured], np.intp)
        weight_units = reading.norms.weight_units()
        if plan.grad_layout is None:
            self._weight_norm[indices] = norms(weight_units, plan.starts)
            return
        grad_units = reading.norms.grad_units()
        measured = by_parameter(grad_units, weight_units, plan.starts, self._eps)
        grad_norm, nonfinite = _repaired(measured, indices, reading)
        scale = 1.0 if reading.scale is None else number(reading.scale)
        vectors.units[indices] = plan.measured_units
        live = ~np.isin(indices, list(reading.void))
        places = indices[live]
        self._weight_norm[places] = measured.weight_norm[live]
        vectors.note_partial(reading.clips, places)
        with np.errstate(all="ignore"):
            now = grad_norm / scale
            factor = _coefficients(reading.clips, self._weight_norm.size)[indices]
            vectors.grad_norm[places] = (now / factor)[live]
            vectors.max_unit_ratio[places] = (measured.max_unit_ratio / scale / factor)[live]
            if not reading.before_clip:
                vectors.clipped_grad_norm[indices] = vectors.found_norm[indices] = now
        vectors.zero_unit_share[places] = measured.zero_unit_share[live]
        vectors.nonfinite_count[places] = nonfinite[live]
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

    def _histograms(self, readings: Sequence[Reading], excluded: Collection[int]) -> dict[str, list[float]]:
        """Return the histograms of the units' ratios that AGC sees, or would see, by thirds of the depth."""
        thirds = np.zeros((3, wire.HISTOGRAM_EDGES.size + 1))
        for reading in readings:
            plan = reading.norms.plan
            if plan.grad_layout is None or reading.before_clip:
                continue
            grad_units, weight_units = reading.norms.grad_units(), reading.norms.weight_units()
            if reading.scale is not None:
                with np.errstate(all="ignore"):
                    grad_units /= number(reading.scale)
            # One bin for each parameter and ratio at once; what is left alone goes to a fourth row.
            row = [
                3 if plan.indices[position] in excluded else self._third[plan.indices[position]]
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
        limit = _limit(round_, statistics["grad_norm"])
        if math.isfinite(limit):
            scalars["global_grad_norm_limit"] = limit
        scalars["skipped_steps"] = float(self.skipped_steps)
        scalars["agent_seconds"] = round_.agent_seconds
        scalars["dropped_samples"] = float(self._dropped.samples)
        scalars["dropped_bytes"] = float(self._dropped.bytes)
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
        self._partial: list[tuple[Clip, set[int]]] = []
        """Clippings of which only this rank's part of the norm is known, with the parameters to take them out of."""

    def note_partial(self, clips: Sequence[Acted], places: NDArray[np.intp]) -> None:
        """What is known of these parameters was read after these clippings, and no others."""
        entered = set(places.tolist())
        for _, scaled in self._partial:
            scaled -= entered
        self._partial += [(clip, entered & mine) for clip, mine in clips if clip.partial]

    def take(self, whole: JoinedStatistics) -> None:
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
        chosen = sorted(index for other, scaled in self._partial if other is clip for index in scaled)
        for vector in (self.grad_norm, self.max_unit_ratio):
            vector[chosen] = undo_norm_clip(vector[chosen].astype(np.float64), total, number(clip.max_norm))

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


def _repaired(
    measured: ByParameter, indices: NDArray[np.intp], reading: Reading
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return norms, and counts of non-finite elements where there are any: of units where these were not counted."""
    nonfinite = measured.nonfinite_units
    if reading.nonfinite:
        place = {int(index): position for position, index in enumerate(indices)}
        for index, count in reading.nonfinite.items():
            nonfinite[place[index]] = count
    return measured.grad_norm, nonfinite


def _coefficients(clips: Sequence[Acted], count: int) -> NDArray[np.float64]:
    """Return what each parameter's gradient was multiplied by before it was read, shape (parameters,)."""
    coefficients = np.ones(count)
    for clip, indices in clips:
        if clip.partial:
            continue
        coefficient = clip_coefficient(number(clip.total_norm), number(clip.max_norm))
        coefficients[np.fromiter(indices, np.intp, len(indices))] *= coefficient
        for index, times in clip.repeated.items():
            coefficients[index] *= coefficient ** (times - 1) if index in indices else 1.0
    return coefficients


def _limit(round_: Round, grad_norm: wire.Vector) -> float:
    """Return the limit that clipping set to the L2 norm of the whole gradient; infinite where it set none."""
    present = set(np.flatnonzero(grad_norm != wire.MISSING).tolist())
    scaled: defaultdict[int, set[int]] = defaultdict(set)
    for reading in round_.readings:
        for clip, indices in () if reading.before_clip else reading.clips:
            scaled[id(clip)] |= indices
    whole = (clip for clip in round_.clips if clip.norm_type == 2.0 and scaled[id(clip)] >= present)
    return min((limit for clip in whole if (limit := number(clip.max_norm)) > 0), default=math.inf)


def _enter_update(update: Update, vectors: _Vectors) -> None:
    units = update.units.detach().cpu().double().numpy()
    vectors.update_norm[list(update.indices)] = norms(units, update.starts)


def _rates(rates: Mapping[int, Scalar]) -> dict[str, float]:
    """Return the learning rate of each group; of many groups the first one's, the lowest and the highest."""
    told = {place: number(rate) for place, rate in sorted(rates.items())}
    if max(told, default=0) >= MOST_RATES:
        every = list(told.values())
        return {
            "learning_rate": every[0],
            "learning_rate.lowest": min(every),
            "learning_rate.highest": max(every),
        }
    return {f"learning_rate.{place}" if place else "learning_rate": rate for place, rate in told.items()}


def _total(vector: wire.Vector) -> float:
    present = vector[vector != wire.MISSING].astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.sum(present * present)))
