"""The pace: which steps are sampled, as the governor allows, or at once where something is wrong."""

import time
import weakref
from collections.abc import Set
from typing import Final

from torch.optim import Optimizer

from gradwatch.governor import Governor
from gradwatch.rounds import Round


class Pace:
    """Tells the governor what each step took, and samples out of turn what is not finite.

    Args:
        governor: decides which steps are sampled otherwise.
    """

    def __init__(self, governor: Governor) -> None:
        self.due = True
        """Whether the next step is to be sampled."""
        self._governor: Final = governor
        self._in_trouble = False
        self._forced = False
        """Whether the next step is sampled although it is not due."""
        self._was_finite = True
        """Whether all losses and clip norms of the step before this one were finite."""
        self._finished_at = 0.0
        self._spent_before = 0.0
        self._background_before = 0.0

    @property
    def interval_steps(self) -> int:
        """Return the steps from one sample to the next, as it was last."""
        return self._governor.interval_steps

    def trouble(self) -> None:
        """Sample at full rate after this step, where that can be afforded."""
        self._in_trouble = True

    def alarm(self, round_: Round, stepping: Set[weakref.ref[Optimizer]]) -> bool:
        """Sample a step in which something is not finite, although it is not due; only the first of several.

        Where an optimizer was not measured and has stepped, the next step is sampled instead.

        Args:
            round_: the step.
            stepping: optimizers that are noted in it and can still be measured.

        Returns:
            Whether it is the first.
        """
        if not self._was_finite:
            return False
        if not (round_.sampled or round_.skipped):
            round_.sampled = round_.stepped.keys() <= stepping
            self._forced = not round_.sampled
        return True

    def finished(self, round_: Round, spent_seconds: float, background_seconds: float) -> None:
        """Book a step that is over, and decide whether the next one is sampled.

        Args:
            round_: the step; one that is sampled is told of its pace.
            spent_seconds: of the training thread, by the agent since it was attached.
            background_seconds: processor time of the agent's threads since then.
        """
        governor = self._governor
        now = time.perf_counter()
        step_seconds = now - self._finished_at if self._finished_at else 0.0
        self._finished_at = now
        round_.agent_seconds = spent_seconds - self._spent_before
        self._spent_before = spent_seconds
        background = background_seconds - self._background_before
        self._background_before = background_seconds
        governor.stepped(step_seconds, round_.agent_seconds, background, sampled=round_.sampled)
        if self._in_trouble:
            self._in_trouble = False
            governor.trouble()
        self.due = governor.due(round_.step + 1) or self._forced
        self._forced = False
        if not round_.skipped:
            self._was_finite = round_.finite
        if round_.sampled:
            round_.scalars["step_seconds"] = governor.step_seconds
            round_.scalars["overhead_ratio"] = governor.overhead_ratio
            round_.scalars["interval_steps"] = float(governor.interval_steps)
