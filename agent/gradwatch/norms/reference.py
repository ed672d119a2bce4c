"""The reference for unit norms and adaptive gradient clipping (AGC), written as the paper writes them.

It takes one dense parameter, unit by unit, in float64, and is far too slow for a training. The tests compare the fast
code with it. Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML
2021 (arXiv 2102.06171).
"""

import torch
from torch import Tensor

from gradwatch.norms.tensor_spec import UnitAxis
from gradwatch.statistics import RATIO_EPS


def unit_norms(tensor: Tensor, axis: UnitAxis = "rows", groups: int = 1) -> Tensor:
    """Return the L2 norm ``||x_i||`` of each unit, shape (units,)."""
    return torch.stack([norm(unit) for unit in units(in_float64(tensor), axis, groups)])


def clip_units(
    grad: Tensor, weight: Tensor, clip: float, eps: float = RATIO_EPS, axis: UnitAxis = "rows", groups: int = 1
) -> Tensor:
    """Return the gradient in float64 after AGC of each unit; a unit whose gradient is not finite stays as it is.

    ``g_i <- clip * max(||w_i||, eps) / ||g_i|| * g_i`` where ``||g_i|| / max(||w_i||, eps) > clip``.
    """
    clipped = in_float64(grad).clone()
    for g, w in zip(units(clipped, axis, groups), units(in_float64(weight), axis, groups), strict=True):
        limit = clip * norm(w).clamp(min=eps)
        if norm(g).isfinite() and norm(g) > limit:
            g *= limit / norm(g)
    return clipped


def clip_tensor(grad: Tensor, weight: Tensor, clip: float, eps: float = RATIO_EPS) -> Tensor:
    """Return the gradient in float64 after AGC of the whole tensor; one that is not finite stays as it is.

    ``g <- g * min(1, clip / r)`` with ``r = ||g|| / (||w|| + eps)``.
    """
    ratio = norm(in_float64(grad)) / (norm(in_float64(weight)) + eps)
    return in_float64(grad) * (clip / ratio).clamp(max=1.0) if ratio.isfinite() else in_float64(grad)


def units(tensor: Tensor, axis: UnitAxis, groups: int = 1) -> list[Tensor]:
    """Return the units of a tensor as views of it."""
    if axis == "whole" or tensor.dim() < 2:
        return [tensor]
    if axis == "experts":
        return [row for expert in tensor for row in expert]
    if axis == "transposed":
        return [channel for group in tensor.chunk(groups) for channel in group.unbind(1)]
    return list(tensor)


def norm(tensor: Tensor) -> Tensor:
    """Return the square root of the sum of squares."""
    return tensor.abs().square().sum().sqrt()


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision, real or complex."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
