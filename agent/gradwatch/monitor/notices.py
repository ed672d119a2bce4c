"""Notices to the user: a warning in the log of the training, and an event on the page of the run."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from torch.optim import Optimizer

from gradwatch import wire
from gradwatch.model.discovery import ParameterInfo
from gradwatch.monitor.guard import DISARMED_AFTER

_NAMED: Final = 8
"""Parameters that one notice names at most."""

_log = logging.getLogger("gradwatch")


class Notices:
    """Sends notices of one agent to the user.

    Args:
        put: takes events for the server.
        step: returns the number of the last step.
        clips: whether the agent clips.
    """

    def __init__(self, put: Callable[[wire.Event], None], step: Callable[[], int], *, clips: bool) -> None:
        self._put = put
        self._step = step
        self._clips = clips
        self._uncalled_closure_told = False
        self._captured_told = False

    def warn(self, text: str) -> None:
        """Write a warning to the log of the training."""
        _log.warning("gradwatch: %s", text)

    def report(self, kind: str, message: str) -> None:
        """Send an event."""
        self._put(wire.Event(step=self._step(), at=time.time(), kind=kind, message=message))

    def disarmed(self, error: Exception) -> None:
        """Tell the user that the agent has stopped measuring after errors of its own."""
        reason = f"{type(error).__name__}: {error}"
        _log.warning("gradwatch stops watching this run after %d errors of its own: %s", DISARMED_AFTER, reason)
        self.report("disarmed", reason)

    def parts_only(self, reason: str) -> None:
        """Tell the user that nothing is measured, because this rank holds only parts of the parameters."""
        self.warn(f"{reason}. Gradients and weights are not measured")
        self.report("not_measured", reason)

    def unreadable(self, parameters: Sequence[ParameterInfo]) -> None:
        """Name the parameters that cannot be measured."""
        named = [f"{info.name} ({info.unreadable})" for info in parameters[:_NAMED]]
        if len(parameters) > _NAMED:
            named.append(f"and {len(parameters) - _NAMED} more")
        text = f"cannot be measured, the other parameters are: {', '.join(named)}"
        self.warn(text)
        self.report("unreadable_parameters", text)

    def not_measured(self, reason: str) -> None:
        """Tell the user that something is not measured."""
        self.warn(reason)
        self.report("not_measured", reason)

    def clipping_ended(self, run: str) -> None:
        """Tell the user that attaching again without ``clip=`` has ended the clipping of an earlier run."""
        text = f"the model was attached again without clip=: the adaptive clipping of {run} has ended"
        self.warn(text)
        self.report("clipping_ended", text)

    def unstepped(self, passes: int) -> None:
        """Tell the user that no optimizer steps a watched parameter."""
        text = f"after {passes} backward passes no torch.optim.Optimizer has stepped a watched parameter: " + (
            "nothing is clipped or measured" if self._clips else "nothing is measured"
        )
        self.warn(text)
        self.report("not_stepped", text)

    def captured(self) -> None:
        """Tell the user, once, that the steps of a captured graph are not seen."""
        if self._captured_told:
            return
        self._captured_told = True
        text = (
            "steps within a captured graph are neither counted nor measured: a replay calls nothing of the training's"
            + (". Their gradients are clipped as the graph was captured" if self._clips else "")
        )
        self.warn(text)
        self.report("not_measured", text)

    def uncalled_closure(self, optimizer: Optimizer) -> None:
        """Tell the user, once, that an optimizer did not call its closure, so that its gradients were not measured."""
        if self._uncalled_closure_told:
            return
        self._uncalled_closure_told = True
        text = (
            f"{type(optimizer).__name__}.step(closure) did not call its closure: the loss of such a step is kept, "
            + ("its gradients are not clipped or measured" if self._clips else "nothing is measured")
            + ". Call step() without one"
        )
        self.warn(text)
        self.report("not_measured", text)
