"""Unit norms of one tensor, reduced where it lies: one function for each kind of shape and dtype."""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from gradwatch.norms.tensor_spec import WIDEST_ROW, TensorSpec, unit_rows

_BLOCK: Final = 1 << 12
"""Elements of one block of a unit that is wider than ``WIDEST_ROW``."""
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
    if spec.width > WIDEST_ROW:
        return partial(_write_in_blocks, spec)
    if real and spec.dtype.itemsize > 1:
        if len(spec.shape) == 1:
            return partial(_write_over_dims, (0,), True)
        if spec.axis == "transposed" and len(spec.shape) > 2:
            return partial(_write_transposed, spec.groups)
        if spec.axis == "rows" and spec.units > 1:
            return partial(_write_over_dims, tuple(range(1, len(spec.shape))), False)
    return partial(_write_rows, spec)


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
    torch.linalg.vector_norm(norms, dim=1, out=out)


def _write_sparse(tensor: Tensor, out: Tensor) -> None:
    """Write the row norms of a sparse COO tensor; rows that it does not store are 0."""
    coalesced = tensor.coalesce()
    indices, values = coalesced.indices(), coalesced.values()
    if torch.is_complex(values):
        values = torch.view_as_real(values)
    squares = values.to(out.dtype).square().reshape(values.shape[0], math.prod(values.shape[1:])).sum(1)
    out.zero_().index_add_(0, indices[0] if out.numel() > 1 else torch.zeros_like(indices[0]), squares).sqrt_()
