"""The state of the steps of one training: the record of each step, and what waits for the next one.

Numbers are opaque here: most of them are tensors that are still on a device, and nothing in this package reads them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

Indices = frozenset[int]
"""Indices of parameters, as they are registered."""
OptimizerKey = int
"""Stands for one optimizer object; never used again for another one."""
Number = Any
"""A number that may still be on a device: a float or a tensor of one element."""

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
class NormClip:
    """One call of ``clip_grad_norm_``.

    ``indices`` are the parameters whose gradients the call scaled and which have not changed or been stepped with
    since.
    """

    total_norm: Number
    max_norm: Number
    indices: Indices
    partial: bool = False
    """Whether ``total_norm`` is the norm of this rank's part of sharded gradients only."""
    norm_type: float = 2.0
    repeated: Mapping[int, int] = field(default_factory=dict)
    """How often each parameter was scaled that was listed more than once, by index."""
    finite: bool = True
    """Whether ``total_norm`` is finite, as far as can be seen without waiting for a device."""
    ranks: tuple[int, ...] = ()
    """Of a partial norm: the global ranks whose parts make it up."""
    repeats: bool = False
    """Whether another rank tells the same part of a partial norm."""


ScaledBy = tuple[NormClip, Indices]
"""A clipping, and those parameters of a measurement whose gradients it had scaled before they were measured."""


def scaled_by(clips: Iterable[NormClip], indices: Indices, *, stepping: bool) -> tuple[ScaledBy, ...]:
    """Return the clippings that scaled some gradients before they are measured.

    Args:
        clips: known clippings, in order.
        indices: parameters whose gradients are measured.
        stepping: whether an optimizer now steps with these gradients; a clipping then no longer waits for them.
    """
    found = tuple((clip, mine) for clip in clips if (mine := clip.indices & indices))
    if stepping:
        for clip, mine in found:
            clip.indices -= mine
    return found


@dataclass(slots=True)
class Measurement:
    """Unit norms of the gradients and weights that were measured in one pass."""

    indices: Indices
    norms: Any
    """Where the unit norms arrive; the recorder's business."""
    before_clip: bool
    """Whether they were measured before ``clip_grad_norm_`` or ``clip_grad_value_`` changed the gradients."""
    clips: Sequence[ScaledBy] = ()
    """Clippings by norm that had scaled these gradients before."""
    void: Indices = frozenset()
    """Parameters of which it says nothing: their gradients changed afterwards, or had been stepped with before."""
    changed: Indices = frozenset()
    """Parameters whose gradients have changed since clipping, so that it does not tell their norms before it."""
    compared: Callable[[bool], None] | None = None
    """Of one before clipping: takes whether it agrees with the one at the step."""
    scale: Number | None = None
    """What the gradients are multiplied by: the scale of a loss scaler; None for 1."""
    nonfinite: dict[int, float] = field(default_factory=dict)
    """Number of NaN and infinite elements of a gradient, by index, where they were counted."""
    limits: Any = None
    """Largest ratio that AGC let through, shape (parameters of the plan,); None where AGC did not clip."""

    @property
    def live(self) -> Indices:
        """Return the parameters for which the measurement is still valid."""
        return self.indices - self.void


@dataclass(slots=True)
class WeightUpdate:
    """Unit norms of the difference that a step made to some parameters."""

    indices: Sequence[int]
    starts: Sequence[int]
    units: Any


@dataclass(slots=True)
class StepRecord:
    """One optimizer step, or an attempt at one."""

    step: int
    at: float
    """Seconds since the epoch."""
    sampled: bool
    stepped: dict[OptimizerKey, Indices] = field(default_factory=dict)
    """Optimizers that have stepped, with the parameters that each of them steps."""
    measurements: list[Measurement] = field(default_factory=list)
    losses: list[Number] = field(default_factory=list)
    """Losses whose sum is what the applied gradients belong to."""
    losses_finite: bool = True
    clips: list[NormClip] = field(default_factory=list)
    value_clipped: bool = False
    clipped_late: list[ScaledBy] = field(default_factory=list)
    """Clippings by norm within the step of an optimizer, after its gradients were measured."""
    value_clipped_late: Indices = NO_INDICES
    """Parameters that were clipped by value then."""
    logged: dict[str, Number] = field(default_factory=dict)
    scalars: dict[str, Number] = field(default_factory=dict)
    rates: dict[int, Number] = field(default_factory=dict)
    """Learning rates of the parameter groups, by their places among the groups of all optimizers."""
    found_infs: list[Number] = field(default_factory=list)
    """What fused optimizers look at to skip their step: whether a loss scaler found Inf."""
    updates: list[WeightUpdate] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    """Parameters without elements that have a gradient."""
    unstepped: Indices = NO_INDICES
    """Parameters with a gradient that no optimizer holds."""
    excluded: Indices = frozenset()
    """Parameters that AGC leaves alone, or would leave alone: those of the classifier."""
    seen: Sequence[Any] = ()
    """What the hooks saw that look for the origin of the first non-finite number."""
    buffers: Any = None
    """Buffers of the measurements; the recorder's business."""
    finite: bool = True
    """Whether losses and clip norms are finite, as far as can be seen without waiting for a device."""
    skipped: bool = False
    """Whether a loss scaler skipped an optimizer's step: there is no sample then."""
    agent_seconds: float = 0.0
    urgent: bool = False
    """Whether it shows a sign of trouble, or follows one that does: it is written and sent at once."""

    def map_numbers(self, change: Callable[[Number], Number], change_units: Callable[[Any], Any]) -> None:
        """Put another number in the place of each one that may be on a device.

        Args:
            change: given each number.
            change_units: given the unit norms of each weight update.
        """
        for numbers in (self.losses, self.found_infs):
            numbers[:] = map(change, numbers)
        for named in (self.logged, self.scalars):
            named.update({name: change(number) for name, number in named.items()})
        self.rates.update({place: change(rate) for place, rate in self.rates.items()})
        for clip in self._all_clips():
            clip.total_norm, clip.max_norm = change(clip.total_norm), change(clip.max_norm)
        for measurement in self.measurements:
            if measurement.scale is not None:
                measurement.scale = change(measurement.scale)
        for update in self.updates:
            update.units = change_units(update.units)
        for flags in self.seen:
            flags.map_numbers(change)

    def _all_clips(self) -> Iterable[NormClip]:
        earlier = (clip for measurement in self.measurements for clip, _ in measurement.clips)
        return {id(clip): clip for clip in (*self.clips, *earlier)}.values()

    @property
    def clipped(self) -> Indices:
        """Return the parameters with notes that hold only while their gradients stay as clipping left them."""
        if not self.sampled:
            return frozenset()
        measured = (measurement.live for measurement in self.measurements if measurement.before_clip)
        return frozenset().union(*(clip.indices for clip in self.clips), *measured)

    def forget(self, indices: Indices) -> None:
        """Forget the notes on gradients that changed before an optimizer stepped with them."""
        for clip in self.clips:
            clip.indices -= indices
        for measurement in self.measurements:
            if measurement.before_clip:
                measurement.void |= indices

    def skip(self) -> None:
        """Drop the measurements of a skipped step: the Inf found by a loss scaler says nothing about the gradients."""
        self.skipped = True
        self.sampled = False
        for measured in (self.measurements, self.updates, self.empty):
            measured.clear()


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
    stepping: Indices = NO_INDICES
    """Parameters of the optimizer that is in the middle of its step, until their gradients change."""
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
        self.stepping = NO_INDICES
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

    def clip_within_step(self, clip: NormClip) -> bool:
        """Give a clipping to the step that an optimizer is making; return whether nothing of it waits for another.

        Hooks of the optimizer, or the optimizer itself, clip after the gradients were measured.
        """
        record, late = self.open, clip.indices & self.stepping
        if record is None or not late or clip.partial:
            return False
        clip.indices -= late
        record.clips.append(clip)
        record.clipped_late.append((clip, late))
        record.finite &= clip.finite
        return not clip.indices

    def value_clip_within_step(self, indices: Indices) -> Indices:
        """Give clipping by value to the step that an optimizer is making; return the parameters that wait."""
        record, late = self.open, indices & self.stepping
        if record is None or not late:
            return indices
        record.value_clipped = True
        record.value_clipped_late |= late
        return indices - late

    def has_stepped(self, index: int) -> bool:
        """Return whether an optimizer has stepped a parameter in the open step."""
        if self.open is None:
            return False
        return any(index in indices for key, indices in self.open.stepped.items() if key != self.awaiting_closure)


def is_among(loss: Loss, losses: Iterable[Loss]) -> bool:
    """Return whether ``loss`` is one of ``losses``, by identity: ``==`` of tensors compares their elements."""
    return any(other is loss for other in losses)
