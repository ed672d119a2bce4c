"""The sampling schedule: which steps are sampled, so that the agent stays within its share of the training time."""

import math
from collections import deque
from collections.abc import Set
from statistics import median
from typing import Final

from gradwatch.steps.state import OptimizerKey, StepRecord

BURST_STEPS: Final = 20
"""Steps in a row that are sampled at the start and after a sign of trouble."""
LONGEST_GAP_SECONDS: Final = 30.0
"""A sample is taken at least this often, whatever it costs."""
_REMEMBERED: Final = 32
"""Steps of which the costs are remembered, for medians."""


class OverheadAccount:
    """Keeps account of the agent's cost, and says whether the next step may be sampled.

    Each step pays ``budget_ratio`` of its time into the account, from which all costs of the agent are taken. A sample
    is due while the account is not overdrawn, so the interval between samples follows from their cost.

    Args:
        every_steps: a fixed interval in steps, or None to let the account decide.
        budget_ratio: the agent's share of the step time.
        burst_steps: steps in a row that are sampled at the start.
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
        self._burst = burst_steps
        self._balance_seconds = 0.0
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._samples: deque[float] = deque(maxlen=_REMEMBERED)
        self._rests: deque[float] = deque(maxlen=_REMEMBERED)
        self._since_sample_steps = 0
        self._since_sample_seconds = 0.0
        self._last_interval_steps = 1
        self.step_seconds = 0.0
        """Median time of a step, 0 where none is known."""

    def due(self, next_step: int) -> bool:
        """Return whether the next step is to be sampled."""
        if self.aligned:
            return self._burst > 0 or next_step % (self.every_steps or self._power_of_two()) == 0
        if self.every_steps is not None:
            return self._since_sample_steps + 1 >= self.every_steps or not self._samples
        if self._burst > 0 or self._since_sample_seconds >= LONGEST_GAP_SECONDS:
            return True
        return self._balance_seconds >= 0

    def stepped(self, step_seconds: float, agent_seconds: float, background_seconds: float, sampled: bool) -> None:
        """Book one step.

        Args:
            step_seconds: time since the step before, the agent's included; 0 for the first step.
            agent_seconds: the part of it that the agent took on the training thread.
            background_seconds: processor time of the agent's other threads meanwhile.
            sampled: whether the step was sampled.
        """
        if step_seconds:
            self._steps.append(step_seconds)
            self.step_seconds = median(self._steps)
        cost = agent_seconds + background_seconds
        # A step that waited for an evaluation pays no more than a usual one: credit must not pile up.
        paid = self.budget_ratio * min(step_seconds, 4 * self.step_seconds)
        self._balance_seconds = min(self._balance_seconds + paid - cost, 0.0)
        if sampled:
            self._samples.append(agent_seconds)
            self._last_interval_steps = self._since_sample_steps + 1
            self._since_sample_steps = 0
            self._since_sample_seconds = 0.0
            self._burst -= self._burst > 0
        else:
            self._rests.append(agent_seconds)
            self._since_sample_steps += 1
            self._since_sample_seconds += step_seconds

    def start_burst(self) -> None:
        """Sample every step for a while; not again before the account has recovered from the last time."""
        if self._burst <= 0 and self._balance_seconds >= 0:
            self._burst = BURST_STEPS

    def _power_of_two(self) -> int:
        """Return the interval in steps that the budget and the longest gap allow."""
        if not self.step_seconds:
            return 1
        wanted = self.sample_seconds / (self.budget_ratio * self.step_seconds)
        most = max(LONGEST_GAP_SECONDS / self.step_seconds, 1.0)
        return int(2 ** min(math.ceil(math.log2(max(wanted, 1.0))), math.floor(math.log2(most))))

    @property
    def sample_seconds(self) -> float:
        """Return the median time that the agent takes on the training thread in a sampled step."""
        return median(self._samples) if self._samples else 0.0

    @property
    def interval_steps(self) -> int:
        """Return the steps between the last two samples, or the fixed interval."""
        return self.every_steps or self._last_interval_steps

    @property
    def overhead_ratio(self) -> float:
        """Return the agent's typical share of the step time on the training thread."""
        if not self._steps or not self.step_seconds:
            return 0.0
        rest = median(self._rests) if self._rests else 0.0
        interval = self.interval_steps
        return (self.sample_seconds + rest * (interval - 1)) / interval / self.step_seconds


class SamplingSchedule:
    """Says which steps are sampled: as the account allows, and at once where something is not finite.

    Args:
        account: decides which steps are sampled while nothing is wrong.
    """

    def __init__(self, account: OverheadAccount) -> None:
        self.due = True
        """Whether the next step is to be sampled."""
        self._account: Final = account
        self._burst_wanted = False
        self._forced = False
        """Whether the next step is sampled although the account does not allow it."""
        self._was_finite = True
        """Whether all losses and clip norms of the step before this one were finite."""
        self._ended_at = 0.0
        self._spent_before = 0.0
        self._background_before = 0.0

    @property
    def interval_steps(self) -> int:
        """Return the steps between the last two samples, or the fixed interval."""
        return self._account.interval_steps

    def want_burst(self) -> None:
        """Sample every step for a while after this one, if that can be afforded."""
        self._burst_wanted = True

    def alarm(self, record: StepRecord, stepping: Set[OptimizerKey]) -> bool:
        """Sample a step in which something is not finite, although it is not due; only the first of several.

        Where an optimizer has already stepped without being measured, the next step is sampled instead.

        Args:
            record: the step.
            stepping: optimizers of the step that can still be measured.

        Returns:
            Whether it is the first such step.
        """
        if not self._was_finite:
            return False
        if not (record.sampled or record.skipped):
            record.sampled = record.stepped.keys() <= stepping
            self._forced = not record.sampled
        return True

    def ended(self, record: StepRecord, now: float, spent_seconds: float, background_seconds: float) -> None:
        """Book a step that is over, and decide whether the next one is sampled.

        Args:
            record: the step; a sampled one gets the numbers of the schedule.
            now: a clock in seconds that only goes forward.
            spent_seconds: time that the agent has taken on the training thread since it was attached.
            background_seconds: processor time of the agent's other threads since then.
        """
        account = self._account
        step_seconds = now - self._ended_at if self._ended_at else 0.0
        self._ended_at = now
        record.agent_seconds = spent_seconds - self._spent_before
        self._spent_before = spent_seconds
        background = background_seconds - self._background_before
        self._background_before = background_seconds
        account.stepped(step_seconds, record.agent_seconds, background, record.sampled)
        if self._burst_wanted:
            self._burst_wanted = False
            account.start_burst()
        self.due = self._forced or account.due(record.step + 1)
        self._forced = False
        if not record.skipped:
            self._was_finite = record.finite
        if record.sampled:
            record.scalars["step_seconds"] = account.step_seconds
            record.scalars["overhead_ratio"] = account.overhead_ratio
            record.scalars["interval_steps"] = float(account.interval_steps)
