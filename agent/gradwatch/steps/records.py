"""The record of one optimizer step: its losses, clippings and measurements.

Numbers are opaque here: most of them are tensors that are still on a device, and nothing in this package reads them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Indices = frozenset[int]
"""Indices of parameters, as they are registered."""
OptimizerKey = int
"""Stands for one optimizer object; never used again for another one."""
Number = Any
"""A number that may still be on a device: a float or a tensor of one element."""


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
    logged: dict[str, Number] = field(default_factory=dict)
    scalars: dict[str, Number] = field(default_factory=dict)
    rates: dict[int, Number] = field(default_factory=dict)
    """Learning rates of the parameter groups, by their places among the groups of all optimizers."""
    found_infs: list[Number] = field(default_factory=list)
    """What fused optimizers look at to skip their step: whether a loss scaler found Inf."""
    updates: list[WeightUpdate] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    """Parameters without elements that have a gradient."""
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
