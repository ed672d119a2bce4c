"""Backward passes that no step of a watched parameter follows: the user is told once."""

from typing import Final

MOST_PASSES: Final = 200
"""Backward passes without a step of a watched parameter after which the user is told."""
MOST_PASSES_BESIDE_OTHERS: Final = 20
"""The same where other optimizers have stepped as often."""


class UnsteppedPasses:
    """Counts the backward passes before anything watched is stepped."""

    __slots__ = ("_passes", "counts", "steps_of_others")

    def __init__(self) -> None:
        self.counts = True
        """Whether nothing watched was stepped so far, and the user was not told."""
        self.steps_of_others = 0
        """Steps of optimizers that hold no watched parameter."""
        self._passes = 0

    def passed(self) -> int | None:
        """Count one more pass; return the number of all if the user must be told now, otherwise None."""
        self._passes += 1
        beside_others = min(self._passes, self.steps_of_others)
        if self._passes < MOST_PASSES and beside_others < MOST_PASSES_BESIDE_OTHERS:
            return None
        self.counts = False
        return self._passes
