"""Norms of many tensors in few operators, on their device, without waiting for it.

A *unit* is one output row of a parameter (Brock et al. 2021): dim 0 of a weight, dim 1 of a transposed convolution, the
whole of a bias, gain or scalar. Tensors whose rows have the same shape are concatenated into one scratch buffer and
reduced together; large ones are reduced where they are. Rows are reduced in float32, what follows in float64: a norm of
row norms is right to about 1e-6 where one pass over 100 million float32 reads 1% low.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGE_ELEMENTS = 1 << 16
"""From this size on a tensor is read where it lies: copying it would cost more than an operator of its own."""
_WIDEST_ROW = 1 << 12
"""Longer rows are cut into pieces, for accuracy and so that both cores take part."""


@dataclass(frozen=True)
class UnitShape:
    """How a parameter falls into units."""

    units: int
    axis: int | None
    """The dimension that counts the units; none: the whole tensor is one unit."""

    @classmethod
    def of(cls, shape: Sequence[int], *, transposed: bool = False) -> "UnitShape":
        """Return the units of a parameter of this shape; ``transposed`` for the weight of a ConvTranspose."""
        if len(shape) < 2:
            return cls(1, None)
        axis = 1 if transposed else 0
        return cls(shape[axis], axis)


def rows(tensor: Tensor, unit: UnitShape) -> Tensor:
    """Return the tensor as (units, elements of a unit), real; a view wherever its memory allows one."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if unit.axis is None:
        return tensor.reshape(1, -1)
    if unit.axis != 0:
        tensor = tensor.transpose(0, unit.axis)
    return tensor.flatten(1)


def row_norms(matrix: Tensor) -> Tensor:
    """Return the L2 norm of each row.

    Args:
        matrix: shape (rows, width), real, any floating dtype; an empty row has norm 0.

    Returns:
        Shape (rows,), float32 (float64 for float64); NaN and Inf as IEEE arithmetic has them.
    """
    count, width = matrix.shape
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    if count == 0 or width == 0:
        return torch.zeros(count, dtype=wide, device=matrix.device)
    if width <= _WIDEST_ROW:
        norms: Tensor = torch.linalg.vector_norm(matrix, 2, dim=1, dtype=wide)
        return norms
    whole = width - width % _WIDEST_ROW
    pieces = matrix[:, :whole].unflatten(1, (-1, _WIDEST_ROW))
    parts = torch.linalg.vector_norm(pieces, 2, dim=2, dtype=wide).double().square_().sum(1)
    if whole < width:
        parts += torch.linalg.vector_norm(matrix[:, whole:], 2, dim=1, dtype=wide).double().square_()
    pieced: Tensor = parts.sqrt_().to(wide)
    return pieced


@dataclass(frozen=True)
class _Group:
    """Small tensors whose rows have one shape: concatenated, then reduced together."""

    members: tuple[int, ...]
    out: Tensor
    """Part of the unit buffer, shape (rows,)."""
    scratch: Tensor
    """Shape (rows, *row), or flat for tensors of one dimension; float32 or wider."""


@dataclass(frozen=True)
class _Single:
    """A tensor that is reduced by itself: large, or in a form that does not concatenate."""

    member: int
    out: Tensor
    unit: UnitShape


class UnitNorms:
    """Unit norms of a fixed list of tensors, into one preallocated buffer.

    The buffer, shape (units of all tensors,), float64, lies on the tensors' device, in an order of its own: ``owner``
    holds the index of the tensor that each entry belongs to. The tensors are given anew at each call: nothing of a
    former step is kept. All must have the shapes and dtypes that the plan was made with.
    """

    def __init__(self, tensors: Sequence[Tensor], units: Sequence[UnitShape]) -> None:
        device = tensors[0].device
        together: dict[tuple[tuple[int, ...], int | None, torch.dtype], list[int]] = {}
        alone: list[int] = []
        for index, (tensor, unit) in enumerate(zip(tensors, units, strict=True)):
            plain = tensor.layout == torch.strided and not tensor.is_complex() and tensor.ndim > 0
            row = tensor.shape[1:] if unit.axis == 0 else tensor.shape if unit.axis is None else None
            small = tensor.numel() < _LARGE_ELEMENTS and tensor.numel() > 0
            if plain and small and row is not None and (unit.axis == 0 or tensor.ndim == 1):
                wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                together.setdefault((tuple(row), unit.axis, wide), []).append(index)
            else:
                alone.append(index)
        total = sum(unit.units for unit in units)
        self.buffer = torch.zeros(total, dtype=torch.float64, device=device)
        owner: list[Tensor] = []
        self.first = [0] * len(tensors)
        self._groups: list[_Group] = []
        self._singles: list[_Single] = []
        position = 0
        for (shape, axis, wide), members in together.items():
            counts = [units[index].units for index in members]
            end = position + sum(counts)
            scratch = torch.empty((sum(counts), *shape), dtype=wide, device=device)
            shaped = scratch.flatten() if axis is None else scratch
            self._groups.append(_Group(tuple(members), self.buffer[position:end], shaped))
            for index, count in zip(members, counts, strict=True):
                self.first[index] = position
                position += count
                owner.append(torch.full((count,), index))
        for index in alone:
            end = position + units[index].units
            self._singles.append(_Single(index, self.buffer[position:end], units[index]))
            self.first[index] = position
            owner.append(torch.full((units[index].units,), index))
            position = end
        self.owner = torch.cat(owner).to(device) if owner else torch.empty(0, dtype=torch.int64, device=device)

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Measure the tensors and return the buffer; it is overwritten by the next call."""
        for group in self._groups:
            torch.cat([tensors[index] for index in group.members], out=group.scratch)
            matrix = group.scratch.view(group.out.shape[0], -1)
            group.out.copy_(row_norms(matrix))
        for single in self._singles:
            tensor = tensors[single.member]
            if tensor.layout != torch.strided:
                _sparse_rows(tensor, single.out)
            else:
                single.out.copy_(row_norms(rows(tensor, single.unit)))
        return self.buffer


def _sparse_rows(tensor: Tensor, out: Tensor) -> None:
    """Measure the rows of a sparse gradient; rows that it does not hold are zero."""
    merged = tensor.coalesce()
    values, indices = merged.values(), merged.indices()
    out.zero_()
    if merged.sparse_dim() == 1 and out.shape[0] == tensor.shape[0]:
        out.index_copy_(0, indices[0], row_norms(values.reshape(values.shape[0], -1)).double())
    else:
        squares = row_norms(values.reshape(values.shape[0], -1)).double().square_()
        target = indices[0] if out.shape[0] == tensor.shape[0] else torch.zeros_like(indices[0])
        out.index_add_(0, target, squares).sqrt_()
