"""The part of a sample that each rank of a sharded training measures, and the whole that rank 0 computes from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.model.discovery import ParameterInfo
from gradwatch.ranks.sharding import split_of
from gradwatch.statistics import clip_coefficient
from gradwatch.wire import MISSING

Floats = NDArray[np.float64]

SUMMED: Final = ("zero_units", "units", "nonfinite", "clipped_units", "removed", "clipped", "gradient", "weight")
"""Rows of a part that add up over the ranks; the last four are squared norms, ``clipped`` before AGC where a unit lies
on several ranks."""


@dataclass(frozen=True, eq=False)
class RankPart:
    """What one rank measured of one step, over all parameters of the run."""

    sums: Floats
    """Rows ``SUMMED``, shape (8, parameters); 0 for shards that this rank does not own."""
    largest: Floats
    """Largest ratio of a unit, shape (parameters,); ``MISSING`` where there was no gradient."""
    totals: list[float]
    """This rank's part of the norms that ``clip_grad_norm_`` returned."""


@dataclass(slots=True)
class ShardOwnership:
    """Which parameters this rank reports, each of shape (parameters,)."""

    owned: NDArray[np.bool_]
    """Whether this rank's shard is no copy of another rank's."""
    whole_units: NDArray[np.bool_]
    """Whether each unit of the parameter lies on one rank."""
    one_unit: NDArray[np.bool_]
    """Whether the parameter is one unit."""


def ownership(watched: Sequence[ParameterInfo], rank: int) -> ShardOwnership:
    """Return which parameters this rank reports."""
    owned, whole = [], []
    for info in watched:
        parameter = info.parameter()
        owned.append(parameter is not None and _is_owned(parameter, rank))
        split = None if parameter is None else split_of(parameter, info.axis, info.groups, "unit")
        whole.append(split is None)
    one = [info.axis == "whole" or len(info.shape) < 2 for info in watched]
    return ShardOwnership(np.array(owned, np.bool_), np.array(whole, np.bool_), np.array(one, np.bool_))


def _is_owned(parameter: Tensor, rank: int) -> bool:
    """Return whether this rank reports its shard: of several copies the first, of an unsharded parameter rank 0's."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return rank == 0
    coordinate = cast("Any", parameter).device_mesh.get_coordinate()
    return coordinate is not None and not any(
        place for place, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )


@dataclass(frozen=True, eq=False)
class JoinedStatistics:
    """Statistics of the whole parameters, each of shape (parameters,); ``MISSING`` where there was no gradient."""

    grad_norm: Floats
    clipped_grad_norm: Floats
    weight_norm: Floats
    max_unit_ratio: Floats
    zero_unit_share: Floats
    nonfinite_count: Floats
    clipped_unit_share: Floats
    removed_norm: Floats
    totals: list[float]
    """Norms that ``clip_grad_norm_`` returned."""


def join_parts(
    parts: Sequence[RankPart], ownership: ShardOwnership, eps: float, limits: Floats, *, tensor_wise: bool
) -> JoinedStatistics:
    """Compute the statistics of the whole parameters from the parts of all ranks.

    Args:
        parts: one for each rank.
        ownership: of any rank; how the units are split is the same on all.
        eps: floor of a unit's weight norm.
        limits: largest ratio of each parameter under AGC, infinite where it is not clipped.
        tensor_wise: whether AGC takes a whole tensor as the unit.
    """
    sums = np.sum([part.sums for part in parts], axis=0)
    zero_units, units, nonfinite, clipped_units, removed, clipped, gradient, weight = sums
    largest = np.max([part.largest for part in parts], axis=0)
    missing = largest == MISSING
    with np.errstate(all="ignore"):
        grad_norm, weight_norm = np.sqrt(gradient), np.sqrt(weight)
        clipped_share, zero_share = clipped_units / np.maximum(units, 1.0), zero_units / np.maximum(units, 1.0)
        clipped_norm, removed_norm = np.sqrt(clipped), np.sqrt(removed)
        # 1. A vector is one unit that lies on several ranks: what each rank saw of it says nothing by itself.
        vector = ~ownership.whole_units & ownership.one_unit
        largest = np.where(vector, grad_norm / np.maximum(weight_norm, eps), largest)
        largest = np.where(~ownership.whole_units & ~ownership.one_unit, MISSING, largest)
        zero_share = np.where(vector, grad_norm == 0.0, zero_share)
        # 2. What AGC did to what it clips as one: to vectors, or to every tensor.
        as_one = np.ones_like(vector) if tensor_wise else vector
        most = limits * (weight_norm + eps if tensor_wise else np.maximum(weight_norm, eps))
        scaled = np.isfinite(grad_norm) & (grad_norm > most)
        clipped_share = np.where(as_one, scaled, clipped_share)
        clipped_norm = np.where(as_one & scaled, most, clipped_norm)
        removed_norm = np.where(as_one, np.where(scaled, grad_norm - most, 0.0), removed_norm)
    totals = [
        float(np.sqrt(np.sum(np.square(several)))) for several in zip(*(part.totals for part in parts), strict=True)
    ]
    return JoinedStatistics(
        grad_norm=np.where(missing, MISSING, grad_norm),
        clipped_grad_norm=np.where(missing, MISSING, clipped_norm),
        weight_norm=weight_norm,
        max_unit_ratio=np.where(missing, MISSING, largest),
        zero_unit_share=np.where(missing, MISSING, zero_share),
        nonfinite_count=np.where(missing, MISSING, nonfinite),
        clipped_unit_share=np.where(missing, MISSING, clipped_share),
        removed_norm=np.where(missing, MISSING, removed_norm),
        totals=totals,
    )


def undo_norm_clip(norm: Floats, total: float, max_norm: float) -> Floats:
    """Return norms as they were before ``clip_grad_norm_`` scaled them.

    Args:
        norm: after clipping, shape (parameters,); ``MISSING`` stays.
        total: norm of all gradients before clipping.
        max_norm: limit that was given to ``clip_grad_norm_``.
    """
    with np.errstate(all="ignore"):
        return np.where(norm == MISSING, norm, norm / clip_coefficient(total, max_norm))
