"""Unit norms of many tensors in few operators: the one pass that monitoring and clipping share.

A unit is one output row of a tensor (its other dims are reduced); a vector, a gain or a scalar is one unit. Small
tensors whose rows have one shape are gathered in a scratch buffer of cache size and reduced together; a large one is
reduced where it lies, since copying it would cost more than launching for it. What comes out is a flat buffer of unit
norms; a tensor's own norm is the norm of its unit norms, which stays right to 1e-6 where a single float32 sum over the
whole tensor reads low (0.15% at 26 million elements on the CPU).

Nothing here reads a number back from a device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Axis = Literal["rows", "transposed", "experts", "whole"]
"""Where the units of a tensor lie: dim 0, dim 1 (transposed convolutions), dims 0 and 1 (the rows of each expert), or
the tensor is one unit."""

WIDEST_ROW: Final = 1 << 16
"""Elements that one float32 sum may take; wider units are summed in blocks."""
_BLOCK: Final = 1 << 12
MOST_UNITS: Final = 1 << 20
"""Units of one tensor whose norms are kept apart where nothing is clipped by them: 4 MiB a buffer."""
_WIDEST_SERIAL: Final = 1 << 10
"""Elements of a gathered row that one thread sums on the CPU: right to 1e-6 up to here."""
_CONVERTED: Final = 1 << 22
"""Elements of a tensor of integers that are converted at once."""

_DIRECT_BYTES: Final = {"cpu": 1 << 19}
"""From this size a tensor is reduced where it lies. Measured on 2 CPU cores: copying costs 0.7 of reading, a launch
3 microseconds. On an accelerator a launch costs what reading about 16 MiB costs."""
_DIRECT_BYTES_ELSEWHERE: Final = 1 << 24
_SPARED_BYTES: Final = {"cpu": 1 << 16}
"""From this size on, to reduce a tensor where it lies is no slower than to copy it: done while there are operators to
spare. On an accelerator there are none."""
_OPERATORS: Final = 10
_OPERATORS_A_WIDTH: Final = 4
"""For the gradients, and again for the weights."""
_CHUNK_BYTES: Final = {"cpu": 1 << 22}
"""Size of the scratch buffer: what stays in the cache of a CPU."""
_CHUNK_BYTES_ELSEWHERE: Final = 1 << 26


Reducer = Callable[[Tensor, Tensor], None]
"""Writes the unit norms of the tensor to the buffer, shape (units,)."""


class LayoutChangedError(RuntimeError):
    """A tensor has no longer the shape that the layout was made for: make a new one."""


class Spec(NamedTuple):
    """What of a tensor decides how it is reduced."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    axis: Axis = "rows"
    groups: int = 1
    """Of a transposed convolution."""
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
        """Return the type in which its norms are summed: float64 for double precision, float32 for all others."""
        return torch.float64 if self.dtype in (torch.float64, torch.complex128) else torch.float32


def spec_of(tensor: Tensor, axis: Axis, groups: int = 1) -> Spec:
    """Return the specification of ``tensor``."""
    return Spec(tuple(tensor.shape), tensor.dtype, tensor.device, axis, groups, tensor.layout != torch.strided)


class Arena(NamedTuple):
    """A kind of buffer that unit norms are written to: one for each device and type."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """One reduction: some tensors of a list, and the part of the arena that takes their unit norms."""

    positions: tuple[int, ...]
    spec: Spec
    """Of the first of them."""
    arena: Arena
    start: int
    stop: int
    gathered: bool
    elements: int
    """Of its tensors together."""


@dataclass(slots=True)
class Scratch:
    """The buffers that rows are gathered in, one for each device and type, shared by all layouts of an agent."""

    buffers: dict[Arena, Tensor] = field(default_factory=dict)

    def take(self, arena: Arena, elements: int) -> Tensor:
        """Return ``elements`` elements of uninitialised scratch, shape (elements,)."""
        buffer = self.buffers.get(arena)
        if buffer is None or buffer.numel() < elements:
            size = max(elements, _chunk_bytes(arena.device) // arena.dtype.itemsize)
            buffer = self.buffers[arena] = torch.empty(size, dtype=arena.dtype, device=arena.device)
        return buffer[:elements]


class Layout:
    """How the unit norms of a list of tensors are computed, and where each lands.

    Args:
        specs: one for each tensor, in the order in which ``run`` gets them.
        direct_bytes: tensors of this size or more are reduced where they lie; None: by device.
        chunk_bytes: how much is gathered at once; None: by device.
    """

    def __init__(
        self, specs: Sequence[Spec], *, direct_bytes: int | None = None, chunk_bytes: int | None = None
    ) -> None:
        self.specs = tuple(specs)
        self.pieces = _pieces(self.specs, direct_bytes, chunk_bytes)
        self.sizes: dict[Arena, int] = {}
        """Unit norms in each arena."""
        self.places: list[tuple[Arena, int]] = [(Arena(spec.device, spec.norm_dtype), 0) for spec in self.specs]
        """For each tensor, its arena and where its first unit norm lies there."""
        for piece in self.pieces:
            offset = piece.start
            for position in piece.positions:
                self.places[position] = (piece.arena, offset)
                offset += self.specs[position].units
            self.sizes[piece.arena] = max(self.sizes.get(piece.arena, 0), piece.stop)

    def bind(self, arenas: dict[Arena, Tensor], scratch: Scratch) -> "Bound":
        """Return this layout writing to ``arenas``: each of shape (sizes[arena],) or longer."""
        return Bound(self, arenas, scratch)


class Bound:
    """A layout with its buffers; the views of them are made once. No view of a user's tensor is ever kept."""

    def __init__(
        self, layout: Layout, arenas: dict[Arena, Tensor], scratch: Scratch, pieces: Sequence[Piece] | None = None
    ) -> None:
        self.layout = layout
        self._direct: list[tuple[int, tuple[int, ...], Tensor, Reducer]] = []
        """Of each tensor that is reduced where it lies: its position and shape, where its norms go, and how."""
        self._gathered: list[_Gathered] = []
        for piece in layout.pieces if pieces is None else pieces:
            out = arenas[piece.arena][piece.start : piece.stop]
            shape = piece.spec.shape
            if not piece.gathered:
                (position,) = piece.positions
                self._direct.append((position, shape, out, reducer(piece.spec)))
                continue
            shapes = [layout.specs[position].shape for position in piece.positions]
            flat = scratch.take(piece.arena, piece.elements)
            alike = len(set(shapes)) == 1
            self._gathered.append(
                _Gathered(
                    take=itemgetter(*piece.positions),
                    shape=shape,
                    elements=None if alike else list(map(math.prod, shapes)),
                    target=flat.view((len(shapes), *shape) if alike else (-1, *shape[1:])),
                    norms=_row_norms(flat.view(piece.stop - piece.start, -1), out),
                )
            )

    def run(self, tensors: Sequence[Tensor], *, warm: bool = False) -> None:
        """Write the unit norms of ``tensors``, which must be of the layout's specification, in its order.

        Args:
            tensors: all of them.
            warm: whether the scratch buffer was just used and is in the cache still: what is gathered comes first then.

        Raises:
            LayoutChangedError: a tensor has another shape now.
        """
        if warm:
            self._gather(tensors)
        # Shapes are looked at before torch sees them: it would make its output larger, and warn the user of it.
        for position, shape, out, reduce in self._direct:
            tensor = tensors[position]
            if tensor.shape != shape:
                raise LayoutChangedError(f"a tensor is {tuple(tensor.shape)}, not {shape}")
            reduce(tensor, out)
        if not warm:
            self._gather(tensors)

    def _gather(self, tensors: Sequence[Tensor]) -> None:
        for gathered in self._gathered:
            gathered.reduce(tensors)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Tensors that are copied to the scratch buffer and reduced there."""

    take: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    """Takes them from a list of all."""
    shape: tuple[int, ...]
    """Of the first of them."""
    elements: list[int] | None
    """Of each; None where all have one shape."""
    target: Tensor
    """The scratch as it is filled."""
    norms: Callable[[], object]
    """Writes the norms of what is in the scratch."""

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        members = self.take(tensors)
        # Torch looks after the rest: stack that all have one shape, cat that their rows have. It would make the scratch
        # larger for the elements of a longer one.
        if members[0].shape != self.shape:
            raise LayoutChangedError(f"a tensor is {tuple(members[0].shape)}, not {self.shape}")
        if self.elements is None:
            torch.stack(members, out=self.target)
        else:
            if list(map(Tensor.numel, members)) != self.elements:
                raise LayoutChangedError(f"a tensor that is gathered with one of {self.shape} has another shape now")
            torch.cat(members, out=self.target)
        self.norms()


def _row_norms(rows: Tensor, out: Tensor) -> Callable[[], object]:
    """Return what writes the norms of the rows of the scratch buffer.

    On the CPU one thread must do it, the one that copies: what another has read of the scratch must be taken from its
    cache before the next copy is written, which is dear where the two share none. Torch cannot be told so for one
    operator; numpy has one thread.
    """
    if rows.device.type == "cpu" and rows.shape[1] <= _WIDEST_SERIAL:
        return partial(_row_norms_serial, rows.numpy(), out.numpy())
    return partial(torch.linalg.vector_norm, rows, dim=1, out=out)


def _row_norms_serial(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    np.einsum("ij,ij->i", rows, rows, out=out)
    np.sqrt(out, out=out)


def _chunk_bytes(device: torch.device) -> int:
    return _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)


def _pieces(specs: Sequence[Spec], direct_bytes: int | None, chunk_bytes: int | None) -> list[Piece]:
    alone: list[int] = []
    alike: dict[_Row, list[int]] = {}
    for position, spec in enumerate(specs):
        limit = (
            direct_bytes if direct_bytes is not None else _DIRECT_BYTES.get(spec.device.type, _DIRECT_BYTES_ELSEWHERE)
        )
        if not spec.units:
            continue
        if not _can_be_gathered(spec) or _bytes(spec) >= limit:
            alone.append(position)
        else:
            alike.setdefault(_row(spec), []).append(position)
    if direct_bytes is None:
        alone += _spared(specs, len(alone), alike, chunk_bytes)
    chunks = [part for members in alike.values() for part in _chunks(specs, members, chunk_bytes)]
    groups = [(position,) for position in [*alone, *(p for part in chunks if len(part) <= 2 for p in part)]]
    gathered = [part for part in chunks if len(part) > 2]
    sizes: dict[Arena, int] = {}
    pieces: list[Piece] = []
    for positions in [*groups, *gathered]:
        spec = specs[positions[0]]
        arena = Arena(spec.device, spec.norm_dtype)
        start = sizes.get(arena, 0)
        stop = sizes[arena] = start + sum(specs[position].units for position in positions)
        elements = sum(math.prod(specs[position].shape) for position in positions)
        pieces.append(Piece(positions, spec, arena, start, stop, len(pieces) >= len(groups), elements))
    return pieces


_Row = tuple[torch.device, torch.dtype, bool, tuple[int, ...]]
"""What tensors that are gathered together have in common; the third: whether each is one unit."""


def _row(spec: Spec) -> _Row:
    one_unit = spec.axis == "whole" or len(spec.shape) < 2
    return spec.device, spec.dtype, one_unit, spec.shape if one_unit else spec.shape[1:]


def _bytes(spec: Spec) -> int:
    """Return the bytes of a tensor once it is copied."""
    return math.prod(spec.shape) * spec.norm_dtype.itemsize


def _spared(specs: Sequence[Spec], alone: int, alike: dict[_Row, list[int]], chunk_bytes: int | None) -> list[int]:
    """Take from ``alike`` what is reduced where it lies as well, the largest first, while there are operators for it.

    Args:
        specs: of all tensors.
        alone: how many tensors are reduced where they lie already.
        alike: positions of those that are gathered; what is returned is removed.
        chunk_bytes: how much is gathered at once.
    """
    most = _OPERATORS_A_WIDTH * len({spec.width for spec in specs if spec.units}) + _OPERATORS
    candidates = [
        (size, position)
        for members in alike.values()
        for position in members
        if (size := _bytes(specs[position])) >= _SPARED_BYTES.get(specs[position].device.type, math.inf)
    ]
    candidates.sort(key=itemgetter(0))
    taken: list[int] = []
    while candidates:
        launched = sum(_launched(specs, members, chunk_bytes) for members in alike.values())
        spare = most - alone - len(taken) - launched
        if spare <= 0:
            break
        # Each costs one operator at most, and less where it is the last of a chunk: that is counted in the next turn.
        chosen = {position for _, position in candidates[-spare:]}
        del candidates[-spare:]
        taken += sorted(chosen)
        for row, members in alike.items():
            alike[row] = [position for position in members if position not in chosen]
    return taken


def _launched(specs: Sequence[Spec], members: Sequence[int], chunk_bytes: int | None) -> int:
    """Return the operators for tensors that can be gathered: two a chunk, and so for one or two without copying."""
    return sum(min(len(chunk), 2) for chunk in _chunks(specs, members, chunk_bytes))


def _can_be_gathered(spec: Spec) -> bool:
    plain = spec.dtype.is_floating_point and spec.dtype.itemsize > 1 and not spec.sparse
    in_order = spec.axis == "rows" or len(spec.shape) == 1
    return plain and in_order and spec.width <= WIDEST_ROW


def _chunks(specs: Sequence[Spec], members: Sequence[int], chunk_bytes: int | None) -> list[tuple[int, ...]]:
    if not members:
        return []
    spec = specs[members[0]]
    limit = (chunk_bytes or _chunk_bytes(spec.device)) // spec.norm_dtype.itemsize
    chunks: list[list[int]] = []
    elements = limit
    for position in members:
        size = math.prod(specs[position].shape)
        if elements + size > limit:
            chunks.append([])
            elements = 0
        chunks[-1].append(position)
        elements += size
    return [tuple(chunk) for chunk in chunks]


def reducer(spec: Spec) -> Reducer:
    """Return what writes the unit norms of a tensor of this specification, without gathering it first."""
    real = spec.dtype.is_floating_point
    if spec.sparse:
        return _reduce_sparse
    if spec.units == 1 and spec.width > _CONVERTED and not (real or spec.dtype.is_complex):
        return _reduce_converted
    if spec.width > WIDEST_ROW:
        return partial(_reduce_wide, spec)
    if real and spec.dtype.itemsize > 1:
        if len(spec.shape) == 1:
            return partial(_reduce_dims, (0,), True)
        if spec.axis == "transposed" and len(spec.shape) > 2:
            return partial(_reduce_transposed, spec.groups)
        if spec.axis == "rows" and spec.units > 1:
            return partial(_reduce_dims, tuple(range(1, len(spec.shape))), False)
    return partial(_reduce_rows, spec)


def _reduce_dims(dims: tuple[int, ...], keepdim: bool, tensor: Tensor, out: Tensor) -> None:
    wanted = None if tensor.dtype == out.dtype else out.dtype
    torch.linalg.vector_norm(tensor, dim=dims, keepdim=keepdim, dtype=wanted, out=out)


def _reduce_transposed(groups: int, tensor: Tensor, out: Tensor) -> None:
    """Write the unit norms of a transposed convolution: first over each kernel, which lies together in memory.

    Over all dims at once it takes several times as long on the CPU.
    """
    wanted = None if tensor.dtype == out.dtype else out.dtype
    kernels = torch.linalg.vector_norm(tensor, dim=tuple(range(2, tensor.dim())), dtype=wanted)
    by_group = kernels.view(groups, -1, kernels.shape[1])
    torch.linalg.vector_norm(by_group, dim=1, out=out.view(groups, -1))


def _reduce_rows(spec: Spec, tensor: Tensor, out: Tensor) -> None:
    rows = unit_rows(tensor, spec)
    _reduce_dims(tuple(range(1, rows.dim())), False, rows, out)


def _reduce_converted(tensor: Tensor, out: Tensor) -> None:
    norms = [torch.linalg.vector_norm(part.to(out.dtype)) for part in tensor.reshape(-1).split(_CONVERTED)]
    torch.linalg.vector_norm(torch.stack(norms).view(1, -1), dim=1, out=out)


def unit_rows(tensor: Tensor, spec: Spec) -> Tensor:
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


def _reduce_wide(spec: Spec, tensor: Tensor, out: Tensor) -> None:
    flat = unit_rows(tensor, spec).reshape(spec.units, -1)
    blocks, rest = divmod(flat.shape[1], _BLOCK)
    body = flat[:, : blocks * _BLOCK].reshape(spec.units, blocks, _BLOCK)
    wanted = None if flat.dtype == spec.norm_dtype else spec.norm_dtype
    norms = torch.linalg.vector_norm(body, dim=2, dtype=wanted)
    if rest:
        tail = torch.linalg.vector_norm(flat[:, blocks * _BLOCK :], dim=1, keepdim=True, dtype=wanted)
        norms = torch.cat((norms, tail), dim=1)
    torch.linalg.vector_norm(norms, dim=1, out=out)


def _reduce_sparse(tensor: Tensor, out: Tensor) -> None:
    """Write the row norms of a sparse COO tensor; rows that it does not hold are 0."""
    held = tensor.coalesce()
    indices, values = held.indices(), held.values()
    if torch.is_complex(values):
        values = torch.view_as_real(values)
    squares = values.to(out.dtype).square().reshape(values.shape[0], math.prod(values.shape[1:])).sum(1)
    out.zero_().index_add_(0, indices[0] if out.numel() > 1 else torch.zeros_like(indices[0]), squares).sqrt_()
