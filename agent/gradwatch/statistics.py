"""Statistics of the parameters from their unit norms: plain numpy, off the training thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

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
