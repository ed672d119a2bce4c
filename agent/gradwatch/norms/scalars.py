"""Numbers on their devices: copied, summed and checked without waiting for the device."""

import math
from collections.abc import Iterable

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


def copy_and_check(scalar: Tensor) -> tuple[Tensor, bool]:
    """Return what ``copy_scalar`` returns, and ``is_finite`` of it, in one call."""
    value = scalar.detach()
    if type(value) is not Tensor:
        value = local_part(value)
    with torch.no_grad():
        value = value.clone() if value.dtype in (torch.float32, torch.float64) else value.float()
    return value, is_finite(value)


def sum_scalars(scalars: Iterable[Tensor]) -> list[Tensor]:
    """Return the sums of the scalars, one for each device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for scalar in scalars:
        by_kind.setdefault((scalar.device, scalar.dtype), []).append(scalar.reshape(()))
    with torch.no_grad():
        return [torch.stack(same).sum() for same in by_kind.values()]


def is_finite(scalar: Tensor) -> bool:
    """Return False for NaN or Inf on the CPU; True for all others, as a device would have to be waited for."""
    if scalar.device.type != "cpu":
        return True
    value = scalar.detach() if scalar.requires_grad else scalar
    value = value if type(value) is Tensor else local_part(value)
    value = value if value.dtype in (torch.float32, torch.float64) else value.float()
    try:
        return math.isfinite(value.numpy().item())
    except RuntimeError:  # a subclass that holds no number, as a fake tensor
        return True
