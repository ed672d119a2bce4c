"""The part of a sample that each rank of a sharded training measures, and the whole that rank 0 computes from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.model.discovery import ParameterInfo
from gradwatch.ranks.sharding import split_of
from gradwatch.statistics import JOINED, MISSING, Units, clip_coefficient

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RankPart:
    """The measurements of one rank at one step, over all parameters of the run."""

    units: Floats
    """Number of units, shape (parameters,); ``MISSING`` where this rank has no gradient or does not own the shard."""
    rows: Floats
    """The rank's parts of the statistics ``JOINED``, shape (len(JOINED), parameters)."""
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


@dataclass(frozen=True, slots=True)
class RegisteredParameters:
    """The parameters of the run as they are registered on the server."""

    watched: Sequence[ParameterInfo]
    depths: Sequence[int]
    ownership: ShardOwnership | None
    """What this rank reports; None where it measures alone. It is found where the parameters exist for certain: by the
    time the collector registers them, the training may be over and its tensors gone."""


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
    """Statistics of the whole parameters."""

    values: dict[str, Floats]
    """Name -> shape (parameters,); ``MISSING`` where there was no gradient."""
    totals: list[float]
    """Norms that ``clip_grad_norm_`` returned."""


def join_parts(
    parts: Sequence[RankPart], ownership: ShardOwnership, eps: float, limits: Floats, *, tensor_wise: bool
) -> JoinedStatistics:
    """Compute the statistics of the whole parameters from the parts of all ranks.

    Args:
        parts: one for each rank.
        ownership: the ownership of any rank; all ranks split the units in the same way.
        eps: floor of a unit's weight norm.
        limits: largest ratio of each parameter under AGC, infinite where it is not clipped.
        tensor_wise: whether AGC takes a whole tensor as the unit.
    """
    counts = np.stack([part.units for part in parts])
    units = np.where(counts == MISSING, 0.0, counts).sum(axis=0)
    values: dict[str, Floats] = {}
    with np.errstate(all="ignore"):
        # 1. Every statistic by its own reduction.
        for place, statistic in enumerate(JOINED):
            reduction = statistic.reduction
            joined = reduction.join.reduce([part.rows[place] for part in parts])
            values[statistic.name] = reduction.from_parts(joined, units)
        # 2. What the reduction cannot tell of units that lie on several ranks.
        _correct_split_units(values, ownership, eps)
        # 3. What AGC did to what it clips as one: to vectors, or to every tensor.
        as_one = ~ownership.whole_units & ownership.one_unit
        _correct_agc(values, as_one | tensor_wise, limits, eps, tensor_wise=tensor_wise)
    missing = (counts == MISSING).all(axis=0)
    for statistic in JOINED:
        if statistic.source != "weight":
            values[statistic.name] = np.where(missing, MISSING, values[statistic.name])
    totals = [
        float(np.sqrt(np.sum(np.square(several)))) for several in zip(*(part.totals for part in parts), strict=True)
    ]
    return JoinedStatistics(values, totals)


def _correct_split_units(values: dict[str, Floats], ownership: ShardOwnership, eps: float) -> None:
    # A vector is one unit: what each rank saw of it says nothing by itself, but its joined norms are known.
    whole = Units(gradient=values["grad_norm"], weight=values["weight_norm"], eps=eps)
    split = ~ownership.whole_units
    for statistic in JOINED:
        if statistic.source != "gradient" or statistic.reduction.across_ranks == "exact":
            continue
        joined = np.where(split & ownership.one_unit, statistic.of_unit(whole), values[statistic.name])
        if statistic.reduction.across_ranks == "unknown":
            joined = np.where(split & ~ownership.one_unit, MISSING, joined)
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


def undo_norm_clip(norm: Floats, total: float, max_norm: float) -> Floats:
    """Return norms as they were before ``clip_grad_norm_`` scaled them.

    Args:
        norm: after clipping, shape (parameters,); ``MISSING`` stays.
        total: norm of all gradients before clipping.
        max_norm: limit that was given to ``clip_grad_norm_``.
    """
    with np.errstate(all="ignore"):
        return np.where(norm == MISSING, norm, norm / clip_coefficient(total, max_norm))
