"""Which losses the gradients come from that an optimizer steps with.

Usually they are those whose backward passes came since the last step. Some programs take gradients away between the
passes: gradient surgery puts those of several losses together by hand, a probe is made while the training's gradients
are put aside, or its own are set to zero in place. Identity and version of one gradient after each pass tell.
"""

from collections.abc import Sequence, Set
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.tensor_spec import local_part
from gradwatch.recording.gradient_versions import Mark
from gradwatch.steps.core import StepCore
from gradwatch.steps.state import Number

_ASKED: Final = 8
"""Gradients that are looked at to find out whether all were set to zero."""
_MOST_ASIDE: Final = 64
"""Passes between two steps whose losses are remembered after their gradients were taken away."""


class _Aside(NamedTuple):
    """Losses whose gradients were taken away."""

    losses: Sequence[Number]
    finite: bool
    mark: Mark | None
    retained: bool
    """Whether the pass kept its graph, as one does that another pass over the same graph follows."""


class LossOrigin:
    """Knows which losses the present gradients come from.

    Args:
        parameters: the watched parameters.
        steps: holds the losses that wait for a step.
    """

    def __init__(self, parameters: ParameterRegistry, steps: StepCore) -> None:
        self._parameters = parameters
        self._steps = steps
        self.mark: Mark | None = None
        """One gradient as the last backward pass left it."""
        self.retained = False
        """Whether the last pass kept its graph."""
        self.elsewhere = False
        """Whether the last pass left no gradient, because a hook has moved them elsewhere."""
        self.aside: list[_Aside] = []
        """Losses whose gradients were taken away since the last step."""

    def losses_dropped(self) -> None:
        """The gradients of the waiting losses were taken away: drop the losses, unless they turn up at the step."""
        state = self._steps.state
        if len(self.aside) < _MOST_ASIDE:
            self.aside.append(_Aside(list(state.losses), state.losses_finite, self.mark, self.retained))
        self._steps.losses_dropped()

    def before_pass(self) -> None:
        """Another pass follows: the waiting losses are dropped if their gradients were set to zero in place."""
        mark = self.mark
        if mark is None or not self._is_there(mark) or mark[1]._version == mark[2]:  # noqa: SLF001
            return
        grads = [info.parameter() for info in self._parameters.watched]
        parts = [local_part(p.grad) for p in grads if p is not None and p.grad is not None]
        dense = [part for part in parts if type(part) is Tensor and part.layout == torch.strided and part.numel()]
        if not dense:
            return
        with torch.no_grad():
            asked = dense[:: max(len(dense) // _ASKED, 1)][:_ASKED]
            left = torch.stack([part.any().to(asked[0].device, non_blocking=True) for part in asked]).any()
            self._keep_where(left)

    def _keep_where(self, left: Tensor) -> None:
        """Drop the waiting losses unless ``left`` is true, which is only read where that costs no wait."""
        if left.device.type == "cpu":
            if not left.numpy().item():
                self._steps.losses_dropped()
            return
        state = self._steps.state
        kept = [
            torch.where(left, loss, torch.zeros_like(loss)) if isinstance(loss, Tensor) else loss
            for loss in state.losses
        ]
        self._steps.losses_replaced(kept, state.losses_finite)

    def before_step(self, indices: Set[int]) -> None:
        """An optimizer begins to step these parameters: give it the losses of the gradients that are there.

        Called where the gradients of some losses were taken away.
        """
        state, several = self._steps.state, self.aside
        self.aside = []
        mark = self.mark or several[-1].mark
        if mark is None or mark[0] not in indices or self._is_there(self.mark):
            return
        there = next((aside for aside in reversed(several) if self._is_there(aside.mark)), None)
        if there is not None:
            self._steps.losses_replaced(list(there.losses), there.finite)
        elif all(aside.retained for aside in several):
            # Put together by hand from passes over one graph, of each of which the gradients were taken away.
            losses = [loss for aside in several for loss in aside.losses] + state.losses
            self._steps.losses_replaced(losses, all(aside.finite for aside in several) and state.losses_finite)
        else:
            self._steps.losses_replaced([], finite=True)  # nothing tells which of them count

    def _is_there(self, mark: Mark | None) -> bool:
        parameter = None if mark is None else self._parameters.watched[mark[0]].parameter.reference()
        return mark is not None and parameter is not None and parameter.grad is mark[1]
