"""Clipping of tensors that are not watched, but whose gradients are those of watched parameters.

Gradients may be views of one flat buffer, which is clipped as a whole. Or they are lent: a worker clips those of a copy
of the model and then gives them to the watched one (A3C). Both are recognised by the memory of the gradients: a watched
gradient was clipped if all of its bytes were.
"""

import math
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gradwatch.model.registry import ParameterRegistry
from gradwatch.recording.optimizer_parameters import ListedParameters, OptimizerParameters
from gradwatch.steps.state import NormClip

_SEARCHED: Final = 8
"""Clippings of a list of something else whose memory is always compared; then ever fewer of them are."""
_MOST_WAITING: Final = 8


class ClippedMemory:
    """The bytes of some gradients. No storage is kept alive, but its id is not given to another one.

    Args:
        grads: the gradients; those without memory of their own are left out.
    """

    def __init__(self, grads: Iterable[Tensor | None]) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self._ranges: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        """Id of a storage -> ranges of bytes, in order, where all bytes are those of gradients."""
        self._scattered: set[tuple[int, int, int]] = set()
        """Gradients with gaps, in which bytes of other tensors may lie: storage and range of bytes."""
        for grad in grads:
            if grad is not None and _has_memory(grad):
                storage, (first, end) = _storage(grad), _byte_range(grad)
                if storage not in self._storages:
                    self._storages[storage] = StorageWeakRef(grad.untyped_storage())
                if end - first <= grad.numel() * grad.element_size():
                    self._ranges[storage].append((first, end))
                else:
                    self._scattered.add((storage, first, end))
        for storage, ranges in self._ranges.items():
            self._ranges[storage] = _joined(ranges)

    def __bool__(self) -> bool:
        return bool(self._storages)

    def holds(self, grad: Tensor | None) -> bool:
        """Return whether all bytes of a gradient are those of the gradients."""
        if grad is None or not _has_memory(grad) or _storage(grad) not in self._storages:
            return False
        storage, (first, end) = _storage(grad), _byte_range(grad)
        if (storage, first, end) in self._scattered:
            return True
        ranges = self._ranges.get(storage, ())
        place = bisect_right(ranges, (first, math.inf)) - 1
        return place >= 0 and end <= ranges[place][1]


class UnwatchedClips:
    """Finds the watched parameters whose gradients lie in the memory of clipped gradients.

    Clipping of another model costs a comparison with all watched gradients at first, and then ever more rarely. This is
    counted for each list: what one list has missed says nothing about another.

    Args:
        parameters: the watched parameters.
        lists: the lists that were clipped lately.
    """

    def __init__(self, parameters: ParameterRegistry, lists: ListedParameters) -> None:
        self._parameters = parameters
        self._lists = lists
        self.waiting: deque[tuple[NormClip, OptimizerParameters, ClippedMemory]] = deque(maxlen=_MOST_WAITING)
        """Clippings since the last step, with the list and the memory of what they clipped."""

    def listed(self, tensors: Sequence[Tensor], listed: OptimizerParameters) -> OptimizerParameters:
        """Return the watched parameters of a list, or else those whose gradients lie in the memory of its gradients.

        Args:
            tensors: the list.
            listed: its watched parameters, as ``ListedParameters.find`` returned them.
        """
        if listed.indices:
            return listed
        memory = ClippedMemory(tensor.grad for tensor in tensors)
        if not memory:
            return listed  # a list without gradients is not compared
        flat = self._found(memory)
        if flat:
            listed.misses = 0
            return self._lists.find(flat)
        listed.misses += 1
        if listed.misses > _SEARCHED:
            listed.skips = 4 ** min(listed.misses - _SEARCHED + 1, 15) - 1
        return listed

    def note(self, clip: NormClip, listed: OptimizerParameters, tensors: Sequence[Tensor]) -> None:
        """Note a clipping of a list whose gradients may be given to watched parameters before the next step."""
        lent = ClippedMemory(tensor.grad for tensor in tensors)
        if lent:
            self.waiting.append((clip, listed, lent))

    def claimed(self) -> Iterator[NormClip]:
        """Yield the clippings of what are now gradients of watched parameters, and forget all of them."""
        waiting = tuple(self.waiting)
        self.waiting.clear()
        for clip, listed, lent in waiting:
            found = map(self._parameters.find, self._found(lent))
            clip.indices = frozenset(index for index in found if index is not None)
            if clip.indices:
                listed.misses = listed.skips = 0
                yield clip

    def _found(self, memory: ClippedMemory) -> list[Tensor]:
        parameters = [info.parameter() for info in self._parameters.watched]
        return [known for known in parameters if known is not None and memory.holds(known.grad)]


def _has_memory(grad: Tensor) -> bool:
    return type(grad) is Tensor and grad.layout is torch.strided and not grad.is_meta and grad.numel() > 0


def _storage(grad: Tensor) -> int:
    return int(grad.untyped_storage()._cdata)  # noqa: SLF001


def _byte_range(grad: Tensor) -> tuple[int, int]:
    """Return the first byte of a gradient in its storage, and the one behind its last."""
    first, size = int(grad.storage_offset()), grad.element_size()
    last = first + sum((length - 1) * stride for length, stride in zip(grad.shape, grad.stride(), strict=True))
    return first * size, (last + 1) * size


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in order, those that touch each other as one."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return joined
