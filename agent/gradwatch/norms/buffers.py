"""Buffers that carry unit norms from the device to the collector without either side waiting for the other."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.norms import kernels
from gradwatch.norms.layout import Arena, Bound, Layout, Piece, Scratch, Spec

_BUDGET_BYTES: Final = 32 << 20
_OBJECT_BYTES: Final = 16 << 10
"""What a slot takes beside its buffers, about. Tiny models take some thousand steps a second: up to 2,048 samples wait
while a disk holds the collector up."""
_FEWEST: Final = 4
_SCARCE: Final = 64
"""Slots on their way from which the collector is woken before its time."""


class Plan:
    """How a set of parameters with gradients is measured, and how its buffers are read.

    Args:
        indices: of the parameters in the registration.
        grads: specifications of their gradients; None where only the weights are measured.
        weights: of themselves.
    """

    def __init__(self, indices: Sequence[int], grads: Sequence[Spec] | None, weights: Sequence[Spec]) -> None:
        self.indices = list(indices)
        self.weights = Layout(weights)
        same = grads is not None and tuple(grads) == self.weights.specs
        self.grads = None if grads is None else self.weights if same else Layout(grads)
        self.measured = [position for position, spec in enumerate(weights) if spec.units]
        """Positions of those that are not empty, in the order in which ``ordered`` gives their units."""
        self.empty = [index for index, spec in zip(self.indices, weights, strict=True) if not spec.units]
        self.starts: list[int] = []
        """Where the units of each of them begin."""
        start = 0
        self.measured.sort(key=lambda position: self._place(position, self.weights))
        for position in self.measured:
            self.starts.append(start)
            start += weights[position].units
        self.measured_units = [weights[position].units for position in self.measured]
        """Number of units of each of them."""
        self._parts: list[tuple[Piece, tuple[int, ...]]] | None = None
        self._weight_order = None if len(self.weights.sizes) < 2 else self._order(self.weights)
        self._grad_order = self._weight_order if same or self.grads is None else self._order(self.grads)

    def sizes(self) -> dict[Arena, int]:
        """Return the room that it needs in each arena, gradients and weights together."""
        sizes = dict(self.weights.sizes)
        for arena, size in (self.grads.sizes if self.grads is not None else {}).items():
            sizes[arena] = sizes.get(arena, 0) + size
        return sizes

    def parts(
        self, means: Mapping[str, int], limits: Mapping[str, int], elsewhere: int
    ) -> list[tuple[Piece, tuple[int, ...]]]:
        """Return the weights in parts that can be copied: pieces, each with some of its positions.

        Args:
            means: elements that a part of several parameters may have, by type of device.
            limits: elements that a parameter may have, by type of device; a larger one is in no part.
            elsewhere: both for any other device.
        """
        if self._parts is None:
            self._parts = []
            for piece in self.weights.pieces:
                kind = piece.arena.device.type
                mean, limit = means.get(kind, elsewhere), limits.get(kind, elsewhere)
                chosen: list[int] = []
                elements = 0
                for position in () if piece.spec.sparse else piece.positions:
                    size = math.prod(self.weights.specs[position].shape)
                    if chosen and elements + size > mean:
                        self._parts.append((piece, tuple(chosen)))
                        chosen, elements = [], 0
                    if size <= limit:
                        chosen.append(position)
                        elements += size
                if chosen:
                    self._parts.append((piece, tuple(chosen)))
        return self._parts

    def ordered_grads(self, arenas: dict[Arena, NDArray[Any]]) -> NDArray[np.float64]:
        """Return the norms of the gradients' units from the buffers they were written to."""
        assert self.grads is not None
        return _read(self.grads, self._grad_order, arenas)

    def ordered_weights(self, arenas: dict[Arena, NDArray[Any]]) -> NDArray[np.float64]:
        """Return the norms of the weights' units, in the same order."""
        return _read(self.weights, self._weight_order, arenas)

    @staticmethod
    def _place(position: int, layout: Layout) -> tuple[int, int]:
        arena, offset = layout.places[position]
        return list(layout.sizes).index(arena), offset

    def _order(self, layout: Layout) -> NDArray[np.intp]:
        """Return where each unit lies in the concatenated arenas of ``layout``."""
        base: dict[Arena, int] = {}
        total = 0
        for arena, size in layout.sizes.items():
            base[arena] = total
            total += size
        spans = []
        for position in self.measured:
            arena, offset = layout.places[position]
            spans.append(np.arange(layout.specs[position].units) + base[arena] + offset)
        return np.concatenate(spans) if spans else np.zeros(0, np.intp)


def _read(layout: Layout, order: NDArray[np.intp] | None, arenas: dict[Arena, NDArray[Any]]) -> NDArray[np.float64]:
    parts = [arenas[arena][:size] for arena, size in layout.sizes.items()]
    joined = np.concatenate(parts, dtype=np.float64) if parts else np.zeros(0)
    return joined if order is None else joined[order]


class Claim:
    """A part of a slot: the gradients' and the weights' unit norms of one plan."""

    def __init__(self, plan: Plan, slot: "Slot", grad_at: dict[Arena, int], weight_at: dict[Arena, int]) -> None:
        self.plan = plan
        self._slot = slot
        self._grad_at = grad_at
        self._weight_at = weight_at
        device = slot.device
        self.weight_arenas = {arena: device[arena][weight_at[arena] :] for arena in plan.weights.sizes}
        """Where the weights' unit norms are written, on their device."""
        self.weights: Bound = kernels.bind(plan.weights, self.weight_arenas, slot.scratch)
        self.grad_arenas: dict[Arena, Tensor] = {}
        """Where those of the gradients are."""
        self.grads: Bound | None = None
        self.grad_repairs: dict[int, NDArray[np.float64]] = {}
        """Norms of the units of those gradients whose squares float32 does not hold, by place in the plan's order.

        Beside the buffers: AGC clips by what is there, whether a step is sampled or not."""
        self.weight_repairs: dict[int, NDArray[np.float64]] = {}
        """The same of the weights."""
        if plan.grads is not None:
            self.grad_arenas = {arena: device[arena][grad_at[arena] :] for arena in plan.grads.sizes}
            self.grads = kernels.bind(plan.grads, self.grad_arenas, slot.scratch)

    def run(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Write the unit norms of gradients and weights, which must be of the plan's specifications, in its order.

        Raises:
            LayoutChangedError: a tensor has another shape now.
        """
        assert self.grads is not None
        self.grads.run(grads)
        self.weights.run(weights, warm=True)

    def grad_units(self) -> NDArray[np.float64]:
        """Return the norms of the gradients' units in the plan's order, once they have arrived."""
        assert self.plan.grads is not None
        host = self._slot.host_arrays
        places = {arena: host[arena][self._grad_at[arena] :] for arena in self.plan.grads.sizes}
        return self._put_right(self.plan.ordered_grads(places), self.grad_repairs)

    def weight_units(self) -> NDArray[np.float64]:
        """Return the norms of the weights' units in the plan's order, once they have arrived."""
        host = self._slot.host_arrays
        places = {arena: host[arena][self._weight_at[arena] :] for arena in self.plan.weights.sizes}
        return self._put_right(self.plan.ordered_weights(places), self.weight_repairs)

    def raw_grads(self) -> list[NDArray[Any]]:
        """Return the norms of the gradients' units as they lie in the buffers: no copy, any order, either float."""
        assert self.plan.grads is not None
        return self._raw(self.plan.grads, self._grad_at)

    def raw_weights(self) -> list[NDArray[Any]]:
        """Return the norms of the weights' units in the same way."""
        return self._raw(self.plan.weights, self._weight_at)

    def _raw(self, layout: Layout, at: Mapping[Arena, int]) -> list[NDArray[Any]]:
        return [self._slot.host_arrays[arena][at[arena] :][:size] for arena, size in layout.sizes.items()]

    def _put_right(self, units: NDArray[np.float64], repairs: Mapping[int, NDArray[np.float64]]) -> NDArray[np.float64]:
        for place, repaired in repairs.items():
            start = self.plan.starts[place]
            units[start : start + repaired.size] = repaired
        return units


class Slot:
    """The buffers of one sample: on the device, and where the device is not the CPU, pinned on the host."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self.device: dict[Arena, Tensor] = {}
        self.host: dict[Arena, Tensor] = {}
        self.host_arrays: dict[Arena, NDArray[Any]] = {}
        self._used: dict[Arena, int] = {}
        self._claims: dict[tuple[int, tuple[int, ...]], Claim] = {}
        self._events: list[Any] = []

    def claim(self, plan: Plan) -> Claim:
        """Return room for ``plan`` behind what was claimed before in this round."""
        sizes = plan.sizes()
        at = tuple(self._used.get(arena, 0) for arena in sizes)
        claim = self._claims.get((id(plan), at))
        if claim is None or claim.plan is not plan:
            grads = plan.grads.sizes if plan.grads is not None else {}
            with torch.inference_mode(False):  # what is made within could not be written to outside
                self._make_room(sizes)
                grad_at = {arena: self._used.get(arena, 0) for arena in sizes}
                weight_at = {arena: grad_at[arena] + grads.get(arena, 0) for arena in sizes}
                if len(self._claims) >= 4096:
                    self._claims.clear()
                claim = self._claims[id(plan), at] = Claim(plan, self, grad_at, weight_at)
        claim.grad_repairs, claim.weight_repairs = {}, {}
        for arena, size in sizes.items():
            self._used[arena] = self._used.get(arena, 0) + size
        return claim

    def send(self) -> None:
        """Start the copy to the host of what was written; it is not waited for."""
        for arena, tensor in self.device.items():
            if tensor.device.type == "cpu":
                continue
            used = self._used.get(arena, 0)
            self.host[arena][:used].copy_(tensor[:used], non_blocking=True)
            event = torch.Event(tensor.device.type)
            event.record()
            self._events.append(event)

    def arrived(self) -> bool:
        """Return whether the copy is complete, without waiting for it."""
        return all(event.query() for event in self._events)

    def reset(self) -> None:
        """Forget the round."""
        self._used.clear()
        self._events.clear()

    @property
    def bytes(self) -> int:
        """Return its size."""
        return sum(tensor.nbytes for tensor in self.device.values())

    def _make_room(self, sizes: dict[Arena, int]) -> None:
        for arena, size in sizes.items():
            needed = self._used.get(arena, 0) + size
            old = self.device.get(arena)
            if old is not None and old.numel() >= needed:
                continue
            grown = torch.zeros(
                max(needed, 2 * old.numel() if old is not None else 256), dtype=arena.dtype, device=arena.device
            )
            if old is not None:
                # What this round has written is carried over, the views of the old buffer are not used again.
                grown[: old.numel()].copy_(old)
                self._claims.clear()
            self.device[arena] = grown
            on_cpu = arena.device.type == "cpu"
            self.host[arena] = grown if on_cpu else torch.zeros_like(grown, device="cpu").pin_memory()
            self.host_arrays[arena] = self.host[arena].numpy()


class Slots:
    """A bounded supply of slots: taken by the training thread, given back by the collector."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._free: deque[Slot] = deque()
        self._made = 0
        self._most = _BUDGET_BYTES // _OBJECT_BYTES
        self._last: Slot | None = None
        """What was taken last; it is filled by now, which tells how large one is."""

    def take(self) -> Slot | None:
        """Return a free slot; None where all are on their way, which costs this sample."""
        if self._last is not None:
            self._most = max(_FEWEST, _BUDGET_BYTES // (self._last.bytes + _OBJECT_BYTES))
        try:
            slot = self._free.pop()  # the one used last: its memory is still in the processor's cache
        except IndexError:
            if self._made >= self._most:
                return None
            slot = Slot(self._scratch)
            self._made += 1
        slot.reset()
        self._last = slot
        return slot

    def give_back(self, slot: Slot) -> None:
        """Return a slot that was read."""
        self._free.append(slot)

    @property
    def scarce(self) -> bool:
        """Return whether so many slots are on their way, or half of all, that they should be read now."""
        return self._made - len(self._free) > min(_SCARCE, self._most // 2)
