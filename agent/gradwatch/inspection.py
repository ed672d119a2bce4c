"""What unit norms do not say of a gradient: how much of it is not finite, and its norm where float32 cannot square."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gradwatch.rounds import Reading, Repair
from gradwatch.statistics import norms

_TINY: Final = 1e-18
"""Norms below may have lost squares to underflow in float32."""


def inspect(reading: Reading, grads: Sequence[Tensor]) -> None:
    """Count non-finite elements, and sum anew where float32 squares overflow or vanish.

    On the CPU what was just written can be read at no cost; elsewhere it would mean to wait, and a non-finite
    gradient counts its non-finite units.
    """
    plan = reading.claim.plan
    assert plan.grads is not None
    if any(arena.device.type != "cpu" for arena in plan.grads.sizes):
        return
    if all(part.min() >= _TINY and math.isfinite(part.sum()) for part in reading.claim.raw_grads() if part.size):
        return
    units = reading.claim.grad_units()
    by_parameter = norms(units, plan.starts)
    for place, norm in enumerate(by_parameter.tolist()):
        if math.isfinite(norm) and norm >= _TINY:
            continue
        position = plan.measured[place]
        grad = grads[position]
        grad = grad.coalesce().values() if plan.grads.specs[position].sparse else grad
        repair = _repair(grad, norm)
        if repair is not None:
            reading.repairs[plan.indices[position]] = repair


def _repair(grad: Tensor, norm: float) -> Repair | None:
    """Return what a norm in float32 does not say; None where it said all: there is nothing but zeros."""
    if not grad.numel():  # a sparse gradient that holds no row
        return None
    with torch.no_grad():
        if not math.isfinite(norm):
            nonfinite = grad.numel() - int(torch.count_nonzero(torch.isfinite(grad)).numpy().item())
            if nonfinite:
                return Repair(float(nonfinite))
        else:
            real = torch.view_as_real(grad) if grad.is_complex() else grad
            if not any(bound.numpy().item() for bound in torch.aminmax(real)):
                return None
        wide = torch.complex128 if grad.is_complex() else torch.float64
        return Repair(0.0, torch.linalg.vector_norm(grad, dtype=wide))
