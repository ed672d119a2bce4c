"""The part of a sample that each rank measures, and the whole that rank 0 computes from the parts of all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradwatch.ranks.whole_model import NOWHERE, Indices, WholeModel
from gradwatch.statistics import JOINED, MISSING, Units, clip_coefficient

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClipPart:
    """One call of ``clip_grad_norm_`` that saw only this rank's part of the norm."""

    ranks: tuple[int, ...]
    """Global ranks whose parts make up the norm, ascending."""
    total: float
    """This rank's part of the norm; 0 where another rank tells the same part."""
    max_norm: float
    norm_type: float
    scaled: list[int]
    """Parameters of this rank that were measured after the call had scaled them."""


@dataclass(frozen=True, eq=False)
class RankPart:
    """The measurements of one rank at one step, over the parameters that it holds."""

    units: Floats
    """Number of units, shape (parameters,); ``MISSING`` where this rank has no gradient."""
    rows: Floats
    """The rank's parts of the statistics ``JOINED``, shape (len(JOINED), parameters)."""
    limits: Floats
    """Largest ratio of each parameter under AGC, infinite where it is not clipped, shape (parameters,)."""
    clips: Sequence[ClipPart] = ()


@dataclass(frozen=True, eq=False)
class JoinedStatistics:
    """Statistics of the whole parameters."""

    values: dict[str, Floats]
    """Name -> shape (parameters,); ``MISSING`` where there was no gradient."""
    clips: list["JoinedClip"]
    """The calls of ``clip_grad_norm_`` of which each rank saw only a part."""


@dataclass(slots=True)
class JoinedClip:
    """One call of ``clip_grad_norm_`` on all ranks that made it."""

    ranks: tuple[int, ...]
    max_norm: float
    norm_type: float
    parts: list[float] = field(default_factory=list)
    scaled: set[int] = field(default_factory=set)
    """Indices in the whole model of the parameters that were measured after the call had scaled them."""

    @property
    def total(self) -> float:
        """Return the norm of all gradients that the call was given."""
        return float(np.linalg.norm(self.parts, self.norm_type))


def join_parts(parts: Mapping[int, RankPart], whole: WholeModel, eps: float, *, tensor_wise: bool) -> JoinedStatistics:
    """Compute the statistics of the whole parameters from the parts of all ranks that report.

    Args:
        parts: rank -> its part.
        whole: which rank reports what.
        eps: floor of a unit's weight norm.
        tensor_wise: whether AGC takes a whole tensor as the unit.
    """
    count = len(whole.parameters)
    spread = [_spread(part, whole.reported[rank], count) for rank, part in parts.items()]
    counts = np.stack([part.units for part in spread])
    units = np.where(counts == MISSING, 0.0, counts).sum(axis=0)
    limits = np.min([part.limits for part in spread], axis=0)
    values: dict[str, Floats] = {}
    with np.errstate(all="ignore"):
        # 1. Every statistic by its own reduction.
        for place, statistic in enumerate(JOINED):
            reduction = statistic.reduction
            joined = reduction.join.reduce([part.rows[place] for part in spread])
            values[statistic.name] = reduction.from_parts(joined, units)
        # 2. What the reduction cannot tell of units that lie on several ranks.
        _correct_split_units(values, whole, eps)
        # 3. What AGC did to what it clips as one: to vectors, or to every tensor.
        as_one = ~whole.whole_units & whole.one_unit
        _correct_agc(values, as_one | tensor_wise, limits, eps, tensor_wise=tensor_wise)
    missing = (counts == MISSING).all(axis=0)
    for statistic in JOINED:
        if statistic.source != "weight":
            values[statistic.name] = np.where(missing, MISSING, values[statistic.name])
    clips = _join_clips(parts, whole)
    for clip in clips:
        _undo_clip(values, clip)
    return JoinedStatistics(values, clips)


def _spread(part: RankPart, reported: Indices, count: int) -> RankPart:
    """Return a part with its values at the indices of the whole model, and nothing where the rank does not report."""
    reported = reported[: part.units.size]  # the rank may have found more parameters since
    mine = reported != NOWHERE
    target = reported[mine]
    units, limits = np.full(count, MISSING), np.full(count, np.inf)
    units[target], limits[target] = part.units[mine], part.limits[mine]
    rows = np.repeat(np.array([[row.reduction.absent] for row in JOINED]), count, axis=1)
    rows[:, target] = part.rows[:, mine]
    return RankPart(units, rows, limits)


def _correct_split_units(values: dict[str, Floats], whole: WholeModel, eps: float) -> None:
    # A vector is one unit: what each rank saw of it says nothing by itself, but its joined norms are known.
    joined_norms = Units(gradient=values["grad_norm"], weight=values["weight_norm"], eps=eps)
    split = ~whole.whole_units
    for statistic in JOINED:
        if statistic.source != "gradient" or statistic.reduction.across_ranks == "exact":
            continue
        joined = np.where(split & whole.one_unit, statistic.of_unit(joined_norms), values[statistic.name])
        if statistic.reduction.across_ranks == "unknown":
            joined = np.where(split & ~whole.one_unit, MISSING, joined)
        values[statistic.name] = joined


def _correct_agc(
    values: dict[str, Floats], as_one: NDArray[np.bool_], limits: Floats, eps: float, *, tensor_wise: bool
) -> None:
    grad_norm, weight_norm = values["grad_norm"], values["weight_norm"]
    most = limits * (weight_norm + eps if tensor_wise else np.maximum(weight_norm, eps))
    scaled = np.isfinite(grad_norm) & (grad_norm > most)
    values["clipped_unit_share"] = np.where(as_one, scaled, values["clipped_unit_share"])
    values["clipped_grad_norm"] = np.where(as_one & scaled, most, values["clipped_grad_norm"])
    values["removed_norm"] = np.where(as_one, np.where(scaled, grad_norm - most, 0.0), values["removed_norm"])


def _join_clips(parts: Mapping[int, RankPart], whole: WholeModel) -> list[JoinedClip]:
    """Return the calls of ``clip_grad_norm_``: the n-th calls of the ranks that share a norm are one call."""
    joined: dict[tuple[int, tuple[int, ...]], JoinedClip] = {}
    for rank, part in parts.items():
        for place, clip in enumerate(part.clips):
            known = joined.setdefault((place, clip.ranks), JoinedClip(clip.ranks, clip.max_norm, clip.norm_type))
            known.parts.append(clip.total)
            known.scaled.update(int(index) for index in whole.held[rank][clip.scaled] if index != NOWHERE)
    return list(joined.values())


def _undo_clip(values: dict[str, Floats], clip: JoinedClip) -> None:
    """Divide a clipping by norm out of the values that it had scaled, now that the norm of all ranks is known."""
    chosen = sorted(clip.scaled)
    for statistic in JOINED:
        if statistic.source == "gradient" and statistic.before_clipping:
            vector = values[statistic.name]
            vector[chosen] = undo_norm_clip(vector[chosen], clip.total, clip.max_norm)


def undo_norm_clip(norm: Floats, total: float, max_norm: float) -> Floats:
    """Return norms as they were before ``clip_grad_norm_`` scaled them.

    Args:
        norm: after clipping, shape (parameters,); ``MISSING`` stays.
        total: norm of all gradients before clipping.
        max_norm: limit that was given to ``clip_grad_norm_``.
    """
    with np.errstate(all="ignore"):
        return np.where(norm == MISSING, norm, norm / clip_coefficient(total, max_norm))
