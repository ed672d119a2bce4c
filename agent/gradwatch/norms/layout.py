"""Layouts: in how few reductions the unit norms of many tensors are computed, and where each norm lies in the buffers.

Large tensors are reduced where they lie, small ones together in a bucket: a part of the scratch buffer, as large as the
cache of the processor, that small tensors with rows of one shape are copied to. One operator then reduces all of its
rows. To copy a large tensor would cost more than to launch an operator for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from gradwatch.norms.tensor_spec import BufferKey, TensorSpec, widest_row

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
    return plain and in_order and spec.width <= widest_row(spec.device)


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


CopyGroup = tuple[Reduction, tuple[int, ...]]
"""A reduction, and some positions of its weights."""


class MeasurementPlan:
    """The layouts of some gradients and of their weights, and one order in which the units of both are read.

    Args:
        indices: indices of the parameters in the registry.
        grads: specifications of their gradients; None where only the weights are measured.
        weights: specifications of the weights, in the same order.
    """

    def __init__(
        self, indices: Sequence[int], grads: Sequence[TensorSpec] | None, weights: Sequence[TensorSpec]
    ) -> None:
        self.indices = list(indices)
        self.weight_layout = NormLayout(weights)
        same = grads is not None and tuple(grads) == self.weight_layout.specs
        self.grad_layout = None if grads is None else self.weight_layout if same else NormLayout(grads)
        self.measured = [position for position, spec in enumerate(weights) if spec.units]
        """Positions of the parameters that are not empty, in the order in which their units are read."""
        self.measured.sort(key=self._place)
        self.empty = [index for index, spec in zip(self.indices, weights, strict=True) if not spec.units]
        """Indices of the parameters without elements."""
        self.weight_units = [spec.units for spec in weights]
        """Number of units of each parameter, by position."""
        self.measured_units = [weights[position].units for position in self.measured]
        """Number of units of each measured parameter."""
        self.starts: list[int] = []
        """Where the units of each measured parameter begin."""
        start = 0
        for units in self.measured_units:
            self.starts.append(start)
            start += units
        self.sizes = dict(self.weight_layout.sizes)
        """Number of unit norms in each buffer, gradients and weights together."""
        for buffer, size in (self.grad_layout.sizes if self.grad_layout is not None else {}).items():
            self.sizes[buffer] = self.sizes.get(buffer, 0) + size
        self.accelerators = tuple(dict.fromkeys(key.device for key in self.sizes if key.device.type != "cpu"))
        """Devices of the buffers, without the CPU."""
        self.copy_groups: list[CopyGroup] | None = None
        """Groups of weights that can be copied together; None before ``find_copy_groups`` was called."""
        self._weight_order = None if len(self.weight_layout.sizes) < 2 else self._order(self.weight_layout)
        self._grad_order = self._weight_order if same or self.grad_layout is None else self._order(self.grad_layout)

    def find_copy_groups(self, means: Mapping[str, int], limits: Mapping[str, int], elsewhere: int) -> list[CopyGroup]:
        """Find groups of weights that can be copied together.

        Args:
            means: elements that a group of several parameters may have, by type of device.
            limits: elements that a parameter may have, by type of device; a larger one is in no group.
            elsewhere: both numbers for any other type of device.
        """
        self.copy_groups = []
        for reduction in self.weight_layout.reductions:
            device = reduction.buffer.device.type
            mean, limit = means.get(device, elsewhere), limits.get(device, elsewhere)
            self.copy_groups += [(reduction, group) for group in self._split(reduction, mean, limit)]
        return self.copy_groups

    def _split(self, reduction: Reduction, mean: int, limit: int) -> list[tuple[int, ...]]:
        """Return the positions of a reduction in groups of at most ``mean`` elements, without those over ``limit``."""
        groups: list[tuple[int, ...]] = []
        chosen: list[int] = []
        elements = 0
        for position in () if reduction.spec.sparse else reduction.positions:
            size = math.prod(self.weight_layout.specs[position].shape)
            if chosen and elements + size > mean:
                groups.append(tuple(chosen))
                chosen, elements = [], 0
            if size <= limit:
                chosen.append(position)
                elements += size
        if chosen:
            groups.append(tuple(chosen))
        return groups

    def ordered_grads(self, buffers: dict[BufferKey, NDArray[Any]]) -> NDArray[np.float64]:
        """Return the unit norms of the gradients from the buffers, in the order of ``measured``."""
        assert self.grad_layout is not None
        return _read(self.grad_layout, self._grad_order, buffers)

    def ordered_weights(self, buffers: dict[BufferKey, NDArray[Any]]) -> NDArray[np.float64]:
        """Return the unit norms of the weights from the buffers, in the same order."""
        return _read(self.weight_layout, self._weight_order, buffers)

    def _place(self, position: int) -> tuple[int, int]:
        """Return where the weight's units lie: the place of their buffer among all, and the index there."""
        buffer, offset = self.weight_layout.places[position]
        return list(self.weight_layout.sizes).index(buffer), offset

    def _order(self, layout: NormLayout) -> NDArray[np.intp]:
        """Return the index of each unit in the concatenated buffers of ``layout``."""
        starts = layout.buffer_starts
        spans = []
        for position in self.measured:
            buffer, offset = layout.places[position]
            spans.append(np.arange(layout.specs[position].units) + starts[buffer] + offset)
        return np.concatenate(spans) if spans else np.zeros(0, np.intp)


def _read(
    layout: NormLayout, order: NDArray[np.intp] | None, buffers: dict[BufferKey, NDArray[Any]]
) -> NDArray[np.float64]:
    parts = [buffers[buffer][:size] for buffer, size in layout.sizes.items()]
    joined = np.concatenate(parts, dtype=np.float64) if parts else np.zeros(0)
    return joined if order is None else joined[order]
