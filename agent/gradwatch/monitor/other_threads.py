"""Other threads than the one that trains: which of them trains from now on, and which trains something else."""

import threading
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gradwatch.model.registry import ParameterRegistry
from gradwatch.steps.core import StepCore

_ASKED: Final = 8
"""Backward passes of a thread that trains something else whose graphs are all searched; then ever fewer of them are."""


class OtherThreads:
    """The threads beside the one that trains.

    Only the thread that trains may look at gradients: it may be replacing one, and a look from another thread would
    then crash the process. Besides, the gradients may change while another thread trains another model.

    Args:
        steps: the step core of the training.
        parameters: the watched parameters.
    """

    def __init__(self, steps: StepCore, parameters: ParameterRegistry) -> None:
        self._steps = steps
        self._parameters = parameters
        self._elsewhere = threading.local()
        """How often each other thread was found to train something else."""

    def trains_here(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether this thread, which has not trained so far, trains from now on.

        Each check searches the graph of the losses, so a thread that trains another model is checked more and more
        rarely.
        """
        state = self._steps.state
        if state.under_way.get(state.thread) and torch._C._current_autograd_node() is not None:  # noqa: SLF001
            return False  # a pass within the training's own, on autograd's thread for a device
        times: int = getattr(self._elsewhere, "times", 0)
        self._elsewhere.times = times + 1
        if (times > _ASKED and times & (times - 1)) or not self._parameters.are_reached(tensors):
            return False
        self._elsewhere.times = 0
        self._steps.training_moved(threading.get_ident())
        return True

    def reached(self) -> frozenset[int]:
        """Return the other threads that differentiate losses of this training; none if the training thread steps."""
        state, here = self._steps.state, threading.get_ident()
        if here == state.thread:
            return frozenset()
        others = (thread for thread in state.under_way if thread not in (here, state.thread))
        return frozenset(thread for thread in others if self._parameters.are_reached(state.under_way[thread]))
