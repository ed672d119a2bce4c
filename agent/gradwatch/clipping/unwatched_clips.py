"""Clipping of tensors that are not watched, but whose gradients are those of watched parameters.

Gradients may be views of one flat buffer, which is clipped as a whole. Or they are lent: a worker clips those of a copy
of the model and then gives them to the watched one (A3C). Both are recognised by the memory of the gradients.
"""

from collections import deque
from collections.abc import Iterator, Sequence
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
        self.compares = False
        """Whether the gradients of the list that was asked for last are compared with the watched ones."""
        self.waiting: deque[tuple[NormClip, OptimizerParameters, list[StorageWeakRef]]] = deque(maxlen=_MOST_WAITING)
        """Clippings since the last step, with the list and the memory of what they clipped."""

    def listed(self, tensors: Sequence[Tensor]) -> OptimizerParameters:
        """Return the watched parameters of a list, or else those whose gradients lie in the memory of its gradients."""
        listed = self._lists.find(tensors)
        if listed.indices:
            return listed
        self.compares = listed.misses < _SEARCHED or listed.misses.bit_count() == 1
        memory = {_memory(tensor.grad) for tensor in tensors} - {0} if self.compares else set()
        if self.compares and not memory:
            return listed  # a list without gradients is not compared
        flat = self._found(memory)
        listed.misses = 0 if flat else listed.misses + 1
        return self._lists.find(flat) if flat else listed

    def note(self, clip: NormClip, listed: OptimizerParameters, tensors: Sequence[Tensor]) -> None:
        """Note a clipping of a list whose gradients may be given to watched parameters before the next step."""
        grads = [tensor.grad for tensor in tensors]
        lent = [StorageWeakRef(grad.untyped_storage()) for grad in grads if grad is not None and _has_memory(grad)]
        if lent:
            self.waiting.append((clip, listed, lent))

    def claimed(self) -> Iterator[NormClip]:
        """Yield the clippings of what are now gradients of watched parameters, and forget all of them."""
        waiting = tuple(self.waiting)
        self.waiting.clear()
        for clip, listed, lent in waiting:
            found = map(self._parameters.find, self._found({memory.cdata for memory in lent}))
            clip.indices = frozenset(index for index in found if index is not None)
            if clip.indices:
                listed.misses = 0
                yield clip

    def _found(self, memory: set[int]) -> list[Tensor]:
        parameters = [info.parameter() for info in self._parameters.watched] if memory else []
        return [known for known in parameters if known is not None and _memory(known.grad) in memory]


def _has_memory(grad: Tensor | None) -> bool:
    return type(grad) is Tensor and grad.layout is torch.strided and not grad.is_meta


def _memory(grad: Tensor | None) -> int:
    """Return what stands for the memory of a gradient; 0 where there is none, or it cannot be told."""
    if grad is None or not _has_memory(grad):
        return 0
    return int(grad.untyped_storage()._cdata)  # noqa: SLF001
