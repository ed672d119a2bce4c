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


def copy_and_check(scalar: Tensor) -> tuple[Scalar, bool]:
    """Return a number that later changes do not reach, and ``is_finite`` of it.

    On the CPU it is read now: a float costs less than a copy. Elsewhere it is a copy on its device.
    """
    value = scalar.detach()
    if type(value) is not Tensor:
        value = local_part(value)
    if value.device.type != "cpu":
        return copy_scalar(value), True
    try:
        with torch.no_grad():
            on_host = value if value.dtype in (torch.float32, torch.float64) else value.float()
        number = float((on_host.resolve_neg() if on_host.is_neg() else on_host).numpy().item())
    except RuntimeError:  # a subclass that holds no number, as a fake tensor
        return copy_scalar(value), True
    return number, math.isfinite(number)


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
    if scalar.device.type != "cpu":
        return True
    value = scalar.detach() if scalar.requires_grad else scalar
    value = value if type(value) is Tensor else local_part(value)
    value = value if value.dtype in (torch.float32, torch.float64) else value.float()
    try:
        return math.isfinite(value.numpy().item())
    except RuntimeError:  # a subclass that holds no number, as a fake tensor
        return True
