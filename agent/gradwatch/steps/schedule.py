"""The sampling schedule: which steps are sampled, so that the agent stays within its share of the training time.

A step whose loss or clip norm shows a sign of trouble (``gradwatch.steps.quiet``) is sampled at once.
"""

import math
from collections import deque
from collections.abc import Callable, Set
from statistics import median
from typing import Final, NamedTuple

from gradwatch.steps.state import OptimizerKey, StepRecord

BURST_STEPS: Final = 20
"""Steps in a row that are sampled at the start and after a sign of trouble."""
AHEAD_STEPS: Final = 16
"""Least number of steps ahead of the training at which several ranks begin a burst together."""
AHEAD_SECONDS: Final = 0.5
"""Least time until then: each of them has learned of it by then."""
RESERVE_SAMPLES: Final = 4 * BURST_STEPS
"""Samples that the account keeps for the start and for signs of trouble."""
LONGEST_GAP_SECONDS: Final = 30.0
"""A sample is taken at least this often, whatever it costs."""
_RESERVE_SHARE: Final = 0.15
"""Share of what is paid that fills the reserve up again."""
_MOST_CREDIT: Final = 2.0
"""Samples that are paid for and not taken: credit must not pile up."""
_LARGEST_OVERHEAD: Final = 1.25
"""Times the budget that hooks, threads and samples together may take, as long as samples keep a part of it."""
_LEAST_PAY: Final = 0.69
"""Share of the budget that samples have, whatever hooks and threads take: sampling less would not save that."""
_REMEMBERED: Final = 32
"""Steps of which times and costs are remembered, for medians."""
_REVIEW_STEPS: Final = 16
"""Steps after which the medians of times and hooks are taken again."""
_REVIEW_SECONDS: Final = 2.0
"""Time over which the work of the threads is averaged."""

_NONE, _UNUSUAL, _NOT_FINITE = 0, 1, 2
"""Signs of trouble, the worst last."""


class Costs(NamedTuple):
    """Everything that the agent has taken since it was attached, in seconds."""

    hooks: float = 0.0
    """On the training thread, without samples."""
    samples: float = 0.0
    """On the training thread, for samples."""
    threads: float = 0.0
    """Processor time of the agent's threads, without samples."""
    thread_sample: float = 0.0
    """Processor time that one sample takes the agent's threads, on average: to build, write and send it."""


class OverheadAccount:
    """Keeps account of what samples cost, and says whether the next step may be sampled.

    Each step pays ``budget_ratio`` of its time into the account, which counts in samples: what is paid, divided by what
    a sample costs. What hooks and threads take is not booked, as sampling less would not save it; only where all of it
    together would exceed the budget by a quarter are samples paid less. A part of the pay fills a reserve, from which
    the samples at the start and after a sign of trouble are taken.

    Args:
        every_steps: a fixed interval in steps, or None to let the account decide.
        budget_ratio: the agent's share of the step time.
        burst_steps: steps in a row that are sampled at the start; at a fixed interval it is the first one.
        aligned: sample steps that are multiples of the interval (a power of two where it is not fixed), so that ranks
            which decide for themselves sample the same steps nearly always.
    """

    def __init__(
        self,
        every_steps: int | None,
        budget_ratio: float,
        burst_steps: int = BURST_STEPS,
        *,
        aligned: bool = False,
    ) -> None:
        self.aligned = aligned
        self.every_steps = every_steps
        self.budget_ratio = budget_ratio
        self._burst = burst_steps if every_steps is None else min(burst_steps, 1)
        self._credit = 1.0
        """Samples that are paid for."""
        self._reserve = float(RESERVE_SAMPLES)
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._hooks: deque[float] = deque(maxlen=_REMEMBERED)
        self._samples: deque[float] = deque(maxlen=_REMEMBERED)
        self._is_due = False
        """Whether the coming step is sampled though nothing is wrong."""
        self._pay_ratio = budget_ratio
        """Share of the time that samples may take."""
        self._until_review_steps = 0
        self._since_sample_steps = 0
        self._since_sample_seconds = 0.0
        self._last_interval_steps = 1
        self.step_seconds = 0.0
        """Median time of a step, 0 where none is known."""
        self.sample_seconds = 0.0
        """Time that a sample takes, on the training thread and the agent's threads together; 0 before the first."""
        self.fixed_ratio = 0.0
        """Share of the time that hooks and threads take, sampled or not."""

    def due(self, next_step: int) -> bool:
        """Return whether the next step is to be sampled."""
        if self.aligned:
            self._is_due = next_step % (self.every_steps or self._power_of_two()) == 0
        elif self.every_steps is not None:
            self._is_due = self._since_sample_steps + 1 >= self.every_steps or not self._samples
            return self._is_due
        else:
            gap_seconds = self._since_sample_seconds + self.step_seconds
            self._is_due = self._credit >= 1 or gap_seconds >= LONGEST_GAP_SECONDS
        return self._is_due or self._burst > 0

    def stepped(self, step_seconds: float, hooks_seconds: float, sample: float | None, threads_ratio: float) -> None:
        """Book one step.

        Args:
            step_seconds: time since the step before, the agent's included; 0 for the first step.
            hooks_seconds: the part of it that the agent's hooks took, sampled or not.
            sample: where the step was sampled, the seconds that this took; else None.
            threads_ratio: share of the time that the agent's threads take, samples left out.
        """
        if step_seconds:
            self._steps.append(step_seconds)
        self._hooks.append(hooks_seconds)
        if sample is not None:
            self._samples.append(sample)
            self.sample_seconds = median(self._samples)
            self._take_sample()
        else:
            self._since_sample_steps += 1
            self._since_sample_seconds += step_seconds
        self._until_review_steps -= 1
        if sample is not None or self._until_review_steps <= 0:
            self._review(threads_ratio)
        if self.sample_seconds:
            # A step that waited for an evaluation pays no more than a usual one: credit must not pile up.
            paid = self._pay_ratio * min(step_seconds, 4 * self.step_seconds) / self.sample_seconds
            if self._reserve < RESERVE_SAMPLES:
                self._reserve += _RESERVE_SHARE * paid
                paid *= 1 - _RESERVE_SHARE
            self._credit = min(self._credit + paid, _MOST_CREDIT)

    def _take_sample(self) -> None:
        """Take a sample from what is paid; from the reserve if it is one of a burst, or of a step that was not due."""
        if self._burst > 0:
            self._burst -= 1
        if self._is_due:
            self._credit = max(self._credit - 1, 0.0)
        else:
            self._reserve = max(self._reserve - 1, 0.0)
        self._last_interval_steps = self._since_sample_steps + 1
        self._since_sample_steps = 0
        self._since_sample_seconds = 0.0

    def _review(self, threads_ratio: float) -> None:
        self._until_review_steps = _REVIEW_STEPS
        if self._steps:
            self.step_seconds = median(self._steps)
            self.fixed_ratio = median(self._hooks) / self.step_seconds + threads_ratio
            left = _LARGEST_OVERHEAD * self.budget_ratio - self.fixed_ratio
            self._pay_ratio = min(max(left, _LEAST_PAY * self.budget_ratio), self.budget_ratio)

    def start_burst(self) -> None:
        """Sample every step for a while, as long as the reserve lasts."""
        self._burst = max(self._burst, min(BURST_STEPS, int(self._reserve)))

    @property
    def affords_sample(self) -> bool:
        """Return whether a sample that is not due can be taken."""
        return self._reserve >= 1

    def _power_of_two(self) -> int:
        """Return the interval in steps that the budget and the longest gap allow."""
        if not self.step_seconds:
            return 1
        wanted = self.sample_seconds / (self._pay_ratio * self.step_seconds)
        most = max(LONGEST_GAP_SECONDS / self.step_seconds, 1.0)
        return int(2 ** min(round(math.log2(max(wanted, 1.0))), math.floor(math.log2(most))))

    @property
    def interval_steps(self) -> int:
        """Return the steps between the last two samples, or the fixed interval."""
        return self.every_steps or self._last_interval_steps

    @property
    def overhead_ratio(self) -> float:
        """Return the share of the step time that hooks, threads and samples take at this interval."""
        if not self.step_seconds:
            return 0.0
        return self.fixed_ratio + self.sample_seconds / self.interval_steps / self.step_seconds


class SamplingSchedule:
    """Says which steps are sampled: as the account allows, and at once at a sign of trouble.

    Args:
        account: decides which steps are sampled while nothing is wrong.
    """

    def __init__(self, account: OverheadAccount) -> None:
        self.due = True
        """Whether the next step is to be sampled."""
        self.needs_record = True
        """Whether the next step needs a record: it is sampled, or the threads' work is to be averaged."""
        self._account: Final = account
        self.ask: Callable[[int], None] = _ask_nobody
        """Has all ranks sample from a step on, where several take each sample together."""
        self._asked = range(0)
        """The burst that this rank has asked for last."""
        self._agreed = range(0)
        """The burst that all ranks take together, or have taken last."""
        self._burst_wanted = False
        self._forced = False
        """Whether the next step is sampled although the account does not allow it."""
        self._trouble_before = _NONE
        """The sign of trouble of the step before this one."""
        self._trouble = _NONE
        """The worst sign of this step so far."""
        self._ended_at = 0.0
        self._before = Costs()
        self._spent_before = 0.0
        self._reviewed_at = 0.0
        self._threads_before = 0.0
        self._threads_ratio = 0.0

    @property
    def interval_steps(self) -> int:
        """Return the steps between the last two samples, or the fixed interval."""
        return self._account.interval_steps

    def want_burst(self) -> None:
        """Sample every step for a while after this one, if that can be afforded."""
        self._burst_wanted = self.needs_record = True

    def sample_from(self, step: int) -> None:
        """Take the burst that a rank has named by its first step; other threads than the training's may call this.

        One that begins while another goes on is left out, on all ranks alike.
        """
        if step >= self._agreed.stop:
            self._agreed = range(step, step + BURST_STEPS)

    def alarm(self, record: StepRecord, stepping: Set[OptimizerKey], *, finite: bool) -> bool:
        """Sample a step that shows a sign of trouble, although it is not due; only the first of several.

        Where an optimizer has already stepped without being measured, the next step is sampled instead.

        Args:
            record: the step.
            stepping: optimizers of the step that can still be measured.
            finite: whether its loss and its clip norm are finite. The first step in which they are not is always
                sampled, any other as long as the reserve lasts.

        Returns:
            Whether it is the first such step.
        """
        record.urgent = True
        trouble = _UNUSUAL if finite else _NOT_FINITE
        self._trouble = max(self._trouble, trouble)
        if self._trouble_before >= trouble:
            return False
        if not (record.sampled or record.skipped) and (self._affords_alone or not finite):
            record.sampled = record.stepped.keys() <= stepping
            self._forced = not record.sampled
        return True

    def sample_next(self, *, finite: bool, begun: bool) -> None:
        """Sample the next step, as ``alarm`` does this one: an earlier step has shown a sign of trouble.

        Args:
            finite: whether the numbers of that step are finite.
            begun: whether a step has begun that is not over.
        """
        if self._affords_alone or not finite:
            self._forced, self.due = self._forced or begun, self.due or not begun
        self._burst_wanted = self.needs_record = True

    def ended(self, record: StepRecord, now: float, costs: Costs) -> None:
        """Book a step that is over, and decide whether the next one is sampled.

        Args:
            record: the step; a sampled one gets the numbers of the schedule.
            now: a clock in seconds that only goes forward.
            costs: what the agent has taken so far.
        """
        account, before = self._account, self._before
        step_seconds = now - self._ended_at if self._ended_at else 0.0
        self._ended_at, self._before = now, costs
        sample, spent = costs.samples - before.samples, costs.hooks + costs.samples
        hooks = spent - self._spent_before - sample
        self._spent_before = spent
        record.agent_seconds = hooks + sample
        if now - self._reviewed_at >= _REVIEW_SECONDS:
            self._average_threads(now, costs.threads)
        account.stepped(
            step_seconds, hooks, sample + costs.thread_sample if record.sampled else None, self._threads_ratio
        )
        if self._burst_wanted:
            self._burst_wanted = False
            if account.aligned:
                self._ask_all(record.step)
            else:
                account.start_burst()
        following = record.step + 1
        self.due = account.due(following) or following in self._agreed or self._forced
        self._forced = False
        self.needs_record = self.due or now - self._reviewed_at >= _REVIEW_SECONDS
        if not record.skipped:
            self._trouble_before, self._trouble = self._trouble, _NONE
        if record.sampled:
            record.scalars["step_seconds"] = account.step_seconds
            record.scalars["overhead_ratio"] = account.overhead_ratio
            record.scalars["interval_steps"] = float(account.interval_steps)

    def passed(self, step: int, now: float, spent_seconds: float) -> None:
        """Book a step without a record, and decide whether the next one is sampled.

        Args:
            step: its number.
            now: a clock in seconds that only goes forward.
            spent_seconds: time that the agent has taken on the training thread since it was attached.
        """
        step_seconds = now - self._ended_at if self._ended_at else 0.0
        self._ended_at = now
        hooks = spent_seconds - self._spent_before
        self._spent_before = spent_seconds
        self._account.stepped(step_seconds, hooks, None, self._threads_ratio)
        self._trouble_before, self._trouble = self._trouble, _NONE
        self.due = self._account.due(step + 1) or step + 1 in self._agreed
        self.needs_record = self.due or self._burst_wanted or now - self._reviewed_at >= _REVIEW_SECONDS

    @property
    def _affords_alone(self) -> bool:
        """Return whether this rank can take a sample that is not due; where others have a part in it, it cannot."""
        return self._account.affords_sample and not self._account.aligned

    def _ask_all(self, step: int) -> None:
        """Ask all ranks for a burst, unless one goes on or is asked for."""
        account = self._account
        if account.affords_sample and step >= max(self._agreed.stop, self._asked.stop):
            ahead = AHEAD_STEPS
            if account.step_seconds:
                ahead = max(ahead, math.ceil(AHEAD_SECONDS / account.step_seconds))
            self._asked = range(step + ahead, step + ahead + BURST_STEPS)
            self.ask(self._asked.start)

    def _average_threads(self, now: float, threads_seconds: float) -> None:
        if self._reviewed_at:
            self._threads_ratio = (threads_seconds - self._threads_before) / (now - self._reviewed_at)
        self._reviewed_at, self._threads_before = now, threads_seconds


def _ask_nobody(_step: int) -> None:
    """Do nothing: this rank samples alone."""
