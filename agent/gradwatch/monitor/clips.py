"""Clippings of one training: which gradients ``clip_grad_norm_`` and ``clip_grad_value_`` change, and which wait."""

import time
from collections.abc import Sequence

from torch import Tensor

from gradwatch.clipping.unwatched_clips import UnwatchedClips
from gradwatch.monitor.actions import StepActions
from gradwatch.monitor.context import Parts
from gradwatch.monitor.guard import Guard, guarded
from gradwatch.norms.transfer import Scalar, copy_and_check, copy_scalar
from gradwatch.ranks.holdings import is_partial, ranks_of_norm
from gradwatch.recording.optimizer_parameters import OptimizerParameters
from gradwatch.steps.core import Measure
from gradwatch.steps.state import NormClip


class ClippingListener:
    """Receives the clippings of the process.

    Args:
        parts: the parts of the monitor.
        guard: swallows the errors of the listener.
        actions: measures gradients before they are clipped.
        clips: whether gradients are clipped adaptively.
    """

    def __init__(self, parts: Parts, guard: Guard, actions: StepActions, *, clips: bool) -> None:
        self.guard = guard
        self._clips = clips
        self._steps = parts.steps
        self._lists = parts.optimizers.lists
        self._actions = actions
        self.unwatched = UnwatchedClips(parts.models.parameters, parts.optimizers.lists)
        """Clippings of tensors that are not watched."""

    def before_norm_clip(
        self,
        parameters: Sequence[Tensor],
        total_norm: Tensor,
        max_norm: Scalar,
        norm_type: float,
        *,
        done: bool = False,
    ) -> bool:
        """Gradients are about to be clipped by their total norm, or that is ``done``; return whether to tell then."""
        guard, started = self.guard, time.perf_counter()
        if not guard.watching:
            return False
        with guard.lock:
            try:
                if guard.streams.used and not guard.streams.enter():
                    guard.captured()
                    return False
                listed = self._lists.find(parameters, exact=self._clips or self._steps.schedule.due)
                if listed.skips:
                    listed.skips -= 1
                    return False
                if not listed.indices:
                    listed = self.unwatched.listed(parameters, listed)
                return self._norm_clipped(listed, parameters, total_norm, max_norm, norm_type, done)
            except Exception as error:  # the agent's guard
                guard.swallow(error)
                return False
            finally:
                guard.spent_seconds += time.perf_counter() - started

    def _norm_clipped(
        self,
        listed: OptimizerParameters,
        parameters: Sequence[Tensor],
        total_norm: Tensor,
        max_norm: Scalar,
        norm_type: float,
        done: bool,
    ) -> bool:
        within_step = bool(self._steps.state.stepping) and self._is_within_step(listed.index_set)
        limit = copy_scalar(max_norm) if isinstance(max_norm, Tensor) else float(max_norm)
        total, finite = copy_and_check(total_norm)
        partial = type(total_norm) is not Tensor and is_partial(total_norm)
        ranks, repeats = ranks_of_norm(total_norm) if partial else ((), False)
        clip = NormClip(total, limit, listed.index_set, partial, norm_type, listed.repeated, finite, ranks, repeats)
        if not listed.indices:
            self.unwatched.note(clip, listed, parameters)
            return False
        # Clipping by NaN, Inf or 0 wipes out which gradient it came from, and float16 rounds small ones to 0: measure
        # before, where it can be seen. So where gradients may change before they are stepped with.
        destroys = not finite or listed.has_float16 or (isinstance(limit, float) and not limit)
        step = self._steps.state.open
        sampled = self._steps.schedule.due or (step is not None and step.sampled)
        measure = not done and (destroys or (sampled and not self._actions.clipped_gradients.are_left_alone))
        action = self._steps.norm_clipped(clip, listed.indices, measure)
        if action is not None:
            self._measure_before_clip(listed, action)
        return sampled and not measure and not within_step

    def _is_within_step(self, indices: frozenset[int]) -> bool:
        """Return whether an optimizer is in the middle of its step, to which clipping these gradients belongs."""
        if self._steps.state.stepping.isdisjoint(indices):
            return False
        self._steps.quiet.write_down(time.time())
        return True

    @guarded
    def after_norm_clip(self, parameters: Sequence[Tensor]) -> None:
        """Gradients have been clipped by their total norm, and were not measured before."""
        self._actions.clipped_gradients.note(self._lists.find(parameters))

    @guarded
    def before_value_clip(self, parameters: Sequence[Tensor]) -> None:
        """Gradients are about to be clipped by value."""
        if not self.guard.watching:
            return
        listed = self._lists.find(parameters, exact=self._clips or self._steps.schedule.due)
        if listed.skips:
            listed.skips -= 1
            return
        listed = self.unwatched.listed(parameters, listed)
        self._is_within_step(listed.index_set)
        action = self._steps.value_clipped(listed.index_set, listed.indices)
        if action is not None:
            self._measure_before_clip(listed, action)

    def _measure_before_clip(self, listed: OptimizerParameters, action: Measure) -> None:
        started = time.perf_counter()
        self._actions.measure_before_clip(listed, action)
        self.guard.book_sample(started)

    @guarded
    def claim_unwatched(self) -> None:
        """Give the next step those clippings whose gradients were given to watched parameters since."""
        for clip in self.unwatched.claimed():
            self._steps.norm_clipped(clip, sorted(clip.indices), measure=False)
