"""The governor: when to sample, so that the agent stays within its share of the training time. Pure."""

import math
from collections import deque
from statistics import median
from typing import Final

BURST_STEPS: Final = 20
"""Samples at full rate after the start and after a sign of trouble."""
LONGEST_GAP_SECONDS: Final = 30.0
"""A sample is taken at least this often, whatever it costs."""
_REMEMBERED: Final = 32


class Governor:
    """Decides which steps are sampled.

    Time is an account: each step pays ``budget_ratio`` of the time it took into it, all that the agent does is taken
    from it, and a sample is due while it is not overdrawn. The interval between samples follows from what they cost.

    Args:
        every_steps: a fixed interval, or None to let the account decide.
        budget_ratio: the agent's share of the step time.
        burst_steps: samples at full rate to begin with.
        aligned: sample at steps that are multiples of the interval, a power of two where it is not fixed: ranks that
            each decide for themselves then sample the same steps, or all but some.
    """

    def __init__(
        self,
        every_steps: int | None,
        budget_ratio: float,
        burst_steps: int = BURST_STEPS,
        *,
        aligned: bool = False,
    ) -> None:
        self._aligned = aligned
        self._every_steps = every_steps
        self._budget_ratio = budget_ratio
        self._burst = burst_steps
        self._balance_seconds = 0.0
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._samples: deque[float] = deque(maxlen=_REMEMBERED)
        self._rests: deque[float] = deque(maxlen=_REMEMBERED)
        self._since_sample_steps = 0
        self._since_sample_seconds = 0.0
        self._last_interval_steps = 1

    def due(self, next_step: int) -> bool:
        """Return whether the next step is to be sampled."""
        if self._aligned:
            return self._burst > 0 or next_step % (self._every_steps or self._power_of_two()) == 0
        if self._every_steps is not None:
            return self._since_sample_steps + 1 >= self._every_steps or not self._samples
        if self._burst > 0 or self._since_sample_seconds >= LONGEST_GAP_SECONDS:
            return True
        return self._balance_seconds >= 0

    def stepped(self, step_seconds: float, agent_seconds: float, background_seconds: float, sampled: bool) -> None:
        """Book one step.

        Args:
            step_seconds: since the step before, all included; 0 for the first.
            agent_seconds: of these, the agent's on the training thread.
            background_seconds: processor time of the agent's other threads meanwhile.
            sampled: whether the step was sampled.
        """
        if step_seconds:
            self._steps.append(step_seconds)
        cost = agent_seconds + background_seconds
        # A step that waited for an evaluation pays no more than a usual one: credit must not pile up.
        paid = self._budget_ratio * min(step_seconds, 4 * self.step_seconds)
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

    def trouble(self) -> None:
        """Sample at full rate for a while; not again before the account has recovered from the last time."""
        if self._burst <= 0 and self._balance_seconds >= 0:
            self._burst = BURST_STEPS

    def _power_of_two(self) -> int:
        """Return the interval that the budget allows, and the longest gap."""
        if not self.step_seconds:
            return 1
        wanted = self.sample_seconds / (self._budget_ratio * self.step_seconds)
        most = max(LONGEST_GAP_SECONDS / self.step_seconds, 1.0)
        return int(2 ** min(math.ceil(math.log2(max(wanted, 1.0))), math.floor(math.log2(most))))

    @property
    def step_seconds(self) -> float:
        """Return the typical time of a step, 0 where none is known."""
        return median(self._steps) if self._steps else 0.0

    @property
    def sample_seconds(self) -> float:
        """Return the typical time of the agent in a sampled step on the training thread."""
        return median(self._samples) if self._samples else 0.0

    @property
    def interval_steps(self) -> int:
        """Return the number of steps from one sample to the next, as it was last."""
        return self._every_steps or self._last_interval_steps

    @property
    def overhead_ratio(self) -> float:
        """Return the agent's typical share of the step time on the training thread."""
        if not self._steps or not self.step_seconds:
            return 0.0
        rest = median(self._rests) if self._rests else 0.0
        interval = self.interval_steps
        return (self.sample_seconds + rest * (interval - 1)) / interval / self.step_seconds
