"""Steps without a record: one optimizer, nothing measured, at most a loss and a clip norm to be told."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Final, Self

from gradwatch.steps.ownership import ExpectedOptimizers
from gradwatch.steps.schedule import SamplingSchedule
from gradwatch.steps.signs import Signs
from gradwatch.steps.state import NO_INDICES, Indices, NormClip, Number, OptimizerKey, StepRecord, StepState


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
