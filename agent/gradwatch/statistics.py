"""Statistics of the parameters from their unit norms: plain numpy, off the training thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gradwatch.wire import HISTOGRAM_EDGES

Floats = NDArray[np.float64]

UNIT_EPS: Final = 1e-3
"""Floor of a unit's weight norm in its ratio (Brock et al., 2021): a unit that starts at zero has a ratio, too."""


@dataclass(frozen=True, slots=True)
class ByParameter:
    """Statistics of some parameters, each of shape (parameters,), float64."""

    grad_norm: Floats
    weight_norm: Floats
    max_unit_ratio: Floats
    """Largest ``||g_i|| / max(||w_i||, eps)`` over the units; NaN where a unit's ratio is NaN."""
    zero_unit_share: Floats
    """Share of units whose gradient is exactly zero, 0 to 1."""
    nonfinite_units: Floats
    """Units whose gradient norm is not finite."""


def by_parameter(grad_units: Floats, weight_units: Floats, starts: Sequence[int], eps: float = UNIT_EPS) -> ByParameter:
    """Return the statistics of parameters whose units lie one after the other.

    Args:
        grad_units: norms of the units' gradients, shape (units,).
        weight_units: norms of the units' weights, the same units in the same order.
        starts: where each parameter's units begin, ascending, shape (parameters,); each has one unit or more.
        eps: floor of the weight norm of a unit in ``max_unit_ratio``.
    """
    if not starts:
        none = np.zeros(0)
        return ByParameter(none, none, none, none, none)
    begin = np.asarray(starts)
    units = np.diff(np.append(begin, grad_units.size))
    with np.errstate(all="ignore"):
        return ByParameter(
            grad_norm=np.sqrt(np.add.reduceat(grad_units * grad_units, begin)),
            weight_norm=np.sqrt(np.add.reduceat(weight_units * weight_units, begin)),
            max_unit_ratio=np.maximum.reduceat(grad_units / np.maximum(weight_units, eps), begin),
            zero_unit_share=np.add.reduceat((grad_units == 0).astype(np.float64), begin) / units,
            nonfinite_units=np.add.reduceat((~np.isfinite(grad_units)).astype(np.float64), begin),
        )


@dataclass(frozen=True, slots=True)
class Clipped:
    """What AGC did to some parameters, each of shape (parameters,), float64."""

    unit_share: Floats
    """Share of units that were scaled down, 0 to 1."""
    grad_norm: Floats
    """Norm after it."""
    removed_norm: Floats
    """Norm of what was taken away."""


def clipped_by_agc(
    grad_units: Floats,
    weight_units: Floats,
    starts: Sequence[int],
    limits: Floats,
    eps: float,
    *,
    whole: bool,
) -> Clipped:
    """Return what AGC does to parameters whose units lie one after the other.

    Args:
        grad_units: norms of the units' gradients, shape (units,).
        weight_units: norms of the units' weights.
        starts: where each parameter's units begin, shape (parameters,).
        limits: largest ratio of each parameter, infinite where it is not clipped.
        eps: floor of a weight's norm.
        whole: whether a tensor is clipped as one (``granularity="tensor"``).
    """
    owner = np.repeat(np.arange(len(starts)), np.diff(np.append(np.asarray(starts, np.intp), grad_units.size)))
    with np.errstate(all="ignore"):
        if whole:
            norm, weight = norms(grad_units, starts)[owner], norms(weight_units, starts)[owner] + eps
        else:
            norm, weight = grad_units, np.maximum(weight_units, eps)
        most = limits[owner] * weight
        factor = np.where(norm > most, most / norm, 1.0)
        factor[~np.isfinite(norm)] = 1.0
        scaled = factor < 1.0
        share = np.bincount(owner, scaled, len(starts)) / np.bincount(owner, minlength=len(starts))
        removed = np.where(scaled, grad_units * (1.0 - factor), 0.0)
    return Clipped(share, norms(grad_units * factor, starts), norms(removed, starts))


def histogram(grad_units: Floats, weight_units: Floats, eps: float, rows: NDArray[np.intp]) -> Floats:
    """Return how many units have their ratio of gradient to weight in each bin, shape (4, len(HISTOGRAM_EDGES) + 1).

    Args:
        grad_units: norms of the units' gradients, shape (units,).
        weight_units: norms of the units' weights.
        eps: floor of a weight's norm.
        rows: row of the result in which each unit is counted, 0 to 3. One without a finite ratio is in none.
    """
    with np.errstate(all="ignore"):
        ratios = grad_units / np.maximum(weight_units, eps)
    bins = HISTOGRAM_EDGES.size + 1
    finite = np.isfinite(ratios)
    places = rows[finite] * bins + np.searchsorted(HISTOGRAM_EDGES, ratios[finite], side="left")
    return np.bincount(places, minlength=4 * bins).reshape(4, bins).astype(np.float64)


def norms(units: Floats, starts: Sequence[int]) -> Floats:
    """Return the norm of each parameter from its units' norms, shape (parameters,)."""
    if not starts:
        return np.zeros(0)
    with np.errstate(all="ignore"):
        return np.sqrt(np.add.reduceat(units * units, np.asarray(starts)))


def clip_coefficient(total_norm: float, max_norm: float) -> float:
    """Return what ``clip_grad_norm_`` multiplied the gradients by: ``min(1, max_norm / (total_norm + 1e-6))``.

    It is NaN for a NaN norm and 0 for an infinite one.
    """
    if np.isnan(total_norm):
        return float("nan")
    return float(min(1.0, max_norm / (total_norm + 1e-6)))
