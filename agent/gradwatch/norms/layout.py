"""Layouts: in how few reductions the unit norms of many tensors are computed, and where each norm lies in the buffers.

Large tensors are reduced where they lie, small ones together in a bucket: a part of the scratch buffer, as large as the
cache of the processor, that small tensors with rows of one shape are copied to. One operator then reduces all of its
rows. To copy a large tensor would cost more than to launch an operator for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import torch

from gradwatch.norms.tensor_spec import WIDEST_ROW, BufferKey, TensorSpec

_DIRECT_BYTES: Final = {"cpu": 1 << 19}
"""Bytes from which a tensor is reduced where it lies. Measured on 2 CPU cores: copying takes 0.7 times as long as
reading, a launch 3 microseconds. On an accelerator a launch takes as long as reading about 16 MiB."""
_DIRECT_BYTES_ELSEWHERE: Final = 1 << 24
_DIRECT_WITHIN_BUDGET_BYTES: Final = {"cpu": 1 << 16}
"""Bytes from which reducing a tensor where it lies is no slower than copying it. Such tensors are reduced where they
lie as long as the operator budget allows. On an accelerator none is."""
_OPERATORS: Final = 10
_OPERATORS_A_WIDTH: Final = 4
"""Operator budget for each unit width and for all, for the gradients and again for the weights."""
_BUCKET_BYTES: Final = {"cpu": 1 << 22}
"""Size of a bucket: what stays in the cache of a CPU."""
_BUCKET_BYTES_ELSEWHERE: Final = 1 << 26


@dataclass(frozen=True, slots=True)
class Reduction:
    """One or several tensors of a list that are reduced together, and the span of the buffer for their unit norms."""

    positions: tuple[int, ...]
    spec: TensorSpec
    """Specification of the first tensor."""
    buffer: BufferKey
    start: int
    stop: int
    in_bucket: bool
    """Whether the tensors are copied to a bucket; otherwise there is one, which is reduced where it lies."""
    elements: int
    """Number of elements of all tensors together."""


def default_bucket_bytes(device: torch.device) -> int:
    """Return the size of a bucket on a device."""
    return _BUCKET_BYTES.get(device.type, _BUCKET_BYTES_ELSEWHERE)


def group_tensors(specs: Sequence[TensorSpec], direct_bytes: int | None, bucket_bytes: int | None) -> list[Reduction]:
    """Return the reductions that compute the unit norms of all tensors that are not empty.

    Args:
        specs: one for each tensor.
        direct_bytes: tensors of this size or more are reduced where they lie; None: by device.
        bucket_bytes: size of a bucket; None: by device.
    """
    # 1. Which tensors are reduced where they lie, and which may share a bucket.
    direct, by_row = _split_by_size(specs, direct_bytes)
    if direct_bytes is None:
        direct += _move_to_direct(specs, len(direct), by_row, bucket_bytes)
    # 2. Buckets. One or two tensors are not worth a copy.
    buckets = [bucket for members in by_row.values() for bucket in _fill_buckets(specs, members, bucket_bytes)]
    direct += [position for bucket in buckets if len(bucket) <= 2 for position in bucket]
    # 3. One span of a buffer for each, in this order.
    stops: dict[BufferKey, int] = {}
    reductions = [_reduction(specs, (position,), stops, in_bucket=False) for position in direct]
    reductions += [_reduction(specs, bucket, stops, in_bucket=True) for bucket in buckets if len(bucket) > 2]
    return reductions


def _reduction(
    specs: Sequence[TensorSpec], positions: tuple[int, ...], stops: dict[BufferKey, int], *, in_bucket: bool
) -> Reduction:
    """Return the reduction of some tensors; its span begins where the last one in its buffer stopped."""
    spec = specs[positions[0]]
    start = stops.get(spec.buffer, 0)
    stop = stops[spec.buffer] = start + sum(specs[position].units for position in positions)
    elements = sum(math.prod(specs[position].shape) for position in positions)
    return Reduction(positions, spec, spec.buffer, start, stop, in_bucket, elements)


_Row = tuple[torch.device, torch.dtype, bool, tuple[int, ...]]
"""Properties that the tensors in one bucket share: device, dtype, whether each is one unit, and the shape of a row."""


def _row(spec: TensorSpec) -> _Row:
    one_unit = spec.axis == "whole" or len(spec.shape) < 2
    return spec.device, spec.dtype, one_unit, spec.shape if one_unit else spec.shape[1:]


def _split_by_size(specs: Sequence[TensorSpec], direct_bytes: int | None) -> tuple[list[int], dict[_Row, list[int]]]:
    """Return the positions of tensors that are reduced where they lie, and those that may share a bucket by row."""
    direct: list[int] = []
    by_row: dict[_Row, list[int]] = {}
    for position, spec in enumerate(specs):
        default = _DIRECT_BYTES.get(spec.device.type, _DIRECT_BYTES_ELSEWHERE)
        limit = default if direct_bytes is None else direct_bytes
        if not spec.units:
            continue
        if not _fits_bucket(spec) or _copied_bytes(spec) >= limit:
            direct.append(position)
        else:
            by_row.setdefault(_row(spec), []).append(position)
    return direct, by_row


def _fits_bucket(spec: TensorSpec) -> bool:
    plain = spec.dtype.is_floating_point and spec.dtype.itemsize > 1 and not spec.sparse
    in_order = spec.axis == "rows" or len(spec.shape) == 1
    return plain and in_order and spec.width <= WIDEST_ROW


def _copied_bytes(spec: TensorSpec) -> int:
    """Return the size of a tensor once it is copied to a bucket, where it has the dtype of its norms."""
    return math.prod(spec.shape) * spec.norm_dtype.itemsize


def _move_to_direct(
    specs: Sequence[TensorSpec], direct: int, by_row: dict[_Row, list[int]], bucket_bytes: int | None
) -> list[int]:
    """Return the positions of further tensors to reduce where they lie, the largest first, within the operator budget.

    Args:
        specs: specifications of all tensors.
        direct: number of tensors that are reduced where they lie in any case.
        by_row: positions of those that may share a bucket; the returned positions are removed.
        bucket_bytes: size of a bucket; None: by device.
    """
    budget = _OPERATORS_A_WIDTH * len({spec.width for spec in specs if spec.units}) + _OPERATORS
    candidates = [
        (size, position)
        for members in by_row.values()
        for position in members
        if (size := _copied_bytes(specs[position]))
        >= _DIRECT_WITHIN_BUDGET_BYTES.get(specs[position].device.type, math.inf)
    ]
    candidates.sort(key=itemgetter(0))
    moved: list[int] = []
    while candidates:
        launched = sum(_launched(specs, members, bucket_bytes) for members in by_row.values())
        left = budget - direct - len(moved) - launched
        if left <= 0:
            break
        # Each costs one operator at most, and less where it is the last of a bucket: the next turn counts that.
        chosen = {position for _, position in candidates[-left:]}
        del candidates[-left:]
        moved += sorted(chosen)
        for row, members in by_row.items():
            by_row[row] = [position for position in members if position not in chosen]
    return moved


def _launched(specs: Sequence[TensorSpec], members: Sequence[int], bucket_bytes: int | None) -> int:
    """Return the number of operators for tensors of one row: two for each bucket, one for each tensor outside."""
    return sum(min(len(bucket), 2) for bucket in _fill_buckets(specs, members, bucket_bytes))


def _fill_buckets(
    specs: Sequence[TensorSpec], members: Sequence[int], bucket_bytes: int | None
) -> list[tuple[int, ...]]:
    """Return the positions of tensors of one row, bucket by bucket."""
    if not members:
        return []
    spec = specs[members[0]]
    limit = (bucket_bytes or default_bucket_bytes(spec.device)) // spec.norm_dtype.itemsize
    buckets: list[list[int]] = []
    elements = limit
    for position in members:
        size = math.prod(specs[position].shape)
        if elements + size > limit:
            buckets.append([])
            elements = 0
        buckets[-1].append(position)
        elements += size
    return [tuple(bucket) for bucket in buckets]


class NormLayout:
    """How the unit norms of a list of tensors are computed, and where each lies in the buffers.

    Args:
        specs: one for each tensor, in the order in which a reducer gets them.
        direct_bytes: tensors of this size or more are reduced where they lie; None: by device.
        bucket_bytes: size of a bucket, in which small tensors are reduced together; None: by device.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], *, direct_bytes: int | None = None, bucket_bytes: int | None = None
    ) -> None:
        self.specs = tuple(specs)
        self.reductions = group_tensors(self.specs, direct_bytes, bucket_bytes)
        self.sizes: dict[BufferKey, int] = {}
        """Number of unit norms in each buffer."""
        self.reducer_class: Any = None
        """What reduces tensors of this layout, once ``triton_reducer.reducer_class`` has chosen it."""
        self.places: list[tuple[BufferKey, int]] = [(spec.buffer, 0) for spec in self.specs]
        """For each tensor, its buffer and the index of its first unit norm there."""
        for reduction in self.reductions:
            offset = reduction.start
            for position in reduction.positions:
                self.places[position] = (reduction.buffer, offset)
                offset += self.specs[position].units
            self.sizes[reduction.buffer] = max(self.sizes.get(reduction.buffer, 0), reduction.stop)

    @property
    def buffer_starts(self) -> dict[BufferKey, int]:
        """Return where each buffer begins when all are concatenated in the order of ``sizes``."""
        starts, total = {}, 0
        for buffer, size in self.sizes.items():
            starts[buffer] = total
            total += size
        return starts
