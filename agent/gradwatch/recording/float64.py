"""Recomputing unit norms in float64 where float32 squares overflow or vanish, and counting non-finite elements."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.norms.buffers import UnitNorms
from gradwatch.norms.layout import MeasurementPlan
from gradwatch.norms.tensor_spec import TensorSpec, norm_function, unit_rows
from gradwatch.steps.state import Measurement

Floats = NDArray[np.float64]

_TINY: Final = 1e-16
"""Norms below may have lost squares to underflow in float32, or to 0 where subnormal numbers are flushed."""
_LARGE: Final = 1 << 20
"""Elements from which a tensor whose norm is sound is not read again for units of norm 0: the rows of an embedding that
no batch asked for are many, and zero."""


def recompute(measurement: Measurement, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Count non-finite elements, and recompute the units whose squares overflow or vanish in float32.

    On the CPU the norms that were just written can be read at no cost. On another device reading them would mean to
    wait for it, so the non-finite units of a gradient are counted there instead.

    Args:
        measurement: takes the counts and the repaired norms.
        grads: gradients in the plan's order; empty if the plan has none.
        weights: weights in the plan's order.
    """
    norms: UnitNorms = measurement.norms
    plan = norms.plan
    if any(buffer.device.type != "cpu" for buffer in plan.sizes):
        return
    if not _is_plain(norms.raw_weights()):
        norms.recomputed_weights = _repairs(norms.weight_units(), plan, plan.weight_layout.specs, weights)
    if plan.grad_layout is None or _is_plain(norms.raw_grads()):
        return
    norms.recomputed_grads = _repairs(norms.grad_units(), plan, plan.grad_layout.specs, grads)
    bad = np.logical_or.reduceat(~np.isfinite(norms.grad_units()), plan.starts)
    for place in np.flatnonzero(bad).tolist():
        position = plan.measured[place]
        measurement.nonfinite[plan.indices[position]] = _nonfinite(grads[position], plan.grad_layout.specs[position])


def _is_plain(parts: Sequence[NDArray[Any]]) -> bool:
    return all(part.min() >= _TINY and math.isfinite(part.sum()) for part in parts if part.size)


def _repairs(
    units: Floats, plan: MeasurementPlan, specs: Sequence[TensorSpec], tensors: Sequence[Tensor]
) -> dict[int, Floats]:
    """Return the recomputed unit norms of tensors in which some were wrong, by position in the plan's order."""
    doubtful = ~(np.isfinite(units) & (units >= _TINY))
    repairs = {}
    with torch.no_grad():
        for place in np.flatnonzero(np.logical_or.reduceat(doubtful, plan.starts)).tolist():
            position, start = plan.measured[place], plan.starts[place]
            span = slice(start, start + plan.measured_units[place])
            if math.prod(specs[position].shape) >= _LARGE and _TINY <= np.linalg.norm(units[span]) < math.inf:
                continue
            repaired = _repaired(units[span], doubtful[span], tensors[position], specs[position])
            if repaired is not None:
                repairs[place] = repaired
    return repairs


def _repaired(units: Floats, doubtful: NDArray[np.bool_], tensor: Tensor, spec: TensorSpec) -> Floats | None:
    """Return the unit norms of a tensor, the doubtful ones in float64; None if all of them were right."""
    if spec.sparse:
        out = torch.zeros(spec.units, dtype=torch.float64, device="cpu")
        norm_function(spec)(tensor, out)
        return np.where(doubtful, out.numpy(), units)
    rows = unit_rows(tensor, spec)
    dims = tuple(range(1, rows.dim()))
    # Most units whose norm is 0 are zero: that is found out without a copy of them, in a seventh of the time that the
    # infinity norm takes.
    largest = torch.maximum(rows.amax(dims), rows.amin(dims).neg()).to(spec.norm_dtype).numpy()
    chosen = np.flatnonzero(doubtful & (largest > 0) & np.isfinite(largest))
    if not chosen.size:
        return None
    if chosen.size < units.size:
        rows = rows.index_select(0, torch.from_numpy(chosen))
    repaired = units.copy()
    repaired[chosen] = torch.linalg.vector_norm(rows, dim=dims, dtype=torch.float64).numpy()
    return repaired


def _nonfinite(grad: Tensor, spec: TensorSpec) -> float:
    """Return the number of elements that are NaN or infinite."""
    stored = grad.coalesce().values() if spec.sparse else grad
    with torch.no_grad():
        return float(stored.numel() - int(torch.count_nonzero(torch.isfinite(stored)).numpy().item()))
