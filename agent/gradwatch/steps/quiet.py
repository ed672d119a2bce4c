"""Steps without a record: one optimizer, nothing measured, at most a loss and a clip norm to be told.

A step whose loss or clip norm shows a sign of trouble has a record, and is sampled at once. Each is judged by its own
numbers before its optimizer steps, so that it can still be sampled: one or two Python floats are looked at, and a few
numbers are kept of the earlier steps.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Final, Self

from gradwatch.steps.ownership import ExpectedOptimizers
from gradwatch.steps.schedule import SamplingSchedule
from gradwatch.steps.state import NO_INDICES, Indices, NormClip, Number, OptimizerKey, StepRecord, StepState

_WARM_UP: Final = 16
"""Numbers after which it is known what is usual."""
_WEIGHT: Final = 1 / 16
"""Weight of the newest number in what is usual."""
_FAR: Final = 10.0
"""Usual deviations above the usual level that are far."""
_MOST: Final = 4.0
"""Usual deviations by which one number moves what is usual at most: a spike does not become usual."""
_SAME: Final = 10
"""Equal losses in a row after which a loss has stopped changing."""
_NEAR: Final = 1e-3
"""Share of a loss within which one that stops again has hardly moved since, as by the last bits of its numbers."""


class UsualLevel:
    """The usual level of a number and its usual deviation, which no single spike moves far."""

    __slots__ = ("_count", "_deviation", "_level")

    def __init__(self) -> None:
        self._count = 0
        self._level = 0.0
        self._deviation = 0.0

    def exceeded(self, value: float) -> bool:
        """Return whether a finite number lies far above what was usual before it, and learn from it."""
        self._count += 1
        if self._count == 1:
            self._level = value
            return False
        difference = value - self._level
        size = abs(difference)
        known = self._count > _WARM_UP
        far = known and difference > _FAR * self._deviation and difference > abs(self._level)
        if known:
            most = _MOST * max(self._deviation, 1e-3 * abs(self._level), 1e-30)
            difference, size = max(-most, min(difference, most)), min(size, most)
        weight = _WEIGHT if known else 1 / self._count
        self._level += weight * difference
        self._deviation += weight * (size - self._deviation)
        return far


class Signs:
    """The signs of trouble of one optimizer's steps."""

    __slots__ = ("_clip_norm", "_last", "_loss", "_rested", "_same")

    def __init__(self) -> None:
        self._loss = UsualLevel()
        self._clip_norm = UsualLevel()
        self._last = math.nan
        self._same = 0
        """How often the last loss came again."""
        self._rested = math.nan
        """The loss that had stopped changing last."""

    def of_step(self, record: StepRecord) -> bool:
        """Return whether the numbers of a step show a sign; those that are still on a device show none here."""
        loss = norm = None
        if record.losses and record.losses_finite and all(type(loss) is float for loss in record.losses):
            loss = sum(record.losses)
        if record.clips:
            clip = record.clips[-1]
            if type(clip.total_norm) is float and clip.finite and not clip.partial:
                norm = clip.total_norm
        return self.of_numbers(loss, norm)

    def of_numbers(self, loss: float | None, clip_norm: float | None) -> bool:
        """Return whether the finite numbers of a step show a sign: far above their past, a norm of 0, a loss at rest.

        Args:
            loss: the loss; None: there is none.
            clip_norm: the norm that clipping returned; None: nothing was clipped.
        """
        found = False
        if loss is not None:
            if loss == self._last:
                self._same += 1
            else:
                self._last, self._same = loss, 0
            found = self._loss.exceeded(loss)
            if self._same == _SAME and not abs(loss - self._rested) <= _NEAR * abs(loss):
                self._rested, found = loss, True
        if clip_norm is not None:
            found = self._clip_norm.exceeded(clip_norm) or clip_norm == 0.0 or found
        return found


@dataclass(slots=True)
class QuietStep:
    """A step that is being made without a record."""

    optimizer: OptimizerKey
    indices: Indices
    """Watched parameters that it steps."""
    losses: list[Number]
    clips: list[NormClip]
    loss: float | None
    """Sum of the losses; None without any."""
    clip_norm: float | None
    """The norm that clipping returned last; None without any."""

    @classmethod
    def of(cls, state: StepState, optimizer: OptimizerKey, indices: Indices) -> Self | None:
        """Return the step that takes everything that waits; None if it must have a record for that."""
        if not state.losses_finite or state.number_is_open:
            return None
        losses, loss = state.losses, None
        if losses:
            loss = losses[0]
            for number in losses:
                if type(number) is not float:
                    return None
            if len(losses) > 1:
                loss = sum(losses)
        norm = None
        for clip in state.clips:
            norm = clip.total_norm
            if type(norm) is not float or clip.partial or not clip.finite:
                return None
        return cls(optimizer, indices, losses, list(state.clips), loss, norm)

    def record(self, number: int, at: float) -> StepRecord:
        """Return a record of the step.

        Args:
            number: of the step.
            at: seconds since the epoch.
        """
        record = StepRecord(number, at, sampled=False)
        record.stepped[self.optimizer] = self.indices
        record.losses += self.losses
        record.clips += self.clips
        return record


class QuietSteps:
    """Makes steps without a record, as most are: they are not sampled, and one optimizer makes each alone.

    All that is to be told of such a step are two Python floats, which show no sign of trouble.

    Args:
        state: the state of the step core.
        schedule: says which steps are sampled.
        expected: the optimizers that make a step together.
        announced: optimizer -> steps that it has begun.
        signs: optimizer -> the signs of trouble of its steps.
    """

    def __init__(
        self,
        state: StepState,
        schedule: SamplingSchedule,
        expected: ExpectedOptimizers,
        announced: dict[OptimizerKey, int],
        signs: defaultdict[OptimizerKey, Signs],
    ) -> None:
        self.allowed = True
        """Whether steps may be without a record."""
        self._state: Final = state
        self._schedule: Final = schedule
        self._expected: Final = expected
        self._announced: Final = announced
        self._signs: Final = signs
        self.shows_sign = False
        """Whether the step that ``began`` has refused was found to show a sign of trouble."""
        self.step: QuietStep | None = None
        """The step that is being made without a record."""

    def began(self, optimizer: OptimizerKey, indices: Indices, thread: int) -> bool:
        """Begin a step without a record; return False if it needs one, for ``StepCore.step_began`` then.

        Args:
            optimizer: its key; it has no closure, and no other optimizer calls it.
            indices: watched parameters that it steps.
            thread: the thread that steps.
        """
        state = self._state
        if (
            self._schedule.needs_record
            or self._expected.only != (optimizer, indices)
            or thread != state.thread
            or not self.allowed
            or self.step is not None
        ):
            return False
        if state.open or state.coming or state.under_way or state.value_clipped or state.logged or state.gone:
            return False
        step = QuietStep.of(state, optimizer, indices)
        if step is None:
            return False
        if self._signs[optimizer].of_numbers(step.loss, step.clip_norm):
            self.shows_sign = True
            return False
        state.number += 1
        state.losses = []
        state.clips.clear()
        state.evaluated = None
        state.stepping = indices
        self._announced[optimizer] = self._announced.get(optimizer, 0) + 1
        self.step = step
        return True

    def made(self, now: float, spent_seconds: float) -> QuietStep | None:
        """Return the step that was made without a record, and is over; None if it has been given one meanwhile.

        Args:
            now: a clock in seconds that only goes forward.
            spent_seconds: time that the agent has taken on the training thread since it was attached.
        """
        step, state = self.step, self._state
        state.stepping = NO_INDICES
        if step is None:
            return None
        self.step = None
        if state.losses or state.clips or state.value_clipped or state.coming is not None:
            # A backward pass within the step: what was noted meanwhile was not stepped with.
            state.drop_losses()
            state.forget_clipping(step.indices)
        self._schedule.passed(state.number, now, spent_seconds)
        return step

    def write_down(self, at: float) -> None:
        """Give the step that is being made without a record one after all: another event needs it."""
        step = self.step
        if step is not None:
            self.step = None
            self._state.open = step.record(self._state.number, at)
