"""Buffers that carry unit norms from the device to the collector without either side waiting for the other."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.norms.layout import MeasurementPlan, NormLayout
from gradwatch.norms.reducer import NormReducer, Scratch
from gradwatch.norms.tensor_spec import BufferKey
from gradwatch.norms.triton_reducer import make_reducer

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
    """

    def __init__(
        self,
        plan: MeasurementPlan,
        buffers: "SampleBuffers",
        grad_at: dict[BufferKey, int],
        weight_at: dict[BufferKey, int],
    ) -> None:
        self.plan = plan
        self._buffers = buffers
        self._grad_at = grad_at
        self._weight_at = weight_at
        device = buffers.device
        self.weight_buffers = {key: device[key][weight_at[key] :] for key in plan.weight_layout.sizes}
        """The weights' unit norms on their device."""
        self._weight_reducer: NormReducer = make_reducer(plan.weight_layout, self.weight_buffers, buffers.scratch)
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
            self._grad_reducer = make_reducer(plan.grad_layout, self.grad_buffers, buffers.scratch)

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


class SampleBuffers:
    """The buffers of one sample: on the device, and where the device is not the CPU, pinned on the host as well.

    Args:
        scratch: memory for buckets, shared with other samples.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self.device: dict[BufferKey, Tensor] = {}
        self.host: dict[BufferKey, Tensor] = {}
        self.host_arrays: dict[BufferKey, NDArray[Any]] = {}
        self._used: dict[BufferKey, int] = {}
        """Number of unit norms in each buffer that this sample has allocated."""
        self._allocations: dict[tuple[int, tuple[int, ...]], UnitNorms] = {}
        """(id of plan, start in each buffer) -> allocation of an earlier sample, which is used again."""
        self._events: list[Any] = []
        """Events that are recorded behind the copies to the host."""

    def allocate(self, plan: MeasurementPlan) -> UnitNorms:
        """Return space for ``plan`` after the space that was allocated before for this sample."""
        sizes = plan.sizes
        at = tuple(self._used.get(key, 0) for key in sizes)
        norms = self._allocations.get((id(plan), at))
        if norms is None or norms.plan is not plan:
            grads = plan.grad_layout.sizes if plan.grad_layout is not None else {}
            with torch.inference_mode(False):  # buffers that are made in inference mode are read-only outside of it
                self._grow(sizes)
                grad_at = {key: self._used.get(key, 0) for key in sizes}
                weight_at = {key: grad_at[key] + grads.get(key, 0) for key in sizes}
                if len(self._allocations) >= _ALLOCATIONS:
                    self._allocations.clear()
                norms = self._allocations[id(plan), at] = UnitNorms(plan, self, grad_at, weight_at)
        norms.recomputed_grads, norms.recomputed_weights = {}, {}
        for key, size in sizes.items():
            self._used[key] = self._used.get(key, 0) + size
        return norms

    def send(self) -> None:
        """Start to copy the written norms to the host, without waiting for the copy."""
        for key, tensor in self.device.items():
            if tensor.device.type == "cpu":
                continue
            used = self._used.get(key, 0)
            self.host[key][:used].copy_(tensor[:used], non_blocking=True)
            event = torch.Event(tensor.device.type)
            event.record()
            self._events.append(event)

    def arrived(self) -> bool:
        """Return whether the copy to the host is complete, without waiting for it."""
        return all(event.query() for event in self._events)

    def reset(self) -> None:
        """Free all allocations, for the next sample."""
        self._used.clear()
        self._events.clear()

    @property
    def bytes(self) -> int:
        """Return the size of the buffers on the device."""
        return sum(tensor.nbytes for tensor in self.device.values())

    def _grow(self, sizes: dict[BufferKey, int]) -> None:
        """Enlarge the buffers where ``sizes`` more unit norms do not fit."""
        for key, size in sizes.items():
            needed = self._used.get(key, 0) + size
            old = self.device.get(key)
            if old is not None and old.numel() >= needed:
                continue
            capacity = max(needed, 2 * old.numel() if old is not None else 256)
            grown = torch.zeros(capacity, dtype=key.dtype, device=key.device)
            if old is not None:
                # Norms of this sample are carried over; views of the old buffer are not used again.
                grown[: old.numel()].copy_(old)
                self._allocations.clear()
            self.device[key] = grown
            on_cpu = key.device.type == "cpu"
            self.host[key] = grown if on_cpu else torch.zeros_like(grown, device="cpu").pin_memory()
            self.host_arrays[key] = self.host[key].numpy()


class BufferPool:
    """A bounded supply of buffers for samples: the training thread acquires them, the collector releases them."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._free: deque[SampleBuffers] = deque()
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
            buffers = SampleBuffers(self._scratch)
            self._made += 1
        buffers.reset()
        self._last = buffers
        return buffers

    def release(self, buffers: SampleBuffers) -> None:
        """Take back buffers that were read."""
        self._free.append(buffers)

    @property
    def is_scarce(self) -> bool:
        """Return whether so many buffers are in use that the collector should read them now."""
        return self._made - len(self._free) > min(_SCARCE, self._most // 2)
