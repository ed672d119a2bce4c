"""The steps of a training: which one is open, what belongs to it, and what waits for the next."""

import time
import weakref
from collections.abc import Callable
from typing import Final

from torch.optim import Optimizer

from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.buffers import SampleBuffers
from gradwatch.optimizers import Optimizers
from gradwatch.pace import Pace
from gradwatch.pending import Pending
from gradwatch.recording.optimizer_parameters import Binding
from gradwatch.recording.restored_steps import steps_made
from gradwatch.rounds import Round


class Steps:
    """Counts the steps and keeps the round of the open one.

    Args:
        made: steps that the training has made; None: what its optimizers say, now or when one first steps.
        parameters: what is watched.
        optimizers: those that make the steps.
        pending: what waits for the next step.
        pace: whether a step is sampled.
        finish: called where the open step is over, to take its round with ``close``.
        unknown: called with an optimizer that does not say how many steps were made.
        give_back: takes the slot of a step that will not come.
    """

    def __init__(
        self,
        made: int | None,
        parameters: ParameterRegistry,
        optimizers: Optimizers,
        pending: Pending,
        pace: Pace,
        *,
        finish: Callable[[], None],
        unknown: Callable[[Optimizer], None],
        give_back: Callable[[SampleBuffers], None],
    ) -> None:
        self._parameters: Final = parameters
        self._optimizers: Final = optimizers
        self._pending: Final = pending
        self._pace: Final = pace
        self._finish = finish
        self._unknown = unknown
        self._give_back = give_back
        self.number = steps_made(optimizers.given, wait=True) if made is None else made
        """Of the last step."""
        self._is_unclear = made is None and not self.number
        """Whether nothing has said yet how many steps a resumed run has made."""
        self.round: Round | None = None
        """Of the open step."""
        self.awaited: weakref.ref[Optimizer] | None = None
        """The optimizer whose closure makes the gradients that it is about to step with."""
        self.evaluated: weakref.ref[Optimizer] | None = None
        """The one whose closure has made them."""
        optimizers.start_at(self.number)

    def enter(self, optimizer: Optimizer, binding: Binding) -> Round:
        """Return the round that this step belongs to: a new one where the optimizer, or its like, has stepped in it."""
        entered = weakref.ref(optimizer)
        if self.round is not None:
            stepped = self.round.stepped
            if entered in stepped or self._optimizers.takes_over(optimizer, stepped):
                self._optimizers.settle(stepped, self.number)
                self._finish()
        if self.round is None:
            if self._is_unclear:
                self._recall(optimizer)
            self.number += 1
            self.round = self._pending.coming or Round(self.number, time.time(), self._pace.due)
            self._pending.coming = None
            self.round.step = self.number
        self.round.stepped[entered] = binding.index_set
        self.evaluated = None
        self._pending.enter(self.round, self._parameters)
        self._optimizers.enter(optimizer, self.number)
        return self.round

    def _recall(self, optimizer: Optimizer) -> None:
        """Find out where a resumed run stands, at its first step: the optimizer may have been restored by now."""
        self._is_unclear = False
        self.number = steps_made([optimizer, *self._optimizers.given])
        self._optimizers.start_at(self.number)
        if not self.number:
            self._unknown(optimizer)

    def close(self) -> Round | None:
        """Return the round of the open step, which is over now."""
        round_, self.round = self.round, None
        return round_

    def coming(self) -> Round:
        """Return the round of the next step, of which something is to be noted before it begins."""
        pending = self._pending
        pending.coming = pending.coming or Round(self.number + 1, time.time(), self._pace.due)
        return pending.coming

    def have_all(self) -> bool:
        """Return whether every optimizer has made the open step that usually does."""
        return self.round is not None and self._optimizers.have_all(self.round.stepped.keys())

    def has_stepped(self, index: int) -> bool:
        """Return whether the optimizer of a parameter has made the open step."""
        return self.round is not None and self._optimizers.have_stepped(
            index, self.round.stepped.keys() - {self.awaited}
        )

    @property
    def clipped(self) -> frozenset[int]:
        """Return the indices of the parameters whose gradients were clipped, of this step or the next."""
        return self._pending.clipped | (frozenset() if self.round is None else self.round.clipped)

    @property
    def noted(self) -> bool:
        """Return whether anything was noted that depends on gradients as they are."""
        return bool(self._pending) or (self.round is not None and bool(self.round.clipped))

    def forget(self, indices: frozenset[int]) -> None:
        """Forget what was noted of gradients that are not what they were, before they were stepped."""
        slot = self._pending.forget(indices)
        if slot is not None:
            self._give_back(slot)
        if self.round is not None and (known := indices & self.round.clipped):
            self.round.forget(frozenset(index for index in known if not self.has_stepped(index)))

    def forget_zeroed(self, indices: frozenset[int]) -> None:
        """Forget what was noted of some gradients; the loss, too, unless others have a part of it."""
        self.forget(indices)
        pending = self._pending
        pending.gone |= indices
        if pending.losses and not self._parameters.any_has_gradient(self._optimizers.all_indices - pending.gone):
            pending.losses.clear()

    def forget_thrown_away(self) -> None:
        """Forget what waits for its step where no gradient is left: ``model.zero_grad()`` says nothing."""
        everything = range(len(self._parameters.watched))
        parameters = self._parameters
        if self.noted and not (parameters.any_has_gradient(everything) or parameters.any_has_unreduced_gradient):
            self._pending.losses.clear()
            self.forget(frozenset(everything))
