"""The course of a run's loss: how far it has come down, how much of that is lost again, and whether it has a scale."""

import math
from dataclasses import dataclass
from functools import cached_property

from gradwatch_server.diagnosis.sample import median

FIRST_SAMPLES = 8
RECENT_SAMPLES = 5
LATELY_STEPS = 64


@dataclass(frozen=True, eq=False)
class LossHistory:
    """The course of the loss, which tells whether the run learns."""

    first: tuple[float, ...] = ()
    recent: tuple[float, ...] = ()
    """The last few losses, infinity for one that was not finite."""
    lowest: float = math.inf
    """Smallest median of a few losses in a row."""
    lately: tuple[float, ...] = ()
    """The last medians of a few losses in a row, one for each step."""

    @cached_property
    def reference(self) -> float:
        """The loss at the beginning; NaN without any.

        It is the median of the first losses, but at most the very first: a divergence lifts the median.
        """
        return min(self.first[0], median(self.first)) if self.first else math.nan

    @cached_property
    def now(self) -> float:
        """Median of the last few losses; NaN without any."""
        return median(self.recent) if self.recent else math.nan

    @property
    def scale(self) -> float:
        """The unit in which a change of the loss is measured: its size at the beginning."""
        return max(abs(self.reference), 1e-12)

    def progress(self, loss: float | None = None) -> float:
        """Return how far the loss has come down, as a share of the loss at the beginning.

        The share is 1 for a loss of zero, negative for a loss that rose, and NaN where no loss is known.

        Args:
            loss: the loss now; by default the median of the last few.
        """
        loss = self.now if loss is None else loss
        return (self.reference - loss) / self.scale if self.first else math.nan

    @property
    def has_scale(self) -> bool:
        """Whether the loss has been positive throughout, as far as known, so that quotients of it mean something.

        The losses of policies, critics and likelihoods pass through zero, or are zero by construction.
        """
        return not self.first or (min(*self.first, *self.recent, self.lowest) >= 0.0 and self.reference > 0.0)

    @property
    def varies(self) -> bool:
        """Whether the last few losses differ, as those of different batches do."""
        known = [loss for loss in self.recent if math.isfinite(loss)]
        return len(known) > 1 and max(known) - min(known) > 1e-4 * abs(self.now)

    def relapse(self, loss: float | None = None) -> float:
        """Return the share of the progress so far that is lost again; 0 if there was next to no progress.

        Args:
            loss: the loss now; by default the median of the last few.
        """
        loss = self.now if loss is None else loss
        made = self.reference - self.lowest
        if not self.first or not made > 0.1 * self.scale:
            return 0.0
        return (loss - self.lowest) / made

    def after(self, loss: float) -> "LossHistory":
        """Return the history with one more loss."""
        if math.isnan(loss):
            return self
        recent = (*self.recent, loss)[-RECENT_SAMPLES:]
        now = median(recent)
        return LossHistory(
            first=(*self.first, loss) if len(self.first) < FIRST_SAMPLES and math.isfinite(loss) else self.first,
            recent=recent,
            lowest=min(self.lowest, now) if len(recent) >= 3 else self.lowest,
            lately=(*self.lately, now)[-LATELY_STEPS:],
        )

    def risen(self, share: float, steps: int) -> bool:
        """Return whether the last ``steps`` medians all exceed the loss at the beginning by more than ``share`` of it.

        A loss that was zero or negative at the beginning never counts as risen: it does not measure how bad a run is.
        """
        if len(self.lately) < steps or not self.first or min(self.first) <= 0.0:
            return False
        return min(self.lately[-steps:]) > (1.0 + share) * self.reference
