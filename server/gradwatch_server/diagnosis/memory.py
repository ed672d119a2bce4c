"""What is remembered of a run's earlier samples: bounded, and the same whether it was kept or replayed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradwatch_server.diagnosis.finding import Finding
from gradwatch_server.diagnosis.reading import Floats, Profile, Reading

HISTORY_SAMPLES = 64
FIRST_SAMPLES = 5


@dataclass(frozen=True, eq=False)
class Memory:
    """A run's own history.

    ``log_gradients`` holds log10 of the global gradient norm of up to 64 samples at which nothing exploded, so that an
    explosion does not become its own yardstick.
    """

    samples: int = 0
    log_gradients: tuple[float, ...] = ()
    first_losses: tuple[float, ...] = ()
    lowest_loss: float = math.inf
    loss: float = math.nan
    first_weights: Floats | None = None
    """Weight norms at the first sample, shape (parameters,)."""
    zero_samples: NDArray[np.int64] | None = None
    """For each parameter, samples in a row at which its gradient was exactly zero, shape (parameters,)."""
    since: tuple[tuple[str, int], ...] = ()
    """The step at which each rule that holds began to hold."""

    def began(self, rule: str, step: int) -> int:
        """Return the step at which a rule began to hold that holds at ``step``."""
        return dict(self.since).get(rule, step)

    @property
    def first_loss(self) -> float:
        """Median of the first losses; NaN where none is known."""
        return float(np.median(self.first_losses)) if self.first_losses else math.nan

    @property
    def usual_log_gradient(self) -> float:
        """Median of log10 of the global gradient norm; NaN without history."""
        return float(np.median(self.log_gradients)) if self.log_gradients else math.nan

    def zeros(self, profile: Profile) -> NDArray[np.int64]:
        """Return how many samples in a row, this one included, each gradient was exactly zero."""
        before = np.zeros(len(profile.gradient), np.int64)
        if self.zero_samples is not None:
            before[: len(self.zero_samples)] = self.zero_samples
        zero = profile.present & (profile.gradient == 0.0)
        return np.where(zero, before + 1, np.where(profile.present, 0, before))

    def after(self, reading: Reading, profile: Profile, findings: Sequence[Finding]) -> "Memory":
        """Return the memory with one more sample in it."""
        loss = reading.scalars.get("loss", math.nan)
        first_losses = self.first_losses
        if math.isfinite(loss) and len(first_losses) < FIRST_SAMPLES:
            first_losses = (*first_losses, loss)
        rules = {finding.rule for finding in findings}
        history = self.log_gradients
        norm = profile.global_gradient
        if norm > 0.0 and math.isfinite(norm) and not rules & {"exploding", "nonfinite"}:
            history = (*history, math.log10(norm))[-HISTORY_SAMPLES:]
        return replace(
            self,
            samples=self.samples + 1,
            log_gradients=history,
            first_losses=first_losses,
            lowest_loss=min(self.lowest_loss, loss) if math.isfinite(loss) else self.lowest_loss,
            loss=loss,
            first_weights=profile.weight if self.first_weights is None else self.first_weights,
            zero_samples=self.zeros(profile),
            since=tuple((finding.rule, self.began(finding.rule, reading.step)) for finding in findings),
        )
