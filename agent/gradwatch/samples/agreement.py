"""Whether two measurements of gradients agree: before clipping, and at the step with the clipping divided out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradwatch.norms.tensor_spec import TensorSpec
from gradwatch.statistics import MISSING

_TOLERANCE = 1e-4
"""Relative difference that is taken for none."""


def agree(before: NDArray[Any], at_step: NDArray[Any], specs: Sequence[TensorSpec]) -> bool | None:
    """Return whether norms agree; None where no two finite ones can be compared.

    Args:
        before: norms before clipping, shape (parameters,).
        at_step: norms that follow from those at the step, same shape; ``MISSING`` where there is none.
        specs: of the gradients.
    """
    known = (at_step != MISSING) & np.isfinite(before) & np.isfinite(at_step)
    if not known.any():
        return None
    largest = np.array([_rounding(spec) for spec in specs])
    return bool((np.abs(before - at_step) <= largest * before)[known].all())


def _rounding(spec: TensorSpec) -> float:
    """Return the relative error that a norm has after the elements were scaled, and rounded to their type."""
    return max(_TOLERANCE, 2 * torch.finfo(spec.dtype).eps / math.sqrt(max(math.prod(spec.shape), 1)))
