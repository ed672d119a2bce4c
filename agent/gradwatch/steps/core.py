"""The step core: decides which losses, clippings and measurements belong to which optimizer step.

It is a state machine without torch. Each public method is an event of the training. It changes the state and returns
the action that must follow, if any. The torch side (``gradwatch.monitor``) translates hooks into events and actions
into operators. Losses and norms are never read here: a quirk of a framework is a table of events with strings.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Final

from gradwatch.steps.ownership import Beginning, ExpectedOptimizers, Owner, owner_of
from gradwatch.steps.quiet import QuietSteps, Signs
from gradwatch.steps.schedule import Costs, SamplingSchedule
from gradwatch.steps.state import (
    MOST_LOSSES,
    NO_INDICES,
    Indices,
    Keep,
    Loss,
    NormClip,
    Number,
    OptimizerKey,
    ScaledBy,
    StepRecord,
    StepState,
    is_among,
    scaled_by,
)
from gradwatch.steps.unstepped import UnsteppedPasses


@dataclass(frozen=True, slots=True)
class EndStep:
    """The open step is over: send its record, report ``step_ended``, then repeat the event that returned this."""


@dataclass(frozen=True, slots=True)
class CountSteps:
    """A resumed training begins: report ``steps_counted``, then repeat the event that returned this."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure gradients now, before a clipping changes them."""

    record: StepRecord
    void: Indices = NO_INDICES
    """Parameters that have already been stepped in this step, with other gradients."""
    clips: Sequence[ScaledBy] = ()
    """Clippings that have scaled these gradients before."""


@dataclass(frozen=True, slots=True)
class Began:
    """An optimizer has begun to step."""

    owner: Owner
    record: StepRecord | None
    """The step that it makes; None where the step belongs to an outer optimizer."""


@dataclass(frozen=True, slots=True)
class Made:
    """An optimizer has stepped."""

    ended: bool
    """Whether every optimizer of the step has stepped: the step is over."""
    without_closure: bool = False
    """Whether it was given a closure and has not called it."""


END_STEP: Final = EndStep()
COUNT_STEPS: Final = CountSteps()
_IN_PROGRESS: Final = Made(ended=False)
_COMPLETE: Final = Made(ended=True)


class StepCore:
    """Turns events of one training into step records.

    Args:
        steps_made: optimizer steps that the training has made so far.
        schedule: says which steps are sampled.
        expected: the optimizers that the user named; None: every one that steps watched parameters.
        number_is_open: whether an optimizer may say at its first step that more steps were made.
        thread: the thread that trains, until ``training_moved`` names another one.
        keep: returns the number to keep of a loss, and whether it is finite; may be replaced.
        summed: sums numbers where too many losses wait for one step.
    """

    def __init__(
        self,
        steps_made: int,
        schedule: SamplingSchedule,
        expected: Iterable[OptimizerKey] | None,
        *,
        number_is_open: bool = False,
        thread: int = 0,
        keep: Keep = lambda loss: (loss, True),
        summed: Callable[[list[Number]], list[Number]] = lambda numbers: numbers,
    ) -> None:
        self.state: Final = StepState(steps_made, number_is_open, thread)
        self.schedule: Final = schedule
        self.expected: Final = ExpectedOptimizers(expected)
        self.expected.count_from(steps_made)
        self.keep = keep
        self._summed = summed
        self._announced: dict[OptimizerKey, int] = {}
        """Steps that each optimizer has begun."""
        self._announced_at_scaler: dict[OptimizerKey, int] = {}
        self._unstepped = UnsteppedPasses()
        self._signs: defaultdict[OptimizerKey, Signs] = defaultdict(Signs)
        self.quiet: Final = QuietSteps(self.state, schedule, self.expected, self._announced, self._signs)

    # What is heard beside the steps

    def logged(self, name: str, number: Number) -> None:
        """The user has added a number to the next step."""
        self.state.logged[name] = number

    def training_moved(self, thread: int) -> None:
        """Another thread trains from now on."""
        self.state.thread = thread

    # Backward passes

    def backward_began(self, thread: int, losses: Iterable[Loss]) -> None:
        """Losses are about to be differentiated, maybe within another backward pass."""
        self.state.under_way.setdefault(thread, []).extend(losses)

    def backward_ended(self, thread: int, losses: Sequence[Loss], changed: Indices | None) -> int | None:
        """A backward pass is over.

        Args:
            thread: the thread that made it.
            losses: the same as ``backward_began`` was given.
            changed: parameters whose gradients it is known to have changed; None: it failed, or is another training's.

        Returns:
            The number of backward passes so far, once, if no watched parameter was stepped after them; otherwise None.
        """
        state = self.state
        mine = state.under_way.pop(thread, ())
        if len(mine) != 1 or len(losses) != 1 or mine[0] is not losses[0]:
            # Losses of a pass within which this one was made go on; those that a step has claimed meanwhile are gone.
            if outer := [loss for loss in mine if not is_among(loss, losses)]:
                state.under_way[thread] = outer
            mine = [loss for loss in mine if is_among(loss, losses)]
        if changed is None:
            return None
        state.stepping = NO_INDICES
        if changed and (state.clips or state.value_clipped or state.coming or state.open):
            state.forget_clipping(changed)  # there is more to them now than what was clipped
        if not losses:
            return None
        state.cleared = NO_INDICES
        for loss in mine:
            number, finite = self.keep(loss)
            state.losses.append(number)
            state.losses_finite &= finite
        if len(state.losses) >= MOST_LOSSES:
            state.losses = self._summed(state.losses)
        return self._unstepped.passed() if self._unstepped.counts else None

    # Gradients that change before they are stepped with

    def gradients_changed(self, indices: Indices) -> None:
        """Gradients have changed, so the notes on their clipping no longer hold."""
        self.state.forget_clipping(indices)

    def gradients_cleared(self, indices: Indices) -> None:
        """Gradients were cleared (``zero_grad``)."""
        self.state.forget_clipping(indices)
        self.state.cleared |= indices

    def losses_dropped(self) -> None:
        """No gradient is left of the losses that wait for a step."""
        self.state.drop_losses()

    def losses_replaced(self, numbers: list[Number], finite: bool) -> None:
        """The gradients that are there come from other losses than those that wait."""
        self.state.losses, self.state.losses_finite = numbers, finite

    # Clipping

    def norm_clipped(self, clip: NormClip, listed: Sequence[int], measure: bool) -> Measure | None:
        """Gradients are about to be clipped by their total norm.

        Args:
            clip: the call that clips.
            listed: the call's parameters in the order of its list.
            measure: whether clipping destroys the gradients for a later measurement, as clipping by NaN or to 0 does.

        Returns:
            The measurement to make before the clipping, None if none is needed.
        """
        if self.state.stepping and self.state.clip_within_step(clip):
            return None
        action = self._measure_before(clip.indices, listed, force=not clip.finite) if measure else None
        self.state.clips.append(clip)
        return action

    def value_clipped(self, indices: Indices, listed: Sequence[int]) -> Measure | None:
        """Gradients are about to be clipped by value; return the measurement to make before, if any."""
        indices = self.state.value_clip_within_step(indices) if self.state.stepping else indices
        self.state.value_clipped |= indices
        return self._measure_before(indices, listed, force=False) if indices else None

    def _measure_before(self, indices: Indices, listed: Sequence[int], *, force: bool) -> Measure | None:
        state, record = self.state, self.state.open
        # In a step that is not sampled, one of them tells whether the clipping belongs to it or to the next.
        asked = listed if record is not None and record.sampled else listed[:1]
        stepped = frozenset(filter(state.has_stepped, asked))
        if record is None or len(stepped) == len(asked):
            stepped = NO_INDICES
            record = state.coming = state.coming or StepRecord(state.number + 1, 0.0, self.schedule.due)
        if force:
            self.schedule.alarm(record, set(), finite=False)
        waiting = indices - stepped
        if not record.sampled or any(known.before_clip and waiting <= known.live for known in record.measurements):
            return None
        return Measure(record, stepped, scaled_by((*record.clips, *state.clips), waiting, stepping=False))

    # Optimizer steps

    def optimizer_gone(self, optimizer: OptimizerKey) -> None:
        """An optimizer does not exist any more."""
        self.state.gone.add(optimizer)
        self._announced.pop(optimizer, None)
        self._announced_at_scaler.pop(optimizer, None)
        self._signs.pop(optimizer, None)

    def steps_counted(self, made: int) -> None:
        """An optimizer of a resumed training says how many steps were made."""
        self.state.number_is_open = False
        self.state.number = made
        self.expected.count_from(made)

    def other_stepped(self) -> None:
        """An optimizer that holds no watched parameter steps."""
        self._unstepped.steps_of_others += 1

    def step_began(
        self,
        optimizer: OptimizerKey,
        indices: Indices,
        thread: int,
        at: float,
        outer: OptimizerKey | None = None,
        closure: bool = False,
        reached: Set[int] = NO_INDICES,
    ) -> Began | EndStep | CountSteps:
        """An optimizer begins to step.

        Args:
            optimizer: its key.
            indices: watched parameters that it steps.
            thread: the thread that steps.
            at: seconds since the epoch.
            outer: the optimizer whose step calls this one.
            closure: whether it is given a closure, which makes the gradients.
            reached: other threads whose losses under way reach watched parameters.
        """
        if self.quiet.step is not None:
            self.quiet.write_down(at)
        # Every other case needs an open step.
        owner = Owner.NEW if self.state.open is None else owner_of(self._beginning(optimizer, indices, outer))
        if owner is Owner.OUTER:
            return Began(owner, None)
        if owner is Owner.NEXT:
            return END_STEP
        if owner is Owner.NEW and self.state.number_is_open:
            return COUNT_STEPS
        self._announced[optimizer] = self._announced.get(optimizer, 0) + 1
        record = self._enter(optimizer, indices, thread, at, reached)
        if closure:
            self.state.awaiting_closure = optimizer
        else:
            self._hand_over(record, optimizer)
            self.state.stepping = indices
        return Began(owner, record)

    def _beginning(self, optimizer: OptimizerKey, indices: Indices, outer: OptimizerKey | None) -> Beginning:
        state = self.state
        replaces_gone = False
        if state.open is not None and state.gone and self.expected.is_new(optimizer):
            stepped = (known for key, known in state.open.stepped.items() if key in state.gone)
            replaces_gone = not indices.isdisjoint(NO_INDICES.union(*stepped))
        return Beginning(optimizer, indices, outer, state.open, state.waits_for_step, state.evaluated, replaces_gone)

    def _enter(
        self, optimizer: OptimizerKey, indices: Indices, thread: int, at: float, reached: Set[int]
    ) -> StepRecord:
        """Open a step or join the open one, and claim the losses that are being differentiated."""
        state, record = self.state, self.state.open
        if record is None:
            state.number += 1
            record = state.open = state.coming or StepRecord(state.number, at, self.schedule.due)
            record.step, record.at = state.number, at
            state.coming = None
        record.stepped[optimizer] = indices
        state.evaluated = None
        self._unstepped.counts = False
        if self.expected.only != (optimizer, indices):
            self.expected.begun(optimizer, indices, state.number, state.gone)
        if not state.under_way:
            state.thread = thread
            return record
        # An optimizer that steps within a backward pass steps with the gradients of what is being differentiated. It
        # may do so on a thread of autograd's, for whoever waits for the pass.
        for other in (thread,) if thread == state.thread else tuple(state.under_way):
            if other in (thread, state.thread) or other in reached:
                state.claim_losses(record, other, self.keep)
        return record

    def _hand_over(self, record: StepRecord, optimizer: OptimizerKey) -> None:
        """Give everything that waits to a step; at a sign of trouble, sample it if it is the first of several."""
        self.state.hand_over(record)
        found = self.quiet.shows_sign or self._signs[optimizer].of_step(record)
        self.quiet.shows_sign = False
        if (found or not record.finite) and self.schedule.alarm(record, {optimizer}, finite=record.finite):
            self.schedule.want_burst()

    def closure_left(self) -> None:
        """A closure was left, by returning or by raising."""
        self.state.awaiting_closure = None

    def closure_returned(self, optimizer: OptimizerKey, record: StepRecord | None) -> None:
        """The closure that an optimizer was given has made its gradients.

        Args:
            optimizer: its key.
            record: the step, at the first evaluation in it; None at any later one.
        """
        self.state.evaluated = optimizer
        if record is not None:
            self._hand_over(record, optimizer)

    def step_made(self, optimizer: OptimizerKey) -> Made:
        """An optimizer has stepped."""
        state, record = self.state, self.state.open
        state.stepping = NO_INDICES
        if record is None or optimizer not in record.stepped:
            return _IN_PROGRESS
        without_closure = state.awaiting_closure == optimizer
        if without_closure:
            state.hand_over(record)
        state.awaiting_closure = None
        if state.losses or state.clips or state.value_clipped or state.coming is not None:
            # A closure was evaluated again: what was noted meanwhile was not stepped with.
            state.drop_losses()
            state.forget_clipping(record.stepped[optimizer])
        only = self.expected.only
        ended = self.expected.all_stepped(record.stepped.keys()) if only is None else only[0] in record.stepped
        if without_closure:
            return Made(ended, without_closure=True)
        return _COMPLETE if ended else _IN_PROGRESS

    def scaler_stepped(
        self, optimizer: OptimizerKey, indices: Indices, thread: int, at: float
    ) -> Made | EndStep | CountSteps:
        """A loss scaler has stepped an optimizer, or skipped its step because it found Inf."""
        self.quiet.write_down(at)
        announced = self._announced.get(optimizer, 0)
        if announced != self._announced_at_scaler.get(optimizer, 0):
            self._announced_at_scaler[optimizer] = announced
            return _IN_PROGRESS
        owner = owner_of(self._beginning(optimizer, indices, None))
        if owner is Owner.NEXT:
            return END_STEP
        if owner is Owner.NEW and self.state.number_is_open:
            return COUNT_STEPS
        record = self._enter(optimizer, indices, thread, at, NO_INDICES)
        record.skip()
        self.state.hand_over(record)
        return _COMPLETE if self.expected.all_stepped(record.stepped.keys()) else _IN_PROGRESS

    def step_ended(self, now: float, costs: Costs, *, learn: bool = False) -> None:
        """The open step is over; the arguments are those of ``SamplingSchedule.ended``.

        Args:
            now: a clock in seconds that only goes forward.
            costs: what the agent has taken since it was attached.
            learn: whether an optimizer that begins the next step has ended it: its optimizers make a step together.
        """
        state, record = self.state, self.state.open
        if record is None:
            return
        if learn:
            self.expected.learn(record.stepped, state.number)
        state.open = None
        self.schedule.ended(record, now, costs)
        if self.expected.only is None:
            self.expected.forget_idle(record.step)
        if state.gone:
            state.gone = {key for key in state.gone if not self.expected.is_new(key)}
