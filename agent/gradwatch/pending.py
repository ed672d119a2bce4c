"""What was noted since the last step, and waits for the next one: losses, clippings, numbers of the user's."""

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import Tensor

from gradwatch.buffers import Slot
from gradwatch.rounds import Clip, Round
from gradwatch.scalars import Scalar, kept, summed

_PENDING: Final = 1024
"""Losses and clippings that wait for their step; losses are summed then, the oldest clippings forgotten."""
_SCALED: Final = 16
"""Scaled losses that are remembered."""


class Pending:
    """What belongs to a step that has not begun."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.clips: deque[Clip] = deque(maxlen=_PENDING)
        self.value_clipped: frozenset[int] = frozenset()
        """Indices of the parameters whose gradients were clipped by value."""
        self.logged: dict[str, Scalar] = {}
        self.coming: Round | None = None
        """The next round, where something was measured of it already."""
        self.gone: frozenset[int] = frozenset()
        """Indices of the parameters whose gradients were thrown away since the last loss."""
        self._scaled: deque[tuple[weakref.ref[Tensor], Tensor]] = deque(maxlen=_SCALED)
        """Scaled losses that may still be propagated, with what they were."""
        self._scaler: weakref.ref[Any] | None = None
        self._under_way: list[weakref.ref[Tensor]] = []
        """Losses that are being differentiated, and belong to no step yet."""

    def __bool__(self) -> bool:
        """Return whether anything waits that depends on the gradients as they are."""
        return bool(self.losses or self.clips or self.value_clipped or self.coming is not None)

    @property
    def clipped(self) -> frozenset[int]:
        """Return the indices of the parameters whose gradients were clipped."""
        return self.value_clipped.union(*(clip.indices for clip in self.clips))

    def begin_backward(self, losses: Iterable[Tensor]) -> None:
        """Losses are about to be differentiated, maybe within another backward pass."""
        self._under_way += map(weakref.ref, losses)

    def end_backward(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Losses were differentiated; return those that belong to no step yet."""
        known = [loss for reference in self._under_way if (loss := reference()) is not None]
        self._under_way = [weakref.ref(loss) for loss in known if not _among(loss, losses)]
        return [loss for loss in losses if _among(loss, known)]

    def add_losses(self, losses: Iterable[Tensor]) -> None:
        """Keep what was differentiated for the next step."""
        self.gone = frozenset()
        self.losses += map(self._original, losses)
        if len(self.losses) >= _PENDING:
            self.losses = summed(self.losses)

    def enter(self, round_: Round) -> None:
        """An optimizer steps: within a backward pass, it steps with the gradient of what is being differentiated."""
        losses = [loss for known in self._under_way if (loss := known()) is not None]
        self._under_way = []
        round_.losses += map(self._original, losses)

    def _original(self, loss: Tensor) -> Tensor:
        """Return a loss as it was before a loss scaler multiplied it."""
        original = next((original for scaled, original in self._scaled if scaled() is loss), None)
        return kept(loss) if original is None else original

    def note_scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """Remember what a scaled loss was."""
        self._scaled.append((weakref.ref(scaled), kept(original)))
        self._scaler = weakref.ref(scaler)

    def originals(self, scalars: Sequence[Tensor]) -> list[Tensor]:
        """Return what the scaled ones of some losses were."""
        return [original for scaled, original in self._scaled if any(scaled() is scalar for scalar in scalars)]

    @property
    def loss_scale(self) -> Tensor | None:
        """Return the scale of the loss scaler, on its device."""
        scaler = self._scaler() if self._scaler is not None else None
        scale = getattr(scaler, "_scale", None)
        return scale if isinstance(scale, Tensor) else None

    def move_to(self, round_: Round) -> None:
        """Hand all over to the step that it belongs to."""
        round_.losses += self.losses
        round_.clips += self.clips
        round_.value_clipped |= bool(self.value_clipped)
        self.losses.clear()
        self.clips.clear()
        self.value_clipped = frozenset()
        if self.logged:
            round_.logged.update(self.logged)
            self.logged = {}

    def forget(self, indices: frozenset[int]) -> Slot | None:
        """Forget what was noted of gradients that are not what they were.

        Returns:
            The slot of the coming round, where nothing of it is left.
        """
        for clip in self.clips:
            clip.indices -= indices
        self.clips = deque((clip for clip in self.clips if clip.indices), maxlen=_PENDING)
        self.value_clipped -= indices
        coming = self.coming
        if coming is None:
            return None
        coming.forget(indices)
        if any(reading.live for reading in coming.readings):
            return None
        self.coming = None
        return coming.slot


def _among(tensor: Tensor, tensors: Iterable[Tensor]) -> bool:
    return any(tensor is other for other in tensors)
