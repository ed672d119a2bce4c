"""Numbers on their devices: copied, summed and checked without waiting for the device."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradwatch.norms.tensor_spec import local_part

Scalar = float | Tensor
"""A number, or a tensor of one element."""


def copy_scalar(scalar: Tensor) -> Tensor:
    """Return a detached copy of a number on its device, in float32 or float64; later changes do not reach it."""
    part = local_part(scalar.detach())
    with torch.no_grad():
        return part.clone() if part.dtype in (torch.float32, torch.float64) else part.float()


def copy_and_check(scalar: Tensor) -> tuple[Scalar, bool]:
    """Return a number that later changes do not reach, and ``is_finite`` of it.

    On the CPU it is read now: a float costs less than a copy. Elsewhere it is a copy on its device.
    """
    if type(scalar) is Tensor and scalar.is_cpu and scalar.dim() == 0 and scalar.is_floating_point():
        try:
            number: float = scalar.tolist()  # no operator of torch runs
        except RuntimeError:  # within a transform it holds no number
            return copy_scalar(scalar), True
        return number, math.isfinite(number)
    read = _read(scalar)
    return (copy_scalar(scalar), True) if read is None else (read, math.isfinite(read))


def _read(scalar: Tensor) -> float | None:
    """Return a number that is on the CPU, without an operator of torch; None for all others."""
    if type(scalar) is not Tensor:
        scalar = local_part(scalar.detach())
    if not scalar.is_cpu:
        return None
    try:
        value: Any = scalar.tolist()
        while isinstance(value, list):
            value = value[0]
    except RuntimeError:  # a subclass that holds no number, as a fake tensor
        return None
    return float(value.real)


def sum_scalars(scalars: Iterable[Scalar]) -> list[Scalar]:
    """Return the sums of the scalars: one of the floats, and one of the tensors of each device and dtype."""
    floats: list[float] = []
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for scalar in scalars:
        if isinstance(scalar, Tensor):
            by_kind.setdefault((scalar.device, scalar.dtype), []).append(scalar.reshape(()))
        else:
            floats.append(scalar)
    with torch.no_grad():
        sums: list[Scalar] = [torch.stack(same).sum() for same in by_kind.values()]
    return [*sums, sum(floats)] if floats else sums


def is_finite(scalar: Tensor) -> bool:
    """Return False for NaN or Inf on the CPU; True for all others, as a device would have to be waited for."""
    number = _read(scalar)
    return number is None or math.isfinite(number)
