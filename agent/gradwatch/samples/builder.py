"""The sample builder: computes the statistics and scalars of a sample from the unit norms that one step recorded.

It runs on the collector's thread, once all numbers of the step have arrived on the host.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch.clipping.agc import AGC
from gradwatch.delivery.dropped import Dropped
from gradwatch.norms.buffers import UnitNorms
from gradwatch.ranks.holdings import Holding
from gradwatch.ranks.parts import JoinedStatistics, RankPart, join_parts
from gradwatch.ranks.whole_model import WholeModel
from gradwatch.recording.recorder import read_numbers
from gradwatch.samples.origin import NonfiniteSteps, origin_in_flags
from gradwatch.samples.vectors import Vectors, agree, total_norm
from gradwatch.statistics import (
    JOINED,
    MEASURED,
    MISSING,
    RATIO_EPS,
    Source,
    Units,
    agc_factors,
    clip_coefficient,
    measured_from,
    ratio_histogram,
)
from gradwatch.steps.state import Measurement, ScaledBy, StepRecord, WeightUpdate

MOST_RATES: Final = 16
"""Parameter groups up to which each has a learning rate of its own among the scalars."""
_JUMP: Final = 10.0
"""A global gradient norm this many times the usual one is a sign of trouble."""

_Floats = NDArray[np.float64]
_Indices = NDArray[np.intp]


class SampleBuilder:
    """Builds the samples of one run on one rank.

    Args:
        dropped: counts that each sample carries.
        agc: how the agent clips; None: it does not.
    """

    def __init__(self, dropped: Dropped, agc: AGC | None) -> None:
        self._dropped = dropped
        self._whole_units = np.zeros(0, np.bool_)
        """Whether each unit of a parameter lies on this rank; empty where it measures alone."""
        self._agc = agc
        self._eps = RATIO_EPS if agc is None else agc.eps
        self._tensor_wise = agc is not None and agc.granularity == "tensor"
        self._third = np.zeros(0, np.intp)
        """Third of the depth in which each parameter lies, 0 to 2."""
        self._weights = {row.name: np.zeros(0, np.float32) for row in measured_from("weight")}
        """Statistics of the weights, as they were measured last: weights at rest are not measured in every sample."""
        self._unreadable: list[int] = []
        """Indices of the parameters that cannot be measured."""
        self._usual_norm = 0.0
        self._was_finite = True
        self._nonfinite = NonfiniteSteps()
        self._skipped_steps = 0
        self.all_nonfinite = False
        """Whether everything in the last step was non-finite at once, so that nothing shows where it began."""

    def register(
        self,
        names: Sequence[str],
        depths: Sequence[int],
        held: Sequence[Holding] | None,
        unreadable: Sequence[int] = (),
    ) -> None:
        """Take the parameters' names and depths, what this rank holds of them, and which cannot be measured."""
        count = len(depths)
        self._nonfinite.names = names
        self._whole_units = np.array([not holding.split for holding in held or ()], np.bool_)
        self._unreadable = list(unreadable)
        for name, known in self._weights.items():
            self._weights[name] = np.append(known, np.zeros(count - known.size, np.float32))
        self._third = 3 * np.asarray(depths, np.intp) // max(count, 1)

    def draft(self, record: StepRecord) -> tuple["Draft | None", dict[str, float], list[wire.Event]]:
        """Return the sample of a step without the other ranks' parts (None: not sampled), its trail and its events."""
        read_numbers(record)
        trail = dict(record.logged)
        if record.losses:
            trail.setdefault("loss", sum(record.losses))
        if record.clips and not record.clips[-1].partial:
            trail["clip_norm"] = record.clips[-1].total_norm
        events: list[wire.Event] = []
        if any(record.found_infs):
            record.skip()  # a fused optimizer skips the step by itself
        if record.skipped:
            self._skipped_steps += 1
            text = "the loss scaler skipped this step"
            events.append(wire.Event(step=record.step, at=record.at, kind="skipped_step", message=text))
        origin = origin_in_flags(record.seen)
        if origin is not None:
            events.append(origin.event(record.step, record.at))
        draft = self._draft(record) if record.measurements else None
        counts = None if draft is None else draft.vectors["nonfinite_count"]
        found = self._nonfinite.look(record, trail, counts)
        if found is not None and origin is None:
            events.append(found)
        return draft, trail, events

    def shows_trouble(self, trail: Mapping[str, float], events: Sequence[wire.Event], draft: "Draft | None") -> bool:
        """Return whether a step shows a sign of trouble: a non-finite number, an event, a jump of the gradient norm."""
        troubled = bool(events) or not all(map(math.isfinite, trail.values()))
        self.all_nonfinite = not math.isfinite(trail.get("loss", 0.0))
        if draft is None:
            return troubled
        norm, count = total_norm(draft.vectors["grad_norm"]), draft.vectors["nonfinite_count"]
        measured = count[count != MISSING]
        self.all_nonfinite |= bool(measured.size and (measured > 0).all())
        finite = math.isfinite(norm)
        troubled |= self._was_finite and not finite
        self._was_finite = finite
        if finite:
            troubled |= 0 < self._usual_norm * _JUMP < norm
            self._usual_norm = norm if not self._usual_norm else 0.95 * self._usual_norm + 0.05 * norm
        return troubled

    def part(self, draft: "Draft") -> RankPart:
        """Return this rank's part of a sample, for rank 0."""
        vectors = draft.vectors
        has_gradient = vectors["grad_norm"] != MISSING
        # What AGC did to a unit that lies on several ranks shows only when the parts are joined.
        knows_clipped = self._whole_units[: has_gradient.size] & ~self._tensor_wise
        clipped = np.where(knows_clipped, vectors["clipped_grad_norm"], vectors.norm_before_agc)
        rows = []
        with np.errstate(all="ignore"):
            for statistic in JOINED:
                values = clipped if statistic.name == "clipped_grad_norm" else vectors[statistic.name]
                part = statistic.reduction.to_part(values.astype(np.float64), vectors.units)
                measured = values != MISSING if statistic.source == "weight" else has_gradient
                rows.append(np.where(measured, part, statistic.reduction.absent))
        units = np.where(has_gradient, vectors.units, MISSING)
        return RankPart(units, np.stack(rows), vectors.limits, vectors.clip_parts(draft.record.clips))

    def join(self, parts: Mapping[int, RankPart], whole: WholeModel) -> JoinedStatistics:
        """Return the statistics of the whole parameters from the parts of all ranks that report."""
        return join_parts(parts, whole, self._eps, tensor_wise=self._tensor_wise)

    def finish(self, draft: "Draft", joined: JoinedStatistics | None) -> wire.Sample:
        """Return the sample of a draft, with the statistics of the whole model where other ranks hold parts of it."""
        record, vectors = draft.record, draft.vectors
        if joined is not None:
            vectors.replace(joined.values)
        vectors.clip_late(record.clipped_late, record.value_clipped_late)
        sources: set[Source] = {"gradient", "weight"}
        if record.clips or record.value_clipped or self._agc is not None:
            sources.add("clipping")
        if self._agc is not None:
            sources.add("agc")
        if joined is None and (vectors["update_norm"] != MISSING).any():
            sources.add("update")
        statistics = vectors.statistics(sources)
        scalars = self._scalars(record, statistics)
        if self._agc is not None:
            scalars["removed_grad_norm"] = total_norm(vectors["removed_norm"])
        if joined is not None and record.clips and record.clips[-1].partial:
            scalars["clip_norm"] = [clip for clip in joined.clips if clip.ranks == record.clips[-1].ranks][-1].total
        unstepped = sorted(record.unstepped - set(np.flatnonzero(statistics["grad_norm"] != MISSING).tolist()))
        return wire.Sample(
            step=record.step,
            at=record.at,
            statistics=statistics,
            scalars={name: wire.serialise(value) for name, value in scalars.items()},
            histograms=draft.histograms,
            unstepped=unstepped if unstepped and joined is None else msgspec.UNSET,
        )

    def _draft(self, record: StepRecord) -> "Draft":
        vectors = Vectors(self._third.size)
        # What was measured before clipping is written over what was measured after it; of several, the first counts.
        before = [measurement for measurement in record.measurements if measurement.before_clip]
        after = [measurement for measurement in record.measurements if not measurement.before_clip]
        for measurement in [*after, *reversed(before)]:
            self._add_measurement(measurement, vectors)
        for index in record.empty:
            vectors.set_zero(index)
        for update in record.updates:
            _add_update(update, vectors)
        self._note_unmoved(record, vectors)
        for name, known in self._weights.items():
            vectors[name] = known.copy()
            vectors[name][self._unreadable] = MISSING
        return Draft(record, vectors, self._histograms(record.measurements, record.excluded))

    def _note_unmoved(self, record: StepRecord, vectors: Vectors) -> None:
        """Note a change of 0 for parameters that an optimizer holds, and left alone for want of a gradient.

        It tells them apart from those that no optimizer holds, such as a target network.
        """
        held = np.zeros(self._third.size, np.bool_)
        for indices in record.stepped.values():
            held[list(indices)] = True
        vectors["update_norm"][held & (vectors["grad_norm"] == MISSING)] = 0.0

    def _add_measurement(self, measurement: Measurement, vectors: Vectors) -> None:
        """Write the statistics of one measurement into the vectors of the sample."""
        plan = measurement.norms.plan
        indices = np.array([plan.indices[position] for position in plan.measured], np.intp)
        units = _units(measurement.norms, self._eps)
        measured = indices if plan.grad_layout is None else indices[~np.isin(indices, list(measurement.void))]
        live = np.isin(indices, measured)
        for row in measured_from("weight"):
            self._weights[row.name][measured] = row.measure(units, plan.starts)[live]
        if plan.grad_layout is None:
            return
        vectors.units[indices] = plan.measured_units
        told = measured if not measurement.changed else measured[~np.isin(measured, list(measurement.changed))]
        vectors.note_partial(measurement.clips, told)
        scale = 1.0 if measurement.scale is None else measurement.scale
        factor = _clip_coefficients(measurement.clips, self._third.size)[indices]
        with np.errstate(all="ignore"):
            values = {row.name: row.measure(units, plan.starts) for row in measured_from("gradient")}
            if measurement.compared is not None:
                specs = [plan.grad_layout.specs[position] for position in plan.measured]
                at_step = np.where(live, vectors["grad_norm"][indices], MISSING)
                if (same := agree(values["grad_norm"] / scale / factor, at_step, specs)) is not None:
                    measurement.compared(same)
            for row in measured_from("gradient"):
                if row.before_clipping:
                    vectors[row.name][told] = (values[row.name] / scale / factor)[np.isin(indices, told)]
                else:
                    vectors[row.name][measured] = values[row.name][live]
            for index, count in measurement.nonfinite.items():  # exact counts of elements, where there are any
                if index not in measurement.void:
                    vectors["nonfinite_count"][index] = count
            if not measurement.before_clip:
                vectors["clipped_grad_norm"][indices] = values["grad_norm"] / scale
                vectors.norm_before_agc[indices] = vectors["clipped_grad_norm"][indices]
            if self._agc is not None and measurement.limits is not None:
                vectors.limits[plan.indices] = measurement.limits
                proper_units = replace(units, gradient=units.gradient / scale)
                self._add_agc(proper_units, measurement.limits[plan.measured], plan.starts, indices, vectors)

    def _add_agc(
        self, units: Units, limits: _Floats, starts: Sequence[int], indices: _Indices, vectors: Vectors
    ) -> None:
        factors = agc_factors(units, starts, limits, tensor_wise=self._tensor_wise)
        clipped = replace(units, agc_factor=factors)
        for row in measured_from("agc"):
            vectors[row.name][indices] = row.measure(clipped, starts)
        after = MEASURED["clipped_grad_norm"].measure(clipped, starts)
        scaled = vectors["clipped_unit_share"][indices] > 0
        vectors["clipped_grad_norm"][indices[scaled]] = after[scaled]

    def _histograms(self, measurements: Sequence[Measurement], excluded: Collection[int]) -> dict[str, list[float]]:
        """Return the histograms of unit ratios as AGC sees them, or would see them, for each third of the depth."""
        thirds = np.zeros((3, wire.HISTOGRAM_EDGES.size + 1))
        for measurement in measurements:
            plan = measurement.norms.plan
            if plan.grad_layout is None or measurement.before_clip:
                continue
            units = _units(measurement.norms, self._eps)
            if measurement.scale is not None:
                with np.errstate(all="ignore"):
                    units = replace(units, gradient=units.gradient / measurement.scale)
            # Parameters that AGC leaves alone are counted in a fourth row, which is thrown away.
            rows = [
                3 if plan.indices[position] in excluded else self._third[plan.indices[position]]
                for position in plan.measured
            ]
            thirds += ratio_histogram(units, wire.HISTOGRAM_EDGES, np.repeat(rows, plan.measured_units), 4)[:3]
        if not thirds.any():
            return {}
        return {name: counts.tolist() for name, counts in zip(wire.HISTOGRAMS, thirds, strict=True)}

    def _scalars(self, record: StepRecord, statistics: Mapping[str, wire.Vector]) -> dict[str, float]:
        scalars = record.scalars | _learning_rates(record.rates)
        scalars["global_grad_norm"] = total_norm(statistics["grad_norm"])
        if "clipped_grad_norm" in statistics:
            scalars["clipped_global_grad_norm"] = total_norm(statistics["clipped_grad_norm"])
        limit = _norm_limit(record, statistics["grad_norm"])
        if math.isfinite(limit):
            scalars["global_grad_norm_limit"] = limit
        scalars["skipped_steps"] = float(self._skipped_steps)
        scalars["agent_seconds"] = record.agent_seconds
        scalars["dropped_samples"] = float(self._dropped.samples)
        scalars["dropped_bytes"] = float(self._dropped.bytes)
        return scalars


@dataclass(slots=True)
class Draft:
    """A sample that holds only what this rank measured: the parts of other ranks may be missing."""

    record: StepRecord
    vectors: Vectors
    histograms: dict[str, list[float]]


def _units(norms: UnitNorms, eps: float) -> Units:
    if norms.plan.grad_layout is None:
        return Units(weight=norms.weight_units(), eps=eps)
    return Units(gradient=norms.grad_units(), weight=norms.weight_units(), eps=eps)


def _clip_coefficients(clips: Sequence[ScaledBy], count: int) -> _Floats:
    """Return the factor by which clipping had scaled each gradient before it was measured, shape (parameters,)."""
    coefficients = np.ones(count)
    for clip, indices in clips:
        if clip.partial:
            continue
        coefficient = clip_coefficient(clip.total_norm, clip.max_norm)
        coefficients[np.fromiter(indices, np.intp, len(indices))] *= coefficient
        for index, times in clip.repeated.items():
            coefficients[index] *= coefficient ** (times - 1) if index in indices else 1.0
    return coefficients


def _norm_limit(record: StepRecord, grad_norm: wire.Vector) -> float:
    """Return the limit that clipping set to the L2 norm of the whole gradient; infinite if it set none."""
    present = set(np.flatnonzero(grad_norm != MISSING).tolist())
    scaled: defaultdict[int, set[int]] = defaultdict(set)
    for measurement in record.measurements:
        for clip, indices in () if measurement.before_clip else measurement.clips:
            scaled[id(clip)] |= indices
    for clip, indices in record.clipped_late:
        scaled[id(clip)] |= indices
    whole = (clip for clip in record.clips if clip.norm_type == 2.0 and scaled[id(clip)] >= present)
    return min((limit for clip in whole if (limit := clip.max_norm) > 0), default=math.inf)


def _add_update(update: WeightUpdate, vectors: Vectors) -> None:
    units = Units(change=update.units)
    for row in measured_from("update"):
        vectors[row.name][list(update.indices)] = row.measure(units, update.starts)


def _learning_rates(rates: Mapping[int, float]) -> dict[str, float]:
    """Return the learning rate of each parameter group; of many groups the first, the lowest and the highest."""
    by_group = dict(sorted(rates.items()))
    if max(by_group, default=0) < MOST_RATES:
        return {f"learning_rate.{place}" if place else "learning_rate": rate for place, rate in by_group.items()}
    every = list(by_group.values())
    return {
        "learning_rate": every[0],
        "learning_rate.lowest": min(every),
        "learning_rate.highest": max(every),
    }
