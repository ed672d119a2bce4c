"""What the training thread hands over after each step: numbers still on the device, nothing computed yet."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gradwatch import wire
from gradwatch.buffers import Claim, Slot
from gradwatch.model import Watched
from gradwatch.provenance import Seen
from gradwatch.scalars import Scalar


@dataclass(slots=True)
class Clip:
    """One call of ``clip_grad_norm_``."""

    total_norm: Tensor
    max_norm: Scalar
    indices: frozenset[int]
    """Of the parameters whose gradients it scaled, and that still are what it made of them."""
    partial: bool = False
    """Whether the norm is this rank's part of it, of sharded gradients."""
    norm_type: float = 2.0
    finite: bool = True
    """Whether the norm is, as far as can be seen without waiting."""


@dataclass(slots=True)
class Reading:
    """Unit norms of the parameters that one optimizer steps."""

    claim: Claim
    before_clip: bool
    earlier: Sequence[Clip] = ()
    """Where it was read before a clipping: those by norm that came before that one."""
    scale: Tensor | None = None
    """What the gradients are multiplied by, with a fused optimizer under a loss scaler."""
    found_inf: Tensor | None = None
    nonfinite: dict[int, float] = field(default_factory=dict)
    """Elements of gradients that are NaN or infinite, by index, where they were counted."""
    limits: NDArray[np.float64] | None = None
    """Largest ratio that AGC lets through, for each parameter of the plan; None where it did not clip."""


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
    slot: Slot | None = None
    stepped: dict[weakref.ref[Optimizer], frozenset[int]] = field(default_factory=dict)
    """The optimizers that have stepped, with the indices of their parameters. An id may be another's by now."""
    readings: list[Reading] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    """Their sum is the loss whose gradient was applied."""
    clips: list[Clip] = field(default_factory=list)
    value_clipped: bool = False
    logged: dict[str, Scalar] = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)
    rates: list[Scalar] = field(default_factory=list)
    """Learning rates, one for each parameter group."""
    updates: list[Update] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    """Indices of parameters without elements that have a gradient."""
    spared: frozenset[int] = frozenset()
    """Indices of parameters that AGC leaves alone, or would: the classifier's."""
    seen: Sequence[Seen] = ()
    """What hooks saw that look for the first bad number."""
    finite: bool = True
    """Whether its losses and clip norms are, as far as can be seen without waiting."""
    skipped: bool = False
    """Whether the loss scaler skipped the step of an optimizer: there is no sample then."""
    agent_seconds: float = 0.0

    def skip(self) -> None:
        """Forget what was measured: the Inf that the scaler looks for is no news of the gradients."""
        self.skipped = True
        self.sampled = False
        for measured in (self.readings, self.updates, self.empty):
            measured.clear()


@dataclass(slots=True)
class Registered:
    """The parameters of the run, from now on."""

    watched: Sequence[Watched]
    depths: Sequence[int]


@dataclass(slots=True)
class Ended:
    """The attempt is over."""

    end: wire.End | None


Message = Round | Registered | Ended | wire.Event
