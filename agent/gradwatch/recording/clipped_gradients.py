"""Whether gradients are still what clipping left when an optimizer steps with them.

Between the two a program may add noise (differential privacy), decay weights by hand, mask, average over ranks, or put
other gradients in place. The norm before clipping then does not follow from the gradients that are stepped with: it has
to be measured when clipping is called, which costs a second pass. So both are measured until they have agreed often
enough; from then on one pass does, identity and version of each gradient tell of a change, and both are measured now
and then, since no version tells of what is done to a gradient's ``data``.
"""

from typing import Final

from gradwatch.recording.optimizer_parameters import OptimizerParameters

_SURE: Final = 10
"""Samples in which gradients were left alone after which they are believed to be."""
_CHECKED_AGAIN: Final = 32
"""Samples after which both norms are measured again."""


class ClippedGradients:
    """Knows whether a training leaves gradients alone between clipping and stepping."""

    def __init__(self) -> None:
        self._agreed = 0
        """Samples in a row whose two norms agreed."""
        self._unchecked = 0
        self._left: dict[int, tuple[int, int]] = {}
        """Index of a parameter -> identity and version of its gradient after it was clipped for the next step."""

    @property
    def are_left_alone(self) -> bool:
        """Return whether one measurement does, at the step."""
        return self._agreed >= _SURE and self._unchecked < _CHECKED_AGAIN

    def note(self, listed: OptimizerParameters) -> None:
        """Note the gradients that a clipping has left for a sampled step."""
        self._unchecked += 1
        for index, parameter in zip(listed.indices, listed.parameters, strict=True):
            if parameter.grad is not None:
                self._left[index] = id(parameter.grad), parameter.grad._version  # noqa: SLF001

    def changed(self, listed: OptimizerParameters) -> frozenset[int]:
        """Return the parameters of an optimizer that steps whose gradients are not what clipping left."""
        left, self._left = self._left, {}
        found = [
            index
            for index, parameter in zip(listed.indices, listed.parameters, strict=True)
            if index in left and _state_of(parameter.grad) != left.pop(index)
        ]
        self._left = left
        if found:
            self._agreed = 0
        return frozenset(found)

    def compared(self, agree: bool) -> None:
        """Take note of a sample in which both were measured; called by the collector's thread."""
        self._agreed = self._agreed + 1 if agree else 0
        self._unchecked = 0


def _state_of(grad: object) -> tuple[int, int]:
    return id(grad), getattr(grad, "_version", -1)
