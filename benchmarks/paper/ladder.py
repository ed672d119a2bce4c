"""The trainings that are compared, and what they came to."""

from dataclasses import dataclass

STABLE = 0.2
"""A training is stable where it neither diverges nor collapses: at its end it names this share of the test images
rightly, twice what guessing does."""
LEARNED = 0.8
"""And it has learned where it names this share."""
THRESHOLDS = (0.01, 0.02, 0.04, 0.08, 0.16)
"""The paper's grid."""


@dataclass(frozen=True)
class Method:
    """One way to train."""

    name: str
    clip: float | None = None
    normalised: bool = False


PLAIN = Method("without AGC")
METHODS = (PLAIN, *(Method(f"AGC {clip}", clip) for clip in THRESHOLDS), Method("BatchNorm", normalised=True))


@dataclass(frozen=True)
class Ladder:
    """What one method came to at one batch size with one seed, as the learning rate was raised."""

    batch: int
    method: Method
    seed: int
    accuracies: dict[int, float]
    """By the exponent of the learning rate, 2 to it; 0 where it diverged."""

    def largest(self, at_least: float) -> int | None:
        """Return the largest exponent at which it comes to such an accuracy."""
        return max((exponent for exponent, accuracy in self.accuracies.items() if accuracy >= at_least), default=None)
