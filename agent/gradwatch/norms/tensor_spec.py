"""How one tensor is divided into units, in which precision their norms are summed, and the function that computes them.

A unit is one output row of a tensor (all its other dims are reduced); a vector, a gain or a scalar is one unit.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

UnitAxis = Literal["rows", "transposed", "experts", "whole"]
"""Which dims tell the units of a tensor apart: ``rows`` dim 0; ``transposed`` dim 1 (transposed convolutions);
``experts`` dims 0 and 1 (the rows of each expert); ``whole`` none, the tensor is one unit."""

WIDEST_ROW: Final = 1 << 16
"""Elements that are summed in one float32 sum at most; wider units are summed in blocks. Accelerators sum in trees."""
_WIDEST_ROW_CPU: Final = 1 << 13
"""The same on the CPU, where a sum runs along the row in some lanes, and elements that are alike are rounded alike."""
_WIDEST_STRIDED_ROW: Final = 1 << 11
"""The same where the elements of a unit do not lie side by side: it is summed in one lane."""
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


def widest_row(device: torch.device) -> int:
    """Return how many elements are summed in one float32 sum at most, so that a norm is right to 1e-5."""
    return _WIDEST_ROW_CPU if device.type == "cpu" else WIDEST_ROW


def spec_of(tensor: Tensor, axis: UnitAxis, groups: int = 1) -> TensorSpec:
    """Return the specification of ``tensor``."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device, axis, groups, tensor.layout != torch.strided)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, without a collective; any other tensor is returned as it is."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = to_local() if to_local is not None else tensor
    return part


def real_view(tensor: Tensor) -> Tensor:
    """Return a view of the real and imaginary parts of a complex tensor, as a last dim of 2.

    Of one that is lazily conjugated, it is that of its conjugate: norms are the same, and so is scaling by a number.
    """
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def unit_rows(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Return a real floating-point view or copy with the units along dim 0 and two dims or more."""
    if tensor.is_complex():
        tensor = real_view(tensor)
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


_BLOCK: Final = 1 << 10
"""Elements of one block of a unit that is too wide for one sum."""
_CONVERTED: Final = 1 << 22
"""Elements of an integer tensor that are converted to floating point at once."""

NormFunction = Callable[[Tensor, Tensor], None]
"""Writes the unit norms of the first tensor to the second, shape (units,)."""


def norm_function(spec: TensorSpec) -> NormFunction:
    """Return the function that writes the unit norms of tensors of this specification."""
    real = spec.dtype.is_floating_point
    if spec.sparse:
        return _write_sparse
    if spec.units == 1 and spec.width > _CONVERTED and not (real or spec.dtype.is_complex):
        return _write_integers
    if spec.width > widest_row(spec.device):
        return partial(_write_in_blocks, spec)
    if real and spec.dtype.itemsize > 1:
        if len(spec.shape) == 1:
            return _in_lanes(spec, partial(_write_over_dims, (0,), True))
        if spec.axis == "transposed" and len(spec.shape) > 2 and spec.shape[0] <= _WIDEST_STRIDED_ROW:
            return partial(_write_transposed, spec.groups)
        if spec.axis == "rows" and spec.units > 1:
            return _in_lanes(spec, partial(_write_over_dims, tuple(range(1, len(spec.shape))), False))
    if spec.axis == "transposed" and spec.width > _WIDEST_STRIDED_ROW:
        return partial(_write_in_blocks, spec)
    return partial(_write_rows, spec)


def _in_lanes(spec: TensorSpec, write: NormFunction) -> NormFunction:
    """Return a function that sums units whose elements do not lie side by side in blocks."""
    if spec.device.type != "cpu" or spec.width <= _WIDEST_STRIDED_ROW or spec.norm_dtype == torch.float64:
        return write
    vector = len(spec.shape) == 1

    def write_norms(tensor: Tensor, out: Tensor) -> None:
        step = tensor.stride(0)
        if step == 1 if vector else step >= spec.width:
            write(tensor, out)
        else:
            _write_in_blocks(spec, tensor, out)

    return write_norms


def _write_over_dims(dims: tuple[int, ...], keepdim: bool, tensor: Tensor, out: Tensor) -> None:
    dtype = None if tensor.dtype == out.dtype else out.dtype
    torch.linalg.vector_norm(tensor, dim=dims, keepdim=keepdim, dtype=dtype, out=out)


def _write_transposed(groups: int, tensor: Tensor, out: Tensor) -> None:
    """Write the unit norms of a transposed convolution, first over each kernel, which is contiguous in memory.

    One reduction over all dims takes several times as long on the CPU.
    """
    dtype = None if tensor.dtype == out.dtype else out.dtype
    kernels = torch.linalg.vector_norm(tensor, dim=tuple(range(2, tensor.dim())), dtype=dtype)
    by_group = kernels.view(groups, -1, kernels.shape[1])
    torch.linalg.vector_norm(by_group, dim=1, out=out.view(groups, -1))


def _write_rows(spec: TensorSpec, tensor: Tensor, out: Tensor) -> None:
    rows = unit_rows(tensor, spec)
    _write_over_dims(tuple(range(1, rows.dim())), False, rows, out)


def _write_integers(tensor: Tensor, out: Tensor) -> None:
    """Write the norm of a large integer tensor, converting a bounded part of it at a time."""
    norms = [torch.linalg.vector_norm(part.to(out.dtype)) for part in tensor.reshape(-1).split(_CONVERTED)]
    torch.linalg.vector_norm(torch.stack(norms).view(1, -1), dim=1, out=out)


def _write_in_blocks(spec: TensorSpec, tensor: Tensor, out: Tensor) -> None:
    """Write the norms of wide units as norms of the norms of their blocks, which keeps float32 sums short."""
    flat = unit_rows(tensor, spec).reshape(spec.units, -1)
    blocks, rest = divmod(flat.shape[1], _BLOCK)
    body = flat[:, : blocks * _BLOCK].reshape(spec.units, blocks, _BLOCK)
    dtype = None if flat.dtype == spec.norm_dtype else spec.norm_dtype
    norms = torch.linalg.vector_norm(body, dim=2, dtype=dtype)
    if rest:
        tail = torch.linalg.vector_norm(flat[:, blocks * _BLOCK :], dim=1, keepdim=True, dtype=dtype)
        norms = torch.cat((norms, tail), dim=1)
    if out.device.type == "cpu":
        out.copy_(torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64))  # of 100 million elements they are many
    else:
        torch.linalg.vector_norm(norms, dim=1, out=out)


def _write_sparse(tensor: Tensor, out: Tensor) -> None:
    """Write the row norms of a sparse COO tensor; rows that it does not store are 0."""
    coalesced = tensor.coalesce()
    indices, values = coalesced.indices(), coalesced.values()
    if torch.is_complex(values):
        values = real_view(values)
    squares = values.to(out.dtype).square().reshape(values.shape[0], math.prod(values.shape[1:])).sum(1)
    out.zero_().index_add_(0, indices[0] if out.numel() > 1 else torch.zeros_like(indices[0]), squares).sqrt_()
