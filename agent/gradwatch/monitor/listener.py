"""Torch hook events of one training, translated into events of the step core and its actions into operators.

The listener decides nothing about steps: ``gradwatch.steps.core`` does, and ``StepActions`` measures and clips. Errors
of its own never reach the training (see ``gradwatch.monitor.guard``); errors of the clipping always do.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.hooks import torch_hooks
from gradwatch.monitor.actions import StepActions, closure_of, note_found_inf, with_closure
from gradwatch.monitor.backward import BackwardListener
from gradwatch.monitor.clips import ClippingListener
from gradwatch.monitor.context import Callbacks, Parts, discard, discard_numbers
from gradwatch.monitor.guard import AgentThread, Guard, guarded
from gradwatch.monitor.other_threads import OtherThreads
from gradwatch.recording.gradient_versions import GradientVersions
from gradwatch.recording.loss_origin import LossOrigin
from gradwatch.recording.optimizer_parameters import Pass
from gradwatch.recording.restored_steps import steps_made
from gradwatch.samples.collector import Message
from gradwatch.steps.core import Began, CountSteps, EndStep, Made
from gradwatch.steps.state import Measurement, StepRecord


class TrainingListener:
    """Receives the torch hook events of one training.

    Args:
        parts: the parts of the monitor.
        guard: swallows the errors of the listener.
        callbacks: those of the agent.
        clips: whether gradients are clipped adaptively.
    """

    def __init__(self, parts: Parts, guard: Guard, callbacks: Callbacks, *, clips: bool) -> None:
        self.guard = guard
        self._clips = clips
        self._callbacks = callbacks
        self.put: Callable[[Message], None] = discard
        """Takes what was seen; never waits."""
        self.add_numbers: Callable[[int, float | None, float | None], None] = discard_numbers
        """Takes loss and clip norm of a step without a record; never waits."""
        self.threads: Sequence[AgentThread] = ()
        """The agent's own threads."""
        self._steps = parts.steps
        self._models = parts.models
        self._parameters = parts.models.parameters
        self._optimizers = parts.optimizers
        self._recorder = parts.recorder
        self._scaling = parts.scaling
        self._notices = parts.notices
        self._origin = parts.origin
        self._quiet_step = 0
        """Id of the optimizer that began the last step without a record; 0 once that is over."""
        self._versions = GradientVersions(self._parameters)
        self._loss_origin = LossOrigin(self._parameters, parts.steps)
        self._actions = StepActions(parts.models, parts.optimizers, parts.scaling, parts.recorder)
        self._others = OtherThreads(parts.steps, parts.models.parameters)
        backward = BackwardListener(
            parts, guard, self._versions, self._loss_origin, self._others, lambda event: self.put(event)
        )
        self.ignores = parts.optimizers.is_stranger
        self.before_backward = backward.before
        self.after_backward = backward.after
        self._clipping = ClippingListener(parts, guard, self._actions, clips=clips)
        self.before_norm_clip = self._clipping.before_norm_clip
        self.after_norm_clip = self._clipping.after_norm_clip
        self.before_value_clip = self._clipping.before_value_clip

    def exiting(self, status: object) -> None:
        """``sys.exit`` was called."""
        self._callbacks.exiting(status)

    def after_fork(self) -> bool:
        """Stop measuring in a forked child, whose threads and spool are the parent's; go on clipping."""
        self.guard.lock = threading.RLock()  # another thread, which is not here, may have held it
        self.guard.watching = False
        self._models.stop_registering()
        self._callbacks.forked()
        return self._clips

    # Optimizers

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Optimizer | None
    ) -> torch_hooks.Arguments | None:
        """An optimizer is about to step.

        Raises:
            Exception: clipping failed; errors of the measuring are swallowed.
        """
        closure = closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        if self._clipping.unwatched.waiting and self.guard.watching:
            self._clipping.claim_unwatched()
        if (
            self.guard.watching
            and not self._steps.schedule.due
            and closure is None
            and outer is None
            and self._begin_quietly(optimizer)
        ):
            if self._clips:
                with self.guard.lock:
                    self._actions.clip(optimizer, outer, None)
            return None
        with self.guard.lock:
            record = self._begin(optimizer, outer, closure is not None) if self.guard.watching else None
            if closure is None:
                if self._clips or (record is not None and record.sampled):
                    self._measure_and_clip(optimizer, record, outer)
                return None
            if record is None and not self._clips:
                return None
            measured = self._measured(optimizer, record, outer, closure)
            return with_closure(args, kwargs, closure, measured)

    def _measured(
        self, optimizer: Optimizer, record: StepRecord | None, outer: Optimizer | None, closure: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return a closure that measures after its first evaluation: before it there is no gradient.

        The gradients of every evaluation are clipped.
        """
        waiting = [] if record is None else [record]

        @functools.wraps(closure)
        def measured(*args: Any, **kwargs: Any) -> Any:
            try:
                result = closure(*args, **kwargs)
            finally:
                self._steps.closure_left()
            first = waiting.pop() if waiting else None
            with self.guard.lock:
                self._closure_returned(optimizer, first)
                self._measure_and_clip(optimizer, first, outer)
            return result

        return measured

    def _measure_and_clip(self, optimizer: Optimizer, record: StepRecord | None, outer: Optimizer | None) -> None:
        measured = None
        if record is not None and record.sampled and self.guard.watching:
            measured = self._measure_step(optimizer, record)
        if self._clips:
            self._actions.clip(optimizer, outer, measured)

    @guarded
    def _measure_step(self, optimizer: Optimizer, record: StepRecord) -> tuple[Pass, Measurement] | None:
        started = time.perf_counter()
        measured = self._actions.measure_step(optimizer, record)
        if self._clips:
            started += self._recorder.pass_seconds  # clipping needs this pass at every step
            self.guard.spent_seconds -= self._recorder.pass_seconds
        self.guard.book_sample(started)
        return measured

    def _begin_quietly(self, optimizer: Optimizer) -> bool:
        """Begin a step that needs no record; return whether it needs none."""
        guard, started = self.guard, time.perf_counter()
        if (
            self._parameters.order_pending
            or self._origin.is_active
            or self._optimizers.gone
            or self._loss_origin.aside
            or guard.streams.used
            or hasattr(optimizer, "found_inf")
        ):
            return False
        with guard.lock:
            try:
                known = self._optimizers.find(optimizer, exact=self._clips)
                if known is None:
                    return False
                begun = self._steps.quiet.began(known.key, known.parameters.index_set, threading.get_ident())
                if begun:
                    self._quiet_step = id(optimizer)
                    self._loss_origin.mark = self._versions.mark = None
            except Exception as error:  # the agent's guard
                guard.swallow(error)
                return False
            else:
                return begun
            finally:
                guard.spent_seconds += time.perf_counter() - started

    @guarded
    def _begin(self, optimizer: Optimizer, outer: Optimizer | None, closure: bool) -> StepRecord | None:
        """Return the record of the step that begins; None if an outer optimizer owns it or it is unwatched."""
        known = self._optimizers.find(optimizer)
        if known is None:
            self._steps.other_stepped()
            return None
        if self._recorder.streams.used:
            self._recorder.pool.before_reuse()
        for key in self._optimizers.take_gone() if self._optimizers.gone else ():
            self._steps.optimizer_gone(key)
        if self._loss_origin.aside:
            self._loss_origin.before_step(known.parameters.index_set)
        self._loss_origin.mark = self._versions.mark = None
        around = None if outer is None else self._optimizers.known(outer)
        reached = self._others.reached() if self._steps.state.under_way else frozenset[int]()
        now, outside, stepped = time.time(), None if around is None else around.key, known.parameters.index_set
        event = functools.partial(
            self._steps.step_began, known.key, stepped, threading.get_ident(), now, outside, closure, reached
        )
        began = event()
        while not isinstance(began, Began):
            self._prepare(optimizer, began)
            began = event()
        if began.record is not None and not closure and hasattr(optimizer, "found_inf"):
            note_found_inf(optimizer, began.record)
        return began.record

    def _prepare(self, optimizer: Optimizer, action: EndStep | CountSteps) -> None:
        """Carry out an action of the step core before the event of an optimizer is repeated."""
        if isinstance(action, EndStep):
            self.end_step(learn=True)
            return
        # Where a resumed training stands is asked at its first step: the optimizer may have been restored by now.
        made = steps_made([optimizer, *self._optimizers.named]) or self._steps.state.number
        self._steps.steps_counted(made)
        if not made:
            self._callbacks.unknown_step(optimizer)

    @guarded
    def _closure_returned(self, optimizer: Optimizer, record: StepRecord | None) -> None:
        known = self._optimizers.find(optimizer) if self.guard.watching else None
        if known is None:
            return
        self._steps.closure_returned(known.key, record)
        if record is not None:
            note_found_inf(optimizer, record)

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        guard, started = self.guard, time.perf_counter()
        if self._quiet_step != id(optimizer) or guard.streams.used or not guard.watching:
            self._after_step(optimizer)
            return
        with guard.lock:
            try:
                self._quiet_step = 0
                quiet = self._steps.quiet.made(started, guard.spent_seconds)
                if quiet is None:
                    self._after_step(optimizer)
                    return
                self.add_numbers(self._steps.state.number, quiet.loss, quiet.clip_norm)
                if quiet.loss is None:
                    self._versions.elsewhere = 0  # its loss may have been taken for another model's
                if self._steps.state.dropped:
                    self._recorder.take_back(self._steps.state.dropped)
            except Exception as error:  # the agent's guard
                guard.swallow(error)
            finally:
                guard.spent_seconds += time.perf_counter() - started

    @guarded
    def _after_step(self, optimizer: Optimizer) -> None:
        record = self._steps.state.open
        known = self._optimizers.known(optimizer) if self.guard.watching and record is not None else None
        if record is None or known is None or known.key not in record.stepped:
            return
        if record.buffers is not None:
            started = time.perf_counter()
            self._recorder.measure_updates(optimizer, record)
            self.guard.book_sample(started)
        made = self._steps.step_made(known.key)
        if made.without_closure:
            self._notices.uncalled_closure(optimizer)
        if self._steps.state.dropped:
            self._recorder.take_back(self._steps.state.dropped)
        if made.ended:
            self.end_step()

    @guarded
    def scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """A loss scaler has multiplied ``original``."""
        if self.guard.watching:
            self._scaling.note_scaled(scaler, original, scaled)
            self._steps.keep = self._scaling.keep

    @guarded
    def after_scaler_step(self, scaler: object, optimizer: Optimizer) -> None:
        """A loss scaler has stepped ``optimizer``, or skipped its step because it found Inf."""
        known = self._optimizers.find(optimizer) if self.guard.watching else None
        if known is None:
            return
        self._scaling.note_scaler(scaler)
        event = functools.partial(
            self._steps.scaler_stepped, known.key, known.parameters.index_set, threading.get_ident(), time.time()
        )
        made = event()
        while not isinstance(made, Made):
            self._prepare(optimizer, made)
            made = event()
        if made.ended:
            self.end_step()

    def end_step(self, *, learn: bool = False) -> None:
        """Hand over the record of the open step, and let the schedule decide whether the next one is sampled."""
        if self._steps.quiet.step is not None:
            self._steps.quiet.write_down(time.time())
        record = self._steps.state.open
        if record is None:
            return
        if not record.losses:
            self._versions.elsewhere = 0  # its loss may have been taken for another model's
        if self._origin.is_active:
            self._origin.finish_step(record)
        if record.buffers is not None or self._recorder.streams.used:
            started = time.perf_counter()
            self._recorder.send(record)
            self.guard.book_sample(started)
        self._optimizers.counts_strangers = False
        self._steps.step_ended(time.perf_counter(), self.guard.costs(self.threads), learn=learn)
        if record.sampled:
            record.excluded, record.unstepped = self._actions.excluded, self._actions.unstepped(record.step)
        self.put(record)
        if self._parameters.order_pending and self._parameters.learn_order(record.step):
            self._models.register()

    # Clearing

    def after_zero_grad(self, owner: Optimizer | nn.Module) -> None:
        """An optimizer or a module has cleared its gradients."""
        state = self._steps.state
        if state.losses or state.clips or state.value_clipped or state.coming is not None or state.open is not None:
            self._note_cleared(owner)

    @guarded
    def _note_cleared(self, owner: Optimizer | nn.Module) -> None:
        if not (self.guard.watching and self._steps.state.noted):
            return
        if isinstance(owner, nn.Module):
            found = map(self._parameters.find, owner.parameters())
            self._gradients_cleared(frozenset(index for index in found if index is not None))
            return
        known = self._optimizers.find(owner)
        if known is not None:
            self._gradients_cleared(known.parameters.index_set)

    def _gradients_cleared(self, indices: frozenset[int]) -> None:
        self._steps.gradients_cleared(indices)
        self._recorder.take_back(self._steps.state.dropped)
        if not self._steps.state.losses:
            return
        everything = frozenset(range(len(self._parameters.watched)))
        trained = self._optimizers.trained_indices if self._steps.expected.known else everything
        if not self._parameters.any_has_gradient(trained - self._steps.state.cleared):
            self._loss_origin.losses_dropped()
