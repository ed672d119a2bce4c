"""Backward passes of one training: which losses they differentiate, and whether they are this training's at all."""

import threading
import time
from collections.abc import Callable, Sequence, Set
from typing import Any, cast

from torch import Tensor

from gradwatch import wire
from gradwatch.monitor.context import Parts
from gradwatch.monitor.guard import Guard, guarded
from gradwatch.monitor.other_threads import OtherThreads
from gradwatch.norms.transfer import Scalar, copy_and_check, is_finite
from gradwatch.recording.gradient_versions import GradientVersions, Version
from gradwatch.recording.loss_origin import LossOrigin

_Before = tuple[dict[int, Version], Sequence[Tensor]]


class BackwardListener:
    """Receives the backward passes of the process.

    Args:
        parts: the parts of the monitor.
        guard: swallows the errors of the listener.
        versions: tells whether a pass added to a watched gradient.
        loss_origin: knows which losses the present gradients come from.
        others: tells whether another thread trains from now on.
        put: takes an event for the collector.
    """

    def __init__(
        self,
        parts: Parts,
        guard: Guard,
        versions: GradientVersions,
        loss_origin: LossOrigin,
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
        self._loss_origin = loss_origin
        self._others = others
        self._put = put
        self._read: tuple[Tensor, tuple[Scalar, bool]] | None = None
        """The loss that is being differentiated, as it was read before."""
        self._steps.keep = self._keep

    def before(self, tensors: Sequence[Tensor], losses: Sequence[Tensor]) -> _Before | None:
        """Note the versions of some gradients: after the pass they show whether the losses are this training's."""
        guard, state, started = self.guard, self._steps.state, time.perf_counter()
        if (
            len(losses) != 1
            or type(loss := losses[0]) is not Tensor
            or not loss.is_cpu
            or loss.dim()
            or not self._versions.is_sure
            or not guard.watching
            or state.losses
            or state.clips
            or state.value_clipped
            or state.open is not None
            or state.coming is not None
            or state.under_way
            or self._scaling.has_scaled
            or self._parameters.order_pending
            or self._classifier.searches_left
            or guard.streams.used
            or threading.get_ident() != state.thread
        ):
            return self._before_any(tensors, losses)
        try:
            number: Any = loss.tolist()
        except Exception:  # within a transform, for example, it holds no number
            return self._before_any(tensors, losses)
        if type(number) is not float or number - number != 0.0:  # NaN and Inf are searched for
            return self._before_any(tensors, losses)
        with guard.lock:
            try:
                self._read = loss, (number, True)
                self._steps.backward_began(state.thread, losses)
                return self._versions.before(), tensors
            except Exception as error:  # the agent's guard
                guard.swallow(error)
                return None
            finally:
                guard.spent_seconds += time.perf_counter() - started

    @guarded
    def _before_any(self, tensors: Sequence[Tensor], losses: Sequence[Tensor]) -> _Before | None:
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
            if state.losses:
                self._loss_origin.before_pass()
            also = state.clipped
        self._steps.backward_began(thread, losses)
        return self._versions.before(also), tensors

    def _keep(self, loss: Tensor) -> tuple[Scalar, bool]:
        read = self._read
        return read[1] if read is not None and read[0] is loss else copy_and_check(loss)

    def after(self, losses: Sequence[Tensor], before: object, retained: bool) -> None:
        """Tell the step core which gradients a backward pass has changed; none if the pass failed."""
        guard, state, started = self.guard, self._steps.state, time.perf_counter()
        if not guard.watching:
            return
        with guard.lock:
            try:
                if guard.streams.used and not guard.streams.enter():
                    guard.captured()
                    return
                thread, changed = threading.get_ident(), None
                if before is not None:
                    versions, tensors = cast("_Before", before)
                    if thread == state.thread or self._others.trains_here(tensors):
                        changed = self._versions.changed(versions, losses)
                if changed is not None:
                    origin = self._loss_origin
                    origin.mark, origin.retained = self._versions.mark, retained
                    origin.elsewhere = not changed and not self._has_gradients()
                unstepped = self._steps.backward_ended(thread, losses, changed)
                self._read = None
                if state.dropped:
                    self._recorder.take_back(state.dropped)
                if unstepped is not None:
                    self._notices.unstepped(unstepped)
            except Exception as error:  # the agent's guard
                guard.swallow(error)
            finally:
                guard.spent_seconds += time.perf_counter() - started

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
        if self._loss_origin.elsewhere:
            return
        if not (self._has_gradients() or self._parameters.any_has_unreduced_gradient):
            self._loss_origin.losses_dropped()
            self._steps.gradients_changed(frozenset(range(len(self._parameters.watched))))
            self._recorder.take_back(self._steps.state.dropped)

    def _has_gradients(self) -> bool:
        return self._parameters.any_has_gradient(range(len(self._parameters.watched)))
