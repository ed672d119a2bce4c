"""Where the norm of each unit of a list of tensors lies in the buffers."""

from collections.abc import Sequence
from typing import Any

from gradwatch.norms.grouping import group_tensors
from gradwatch.norms.tensor_spec import BufferKey, TensorSpec


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
