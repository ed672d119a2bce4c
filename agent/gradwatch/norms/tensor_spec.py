"""How a tensor is divided into units, and the precision in which their norms are summed.

A unit is one output row of a tensor (all its other dims are reduced); a vector, a gain or a scalar is one unit.
"""

import math
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

UnitAxis = Literal["rows", "transposed", "experts", "whole"]
"""Which dims tell the units of a tensor apart: ``rows`` dim 0; ``transposed`` dim 1 (transposed convolutions);
``experts`` dims 0 and 1 (the rows of each expert); ``whole`` none, the tensor is one unit."""

WIDEST_ROW: Final = 1 << 16
"""Elements that are summed in one float32 sum at most; wider units are summed in blocks."""
MOST_UNITS: Final = 1 << 20
"""Units of one tensor whose norms are kept apart where nothing is clipped by them: 4 MiB a buffer."""


class BufferKey(NamedTuple):
    """Device and dtype of a buffer of unit norms; there is one buffer for each."""

    device: torch.device
    dtype: torch.dtype


class TensorSpec(NamedTuple):
    """The properties of a tensor that decide how its unit norms are computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    axis: UnitAxis = "rows"
    groups: int = 1
    """Groups of a transposed convolution."""
    sparse: bool = False

    @property
    def units(self) -> int:
        """Return the number of units; 0 where the tensor is empty."""
        if not math.prod(self.shape):
            return 0
        if self.axis == "whole" or len(self.shape) < 2:
            return 1
        if self.axis == "experts":
            return self.shape[0] * self.shape[1]
        return self.shape[1] * self.groups if self.axis == "transposed" else self.shape[0]

    @property
    def width(self) -> int:
        """Return the number of elements in one unit."""
        return math.prod(self.shape) // max(self.units, 1)

    @property
    def norm_dtype(self) -> torch.dtype:
        """Return the dtype in which squares are summed: float64 for double precision, float32 for all others."""
        return torch.float64 if self.dtype in (torch.float64, torch.complex128) else torch.float32

    @property
    def buffer(self) -> BufferKey:
        """Return the buffer that takes the unit norms."""
        return BufferKey(self.device, self.norm_dtype)


def spec_of(tensor: Tensor, axis: UnitAxis, groups: int = 1) -> TensorSpec:
    """Return the specification of ``tensor``."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device, axis, groups, tensor.layout != torch.strided)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, without a collective; any other tensor is returned as it is."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = to_local() if to_local is not None else tensor
    return part


def unit_rows(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Return a real floating-point view or copy with the units along dim 0 and two dims or more."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    elif not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        tensor = tensor.to(spec.norm_dtype)
    if spec.units == 1:
        return tensor.reshape(1, -1)
    if spec.axis == "experts":
        return tensor.flatten(0, 1).unsqueeze(-1) if tensor.dim() == 2 else tensor.flatten(0, 1)
    if spec.axis != "transposed":
        return tensor if tensor.dim() > 1 else tensor.reshape(-1, 1)
    if spec.groups == 1:
        return tensor.transpose(0, 1)
    by_group = tensor.reshape(spec.groups, -1, *tensor.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)
