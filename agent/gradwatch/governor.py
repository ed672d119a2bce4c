"""Which steps are sampled: as many as the overhead budget allows."""

import math
from dataclasses import dataclass

BURST_STEPS = 20
"""Steps that are all sampled at the start and after a sign of trouble."""
LONGEST_SECONDS = 30.0
"""There is at least one sample in this time."""
_WEIGHT = 0.1


@dataclass
class Governor:
    """Chooses the interval between samples from what it measures: its own time and the time of a step.

    Args:
        every: a fixed interval in steps; none: governed.
        budget: largest share of a step's time that the agent may take, such as 0.01.
    """

    every: int | None
    budget: float
    step_seconds: float = 0.0
    sample_seconds: float = 0.0
    spent_seconds: float = 0.0
    """The agent's own time in all, on the training thread."""
    elapsed_seconds: float = 0.0
    _last_sample_at: float = -math.inf
    _next_step: int = 0
    _burst_until: int = BURST_STEPS

    @property
    def interval_steps(self) -> int:
        """The interval in force."""
        if self.every is not None:
            return self.every
        if not self.step_seconds or not self.sample_seconds:
            return 1
        return max(1, math.ceil(self.sample_seconds / (self.budget * self.step_seconds)))

    @property
    def overhead_ratio(self) -> float:
        """The agent's share of the training's time so far, 0 to 1."""
        return self.spent_seconds / self.elapsed_seconds if self.elapsed_seconds else 0.0

    def alarm(self, step: int) -> None:
        """Sample every step for a while: something looks wrong."""
        self._burst_until = max(self._burst_until, step + BURST_STEPS)

    def due(self, step: int, now: float) -> bool:
        """Return whether this step is to be sampled; ``step`` counts from 1, ``now`` is monotonic seconds."""
        if self.every is None and step <= self._burst_until:
            return True
        return step >= self._next_step or (self.every is None and now - self._last_sample_at >= LONGEST_SECONDS)

    def sampled(self, step: int, now: float, seconds: float) -> None:
        """Take note of a sample and of the time that it took."""
        self.sample_seconds = _smoothed(self.sample_seconds, seconds)
        self._last_sample_at = now
        self._next_step = step + self.interval_steps

    def stepped(self, seconds: float) -> None:
        """Take note of the time from one step to the next."""
        self.step_seconds = _smoothed(self.step_seconds, seconds)
        self.elapsed_seconds += seconds


def _smoothed(before: float, now: float) -> float:
    return now if before == 0.0 else (1 - _WEIGHT) * before + _WEIGHT * now
