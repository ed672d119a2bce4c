"""Buffers that carry the unit norms of a sample to the collector: neither the device nor the collector waits."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.norms.layout import MeasurementPlan, NormLayout
from gradwatch.norms.reducer import NormReducer, Scratch
from gradwatch.norms.streams import StreamLog, stream_ids
from gradwatch.norms.tensor_spec import BufferKey
from gradwatch.norms.transfer import Stamps, Transfer
from gradwatch.norms.triton_reducer import reducer_class

_POOL_BYTES: Final = 32 << 20
_OBJECT_BYTES: Final = 16 << 10
"""Memory that a sample takes beside its buffers, about. Tiny models take some thousand steps a second: up to 2,048
samples wait while a disk holds the collector up."""
_FEWEST: Final = 4
"""Samples that may wait, however large they are."""
_SCARCE: Final = 64
"""Number of waiting samples from which the collector is woken before its time."""
_ALLOCATIONS: Final = 4096
"""Allocations that a sample's buffers remember, so that views of them are not made again."""


class UnitNorms:
    """The unit norms of one plan in the buffers of a sample: written on their device, read on the host.

    Args:
        plan: says which norms there are.
        buffers: the buffers of the sample.
        grad_at: index of the gradients' first unit norm in each buffer.
        weight_at: index of the weights' first unit norm in each buffer.
        scratch: memory for buckets.
    """

    def __init__(
        self,
        plan: MeasurementPlan,
        buffers: "SampleBuffers",
        grad_at: dict[BufferKey, int],
        weight_at: dict[BufferKey, int],
        scratch: Scratch,
    ) -> None:
        self.plan = plan
        self._buffers = buffers
        self._grad_at = grad_at
        self._weight_at = weight_at
        device = buffers.device
        self.weight_buffers = {key: device[key][weight_at[key] :] for key in plan.weight_layout.sizes}
        """The weights' unit norms on their device."""
        self._weight_reducer: NormReducer = make_reducer(plan.weight_layout, self.weight_buffers, scratch)
        self.grad_buffers: dict[BufferKey, Tensor] = {}
        """The gradients' unit norms on their device."""
        self._grad_reducer: NormReducer | None = None
        self.recomputed_grads: dict[int, NDArray[np.float64]] = {}
        """Unit norms of gradients whose squares float32 does not hold, by place in the plan's order.

        They are kept beside the buffers: AGC clips by the buffers, whether a step is sampled or not."""
        self.recomputed_weights: dict[int, NDArray[np.float64]] = {}
        """The same for weights."""
        if plan.grad_layout is not None:
            self.grad_buffers = {key: device[key][grad_at[key] :] for key in plan.grad_layout.sizes}
            self._grad_reducer = make_reducer(plan.grad_layout, self.grad_buffers, scratch)

    def measure(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Write the unit norms of gradients and weights, which must be of the plan's specifications, in its order.

        Raises:
            LayoutChangedError: a tensor has another shape now.
        """
        assert self._grad_reducer is not None
        self._grad_reducer.run(grads)
        self._weight_reducer.run(weights, warm=True)

    def measure_weights(self, weights: Sequence[Tensor]) -> None:
        """Write the unit norms of weights alone, as ``measure`` does."""
        self._weight_reducer.run(weights)

    def grad_units(self) -> NDArray[np.float64]:
        """Return the gradients' unit norms in the plan's order, shape (units,). They must have arrived on the host."""
        assert self.plan.grad_layout is not None
        arrays = self._host_arrays(self.plan.grad_layout, self._grad_at)
        return self._with_recomputed(self.plan.ordered_grads(arrays), self.recomputed_grads)

    def weight_units(self) -> NDArray[np.float64]:
        """Return the weights' unit norms in the plan's order, shape (units,). They must have arrived on the host."""
        arrays = self._host_arrays(self.plan.weight_layout, self._weight_at)
        return self._with_recomputed(self.plan.ordered_weights(arrays), self.recomputed_weights)

    def raw_grads(self) -> list[NDArray[Any]]:
        """Return the gradients' unit norms without a copy: one array for each buffer, in the order of the buffer."""
        assert self.plan.grad_layout is not None
        return list(self._host_arrays(self.plan.grad_layout, self._grad_at).values())

    def raw_weights(self) -> list[NDArray[Any]]:
        """Return the weights' unit norms without a copy: one array for each buffer, in the order of the buffer."""
        return list(self._host_arrays(self.plan.weight_layout, self._weight_at).values())

    def _host_arrays(self, layout: NormLayout, at: Mapping[BufferKey, int]) -> dict[BufferKey, NDArray[Any]]:
        host = self._buffers.host_arrays
        return {key: host[key][at[key] :][:size] for key, size in layout.sizes.items()}

    def _with_recomputed(
        self, units: NDArray[np.float64], recomputed: Mapping[int, NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        for place, norms in recomputed.items():
            start = self.plan.starts[place]
            units[start : start + norms.size] = norms
        return units


class ScratchMemory:
    """Memory for buckets, shared by the samples of an agent. Streams that nothing orders have memory of their own."""

    def __init__(self) -> None:
        self._by_streams: dict[tuple[int, ...], Scratch] = {}

    def on(self, streams: tuple[int, ...]) -> Scratch:
        """Return the memory of some current streams, as ``stream_ids`` tells them."""
        scratch = self._by_streams.get(streams)
        if scratch is None:
            scratch = self._by_streams[streams] = Scratch()
        return scratch


class SampleBuffers(Transfer):
    """The buffers of one sample, in which the unit norms of several plans find space.

    Args:
        stamps: shared by all samples of an agent.
        streams: those on which the training's numbers are launched.
        scratch: memory for buckets, shared with other samples.
    """

    def __init__(self, stamps: Stamps, streams: StreamLog, scratch: ScratchMemory) -> None:
        super().__init__(stamps, streams)
        self._scratch = scratch
        self._allocations: dict[tuple[int, tuple[int, ...], tuple[int, ...]], UnitNorms] = {}
        """(id of plan, start in each buffer, streams) -> allocation of an earlier sample, which is used again."""

    def allocate(self, plan: MeasurementPlan) -> UnitNorms:
        """Return space for ``plan`` after the space that was allocated before for this sample."""
        sizes = plan.sizes
        at = tuple(self._used.get(key, 0) for key in sizes)
        place = id(plan), at, stream_ids(plan.accelerators) if plan.accelerators else ()
        norms = self._allocations.get(place)
        if norms is None or norms.plan is not plan:
            norms = self._make(plan, place[2])
            if len(self._allocations) >= _ALLOCATIONS:
                self._allocations.clear()
            self._allocations[place] = norms
        norms.recomputed_grads, norms.recomputed_weights = {}, {}
        for key, size in sizes.items():
            self._used[key] = self._used.get(key, 0) + size
        return norms

    def _replaced(self) -> None:
        self._allocations.clear()  # they hold views of the buffer that was replaced

    @torch.inference_mode(False)  # as the buffers are
    def _make(self, plan: MeasurementPlan, streams: tuple[int, ...]) -> UnitNorms:
        self._grow(plan.sizes)
        grads = plan.grad_layout.sizes if plan.grad_layout is not None else {}
        grad_at = {key: self._used.get(key, 0) for key in plan.sizes}
        weight_at = {key: grad_at[key] + grads.get(key, 0) for key in plan.sizes}
        return UnitNorms(plan, self, grad_at, weight_at, self._scratch.on(streams))


class BufferPool:
    """A bounded supply of buffers: the training thread acquires them, the collector releases them.

    Args:
        streams: those on which the training's numbers are launched.
    """

    def __init__(self, streams: StreamLog) -> None:
        self.before_reuse: Callable[[], None] = _nothing
        """Called before the numbers of a step that came from a device are overwritten by another's."""
        self._streams = streams
        self._stamps = Stamps()
        self._scratch = ScratchMemory()
        self._free: deque[SampleBuffers] = deque()
        self._free_transfers: deque[Transfer] = deque()
        """For the numbers of steps that are not sampled; there are as many as steps wait for the collector."""
        self._made = 0
        self._most = _POOL_BYTES // _OBJECT_BYTES
        self._last: SampleBuffers | None = None
        """The buffers acquired last. They are filled by the time the next are acquired, and tell how large one is."""

    def acquire(self) -> SampleBuffers | None:
        """Return free buffers, or None where all are in use and the sample must be dropped."""
        if self._last is not None:
            self._most = max(_FEWEST, _POOL_BYTES // (self._last.bytes + _OBJECT_BYTES))
        try:
            buffers = self._free.pop()  # the ones used last: their memory is still in the cache of the processor
        except IndexError:
            if self._made >= self._most:
                return None
            buffers = SampleBuffers(self._stamps, self._streams, self._scratch)
            self._made += 1
        else:
            if self._streams.used:
                self.before_reuse()
        buffers.reset()
        self._last = buffers
        return buffers

    def acquire_transfer(self) -> Transfer:
        """Return a transfer for the numbers of a step that is not sampled."""
        try:
            transfer = self._free_transfers.pop()
        except IndexError:
            return Transfer(self._stamps, self._streams)
        if self._streams.used:
            self.before_reuse()
        transfer.reset()
        return transfer

    def release(self, buffers: Transfer) -> None:
        """Take back buffers that were read."""
        if isinstance(buffers, SampleBuffers):
            self._free.append(buffers)
        else:
            self._free_transfers.append(buffers)

    def abandon(self, buffers: Transfer) -> None:
        """Make room for buffers whose numbers have not arrived: the device may still write to these."""
        if isinstance(buffers, SampleBuffers):
            self._made -= 1

    @property
    def is_scarce(self) -> bool:
        """Return whether so many buffers are in use that the collector should read them now."""
        return self._made - len(self._free) > min(_SCARCE, self._most // 2)


def _nothing() -> None:
    """Do nothing: nobody looks at the numbers."""


def make_reducer(layout: NormLayout, buffers: dict[BufferKey, Tensor], scratch: Scratch) -> NormReducer:
    """Return a reducer that writes to ``buffers``, by the Triton kernels where they can be used."""
    reducer: NormReducer = (layout.reducer_class or reducer_class(layout))(layout, buffers, scratch)
    return reducer
