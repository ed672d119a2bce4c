"""Numbers that are still on their devices: kept and looked at without waiting."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gradwatch.model.discovery import local

Scalar = float | Tensor
"""A number, or a tensor of one element."""


def kept(scalar: Tensor) -> Tensor:
    """Return a copy of a number that stays on its device, whatever becomes of the original."""
    ours = local(scalar.detach())
    with torch.no_grad():
        return ours.clone() if ours.dtype in (torch.float32, torch.float64) else ours.float()


def summed(scalars: Iterable[Tensor]) -> list[Tensor]:
    """Return the sums of the scalars of each device and type."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for scalar in scalars:
        alike.setdefault((scalar.device, scalar.dtype), []).append(scalar.reshape(()))
    with torch.no_grad():
        return [torch.stack(same).sum() for same in alike.values()]


def is_finite(scalar: Tensor) -> bool:
    """Return False for a NaN or Inf that can be seen without waiting: on the CPU."""
    if scalar.device.type != "cpu":
        return True
    seen = scalar.detach() if scalar.requires_grad else scalar
    seen = seen if seen.dtype in (torch.float32, torch.float64) else seen.float()
    return bool(math.isfinite(seen.numpy().item()))
