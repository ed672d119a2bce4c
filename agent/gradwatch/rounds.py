"""What the training thread hands over after each step: numbers still on the device, nothing computed yet."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gradwatch import wire
from gradwatch.hooks.module_outputs import FiniteFlags
from gradwatch.model.registry import RegisteredParameters
from gradwatch.norms.buffers import SampleBuffers, UnitNorms
from gradwatch.norms.scalars import Scalar


@dataclass(slots=True)
class Clip:
    """One call of ``clip_grad_norm_``."""

    total_norm: Tensor
    max_norm: Scalar
    indices: frozenset[int]
    """Of the parameters whose gradients it scaled, that still are what it made of them, and wait for their step."""
    partial: bool = False
    """Whether the norm is this rank's part of it, of sharded gradients."""
    norm_type: float = 2.0
    repeated: Mapping[int, int] = field(default_factory=dict)
    """How often it scaled each that it scaled more than once, by index."""
    finite: bool = True
    """Whether the norm is, as far as can be seen without waiting."""


Acted = tuple[Clip, frozenset[int]]
"""A clipping, and the parameters of a reading whose gradients it had scaled when they were read."""


def acted(clips: Iterable[Clip], indices: frozenset[int], *, stepping: bool) -> tuple[Acted, ...]:
    """Return the clippings that made some gradients what they are.

    Args:
        clips: those that are known.
        indices: of the parameters.
        stepping: whether they are stepped with these gradients: what follows is about others.
    """
    found = tuple((clip, mine) for clip in clips if (mine := clip.indices & indices))
    if stepping:
        for clip, mine in found:
            clip.indices -= mine
    return found


@dataclass(slots=True)
class Reading:
    """Unit norms of the parameters that one optimizer steps."""

    norms: UnitNorms
    before_clip: bool
    clips: Sequence[Acted] = ()
    """Clippings by norm that came before it."""
    void: frozenset[int] = frozenset()
    """Indices of gradients of which it says nothing: they were changed after it, or had been stepped before."""
    scale: Tensor | None = None
    """What the gradients are multiplied by, with a fused optimizer under a loss scaler."""
    nonfinite: dict[int, float] = field(default_factory=dict)
    """Elements of gradients that are NaN or infinite, by index, where they were counted."""
    limits: NDArray[np.float64] | None = None
    """Largest ratio that AGC lets through, for each parameter of the plan; None where it did not clip."""

    @property
    def live(self) -> frozenset[int]:
        """Return the indices of the gradients that it speaks of."""
        return frozenset(self.norms.plan.indices) - self.void


@dataclass(slots=True)
class Update:
    """Change of some parameters over the step: unit norms of the differences."""

    indices: Sequence[int]
    starts: Sequence[int]
    units: Tensor


@dataclass(slots=True)
class Round:
    """One step."""

    step: int
    at: float
    sampled: bool
    slot: SampleBuffers | None = None
    stepped: dict[weakref.ref[Optimizer], frozenset[int]] = field(default_factory=dict)
    """The optimizers that have stepped, with the indices of their parameters. An id may be another's by now."""
    readings: list[Reading] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    """Their sum is the loss whose gradient was applied."""
    clips: list[Clip] = field(default_factory=list)
    value_clipped: bool = False
    logged: dict[str, Scalar] = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)
    rates: dict[int, Scalar] = field(default_factory=dict)
    """Learning rates of the parameter groups, by their places among all."""
    found_infs: list[Tensor] = field(default_factory=list)
    """What fused optimizers look at to skip their step: whether a loss scaler has found Inf."""
    updates: list[Update] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    """Indices of parameters without elements that have a gradient."""
    excluded: frozenset[int] = frozenset()
    """Indices of parameters that AGC leaves alone, or would: the classifier's."""
    seen: Sequence[FiniteFlags] = ()
    """What hooks saw that look for the first bad number."""
    finite: bool = True
    """Whether its losses and clip norms are, as far as can be seen without waiting."""
    skipped: bool = False
    """Whether the loss scaler skipped the step of an optimizer: there is no sample then."""
    agent_seconds: float = 0.0

    @property
    def clipped(self) -> frozenset[int]:
        """Return the indices of gradients that were clipped, and of which something is known that they may lose."""
        if not self.sampled:
            return frozenset()
        read = (reading.live for reading in self.readings if reading.before_clip)
        return frozenset().union(*(clip.indices for clip in self.clips), *read)

    def forget(self, indices: frozenset[int]) -> None:
        """Forget what was noted of gradients that are not what they were, and were not stepped."""
        for clip in self.clips:
            clip.indices -= indices
        for reading in self.readings:
            if reading.before_clip:
                reading.void |= indices

    def skip(self) -> None:
        """Forget what was measured: the Inf that the scaler looks for is no news of the gradients."""
        self.skipped = True
        self.sampled = False
        for measured in (self.readings, self.updates, self.empty):
            measured.clear()


@dataclass(slots=True)
class Ended:
    """The attempt is over."""

    end: wire.End | None


Message = Round | RegisteredParameters | Ended | wire.Event
