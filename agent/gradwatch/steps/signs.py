"""Signs of trouble: what the loss and the clip norm of one step say beside those of the steps before it.

Each step is judged by its own numbers before its optimizer steps, so that it can still be sampled: one or two Python
floats are looked at, and a few numbers are kept of the earlier steps.
"""

import math
from typing import Final

from gradwatch.steps.state import StepRecord

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
