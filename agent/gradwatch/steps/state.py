"""The state of the steps of one training: the open step, and what waits for the next one."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from gradwatch.steps.records import Indices, NormClip, Number, OptimizerKey, StepRecord

MOST_LOSSES: Final = 1024
"""Losses that wait for their step; beyond, they are summed."""
MOST_CLIPS: Final = 1 << 14
"""Clippings that wait for their step; beyond, the oldest are forgotten. Some programs clip each parameter by itself."""

NO_INDICES: Final[Indices] = frozenset()

Loss = Any
"""A loss that is being differentiated; told from others by identity."""
Keep = Callable[[Loss], tuple[Number, bool]]
"""Returns the number to keep of a loss (unscaled, on its device), and whether it is finite as far as can be seen."""


@dataclass(slots=True)
class StepState:
    """State of the steps of one training between two events. Its numbers are opaque."""

    number: int
    """Number of the last step."""
    number_is_open: bool
    """Whether nothing has said yet how many steps a resumed training has made."""
    thread: int
    """The thread that trains. Others may train other models at the same time."""

    open: StepRecord | None = None
    """The step in which an optimizer has stepped, and others may."""
    coming: StepRecord | None = None
    """The next step, where something was measured of it before it began."""
    dropped: list[StepRecord] = field(default_factory=list)
    """Coming steps of which nothing is left; the recorder takes their buffers back."""

    losses: list[Number] = field(default_factory=list)
    """Losses whose gradients wait for a step."""
    losses_finite: bool = True
    clips: deque[NormClip] = field(default_factory=lambda: deque(maxlen=MOST_CLIPS))
    """Clippings whose gradients wait for a step."""
    value_clipped: Indices = NO_INDICES
    """Parameters whose gradients were clipped by value and wait for a step."""
    cleared: Indices = NO_INDICES
    """Parameters whose gradients were cleared since the last loss."""
    logged: dict[str, Number] = field(default_factory=dict)
    """Numbers of the user's for the next step."""

    under_way: dict[int, list[Loss]] = field(default_factory=dict)
    """Thread id -> losses whose ``backward()`` is running and which no step has claimed yet."""
    awaiting_closure: OptimizerKey | None = None
    """The optimizer that steps with gradients which its closure is still to make."""
    evaluated: OptimizerKey | None = None
    """The optimizer whose closure has made the gradients that are there."""
    gone: set[OptimizerKey] = field(default_factory=set)
    """Optimizers of the open step, or awaited ones, that do not exist any more."""

    @property
    def waits_for_step(self) -> bool:
        """Return whether losses, clippings or measurements of the present gradients wait for a step."""
        return bool(self.losses or self.clips or self.value_clipped or self.coming is not None)

    @property
    def noted(self) -> bool:
        """Return whether there are notes that a change of a gradient would make wrong."""
        return self.waits_for_step or (self.open is not None and bool(self.open.clipped))

    @property
    def clipped(self) -> Indices:
        """Return the parameters whose gradients were clipped, for the open step or the next one."""
        waiting = self.value_clipped.union(*(clip.indices for clip in self.clips)) if self.clips else self.value_clipped
        return waiting if self.open is None else waiting | self.open.clipped

    def claim_losses(self, record: StepRecord, thread: int, keep: Keep) -> None:
        """Give a step the losses that a thread is differentiating."""
        for loss in self.under_way.pop(thread, ()):
            number, finite = keep(loss)
            record.losses.append(number)
            record.losses_finite &= finite

    def hand_over(self, record: StepRecord) -> None:
        """Give everything that waits for a step to this one."""
        record.losses += self.losses
        record.losses_finite &= self.losses_finite
        record.finite = record.losses_finite
        record.clips += self.clips
        for clip in record.clips:
            record.finite &= clip.finite
        record.value_clipped |= bool(self.value_clipped)
        self.losses.clear()
        self.losses_finite = True
        self.clips.clear()
        self.value_clipped = NO_INDICES
        if self.logged:
            record.logged.update(self.logged)
            self.logged = {}

    def drop_losses(self) -> None:
        """Forget the losses that wait for a step."""
        self.losses.clear()
        self.losses_finite = True

    def forget_clipping(self, indices: Indices) -> None:
        """Forget the notes on gradients that changed after clipping, before an optimizer stepped with them."""
        for clip in self.clips:
            clip.indices -= indices
        self.clips = deque((clip for clip in self.clips if clip.indices), maxlen=MOST_CLIPS)
        self.value_clipped -= indices
        if self.coming is not None:
            self.coming.forget(indices)
            if not any(measurement.live for measurement in self.coming.measurements):
                self.dropped.append(self.coming)
                self.coming = None
        if self.open is not None and (known := indices & self.open.clipped):
            self.open.forget(frozenset(index for index in known if not self.has_stepped(index)))

    def has_stepped(self, index: int) -> bool:
        """Return whether an optimizer has stepped a parameter in the open step."""
        if self.open is None:
            return False
        return any(index in indices for key, indices in self.open.stepped.items() if key != self.awaiting_closure)


def is_among(loss: Loss, losses: Iterable[Loss]) -> bool:
    """Return whether ``loss`` is one of ``losses``, by identity: ``==`` of tensors compares their elements."""
    return any(other is loss for other in losses)
