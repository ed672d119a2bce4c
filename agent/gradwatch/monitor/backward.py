"""Backward passes of one training: which losses they differentiate, and whether they are this training's at all."""

import threading
from collections.abc import Callable, Sequence, Set
from typing import cast

from torch import Tensor

from gradwatch import wire
from gradwatch.monitor.context import Parts
from gradwatch.monitor.guard import Guard, guarded
from gradwatch.monitor.other_threads import OtherThreads
from gradwatch.norms.transfer import Scalar, copy_and_check, is_finite
from gradwatch.recording.gradient_versions import GradientVersions, Version

_Before = tuple[dict[int, Version], Sequence[Tensor]]


class BackwardListener:
    """Receives the backward passes of the process.

    Args:
        parts: the parts of the monitor.
        guard: swallows the errors of the listener.
        versions: tells whether a pass added to a watched gradient.
        others: tells whether another thread trains from now on.
        put: takes an event for the collector.
    """

    def __init__(
        self,
        parts: Parts,
        guard: Guard,
        versions: GradientVersions,
        others: OtherThreads,
        put: Callable[[wire.Event], None],
    ) -> None:
        self.guard = guard
        self._steps = parts.steps
        self._models = parts.models
        self._parameters = parts.models.parameters
        self._classifier = parts.models.classifier
        self._recorder = parts.recorder
        self._scaling = parts.scaling
        self._notices = parts.notices
        self._origin = parts.origin
        self._versions = versions
        self._others = others
        self._put = put
        self._read: tuple[Tensor, tuple[Scalar, bool]] | None = None
        """The loss that is being differentiated, as it was read before."""
        self._steps.keep = self._keep

    @guarded
    def before(self, tensors: Sequence[Tensor], losses: Sequence[Tensor]) -> _Before | None:
        """Note the versions of some gradients: after the pass they show whether the losses are this training's."""
        if not (self.guard.watching or self._classifier.searches_left):
            return None
        thread, state = threading.get_ident(), self._steps.state
        if thread != state.thread and not self._others.trains_here(tensors):
            return None
        if self._classifier.searches_left:
            self._models.search_classifier(tensors)
        if not self.guard.watching:
            return None
        if self._parameters.order_pending:
            self._parameters.check_order(tensors)
        if len(losses) == 1 and not self._scaling.has_scaled:
            read = copy_and_check(losses[0])
            self._read, finite = (losses[0], read), read[1]
        else:
            finite = all(is_finite(tensor) for tensor in losses or tensors if tensor.numel() == 1)
        if not finite:
            self._search_origin(tensors)
        also: Set[int] = frozenset()
        if state.losses or state.clips or state.value_clipped or state.open is not None:
            if state.noted:
                self._forget_thrown_away()
            also = state.clipped
        self._steps.backward_began(thread, losses)
        return self._versions.before(also), tensors

    def _keep(self, loss: Tensor) -> tuple[Scalar, bool]:
        read = self._read
        return read[1] if read is not None and read[0] is loss else copy_and_check(loss)

    @guarded
    def after(self, losses: Sequence[Tensor], before: object) -> None:
        """Tell the step core which gradients a backward pass has changed; none if the pass failed."""
        if not self.guard.watching:
            return
        thread = threading.get_ident()
        changed = None
        if before is not None:
            versions, tensors = cast("_Before", before)
            if thread == self._steps.state.thread or self._others.trains_here(tensors):
                changed = self._versions.changed(versions, losses)
        unstepped = self._steps.backward_ended(thread, losses, changed)
        self._read = None
        if self._steps.state.dropped:
            self._recorder.take_back(self._steps.state.dropped)
        if unstepped is not None:
            self._notices.unstepped(unstepped)

    def _search_origin(self, tensors: Sequence[Tensor]) -> None:
        """Search the graph of a loss that is not finite for the module where that began."""
        scalars = [tensor for tensor in tensors if tensor.numel() == 1]
        event = self._origin.search_graph(
            scalars, self._scaling.originals(scalars) if self._scaling.has_scaled else [], self._steps.state.number
        )
        if event is not None:
            self._put(event)

    def _forget_thrown_away(self) -> None:
        """Drop what waits for a step if no gradient is left: no hook shows that gradients were set to None."""
        everything = range(len(self._parameters.watched))
        if not (self._parameters.any_has_gradient(everything) or self._parameters.any_has_unreduced_gradient):
            self._steps.losses_dropped()
            self._steps.gradients_changed(frozenset(everything))
            self._recorder.take_back(self._steps.state.dropped)
