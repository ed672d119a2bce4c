"""How a set of parameters with gradients is measured, and in which order their unit norms are read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.norms.layout import NormLayout, Reduction
from gradwatch.norms.tensor_spec import BufferKey, TensorSpec

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
