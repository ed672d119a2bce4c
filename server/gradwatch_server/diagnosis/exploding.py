"""Gradients or weights that grow out of proportion."""

import math
from dataclasses import dataclass

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.memory import Memory
from gradwatch_server.diagnosis.reading import Floats, Layout, Profile, Reading
from gradwatch_server.diagnosis.thresholds import Exploding

_NEGLIGIBLE_WEIGHT = 1e-2
"""A weight matrix whose first norm is below this was initialised at or near zero: its growth says nothing."""


@dataclass(frozen=True)
class _Signs:
    """The four signs of an explosion; any of them suffices."""

    typical_ratio: float
    growth_decades: float
    global_ratio: float
    loss_growth: float
    weight_growth: float

    def reason(self, limits: Exploding) -> str | None:
        if self.typical_ratio > limits.ratio:
            return f"half of the weight matrices have gradients over {self.typical_ratio:.3g} times their weights"
        grown = self.growth_decades > limits.growth_decades and self.global_ratio > limits.growth_ratio
        if grown:
            return f"the gradient is 10^{self.growth_decades:.1f} times what is usual in this run"
        if self.loss_growth > limits.loss_growth and self.growth_decades > limits.growth_decades / 2:
            return f"the loss is {self.loss_growth:.3g} times what it was at the start, and the gradient grows with it"
        not_learning = self.loss_growth > 0.9
        if self.weight_growth > (limits.weight_growth if not_learning else limits.runaway_growth):
            return f"half of the weight matrices are over {self.weight_growth:.3g} times as large as at the start"
        return None


def find(layout: Layout, memory: Memory, reading: Reading, profile: Profile, limits: Exploding) -> Finding | None:
    """Look for gradients or weights that grow out of proportion; norms are before any clipping."""
    if not limits.enabled or not profile.matrices.size:
        return None
    growth = _weight_growth(layout, memory, profile)
    signs = _signs(memory, reading, profile, growth)
    reason = signs.reason(limits)
    if reason is None:
        return None
    worst = profile.matrices[np.argsort(-profile.ratio[profile.matrices], kind="stable")]
    parameters, left_out = blame(layout.names, worst[: max(1, len(worst) // 2)], profile.ratio, limits.ratio)
    return Finding(
        rule="exploding",
        severity="critical",
        first_step=memory.began("exploding", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "median_ratio": signs.typical_ratio,
            "growth_decades": signs.growth_decades,
            "global_ratio": signs.global_ratio,
            "loss_growth": signs.loss_growth,
            "weight_growth": signs.weight_growth,
        },
        summary=reason[0].upper() + reason[1:],
        cause=_cause(memory),
        remedy="Lower the learning rate tenfold or warm it up, and clip adaptively: "
        "gradwatch.attach(..., clip=gradwatch.AGC(0.01)).",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )


def _signs(memory: Memory, reading: Reading, profile: Profile, weight_growth: Floats) -> _Signs:
    norm = profile.global_gradient
    usual = memory.usual_log_gradient
    grown = math.log10(norm) - usual if norm > 0 and not math.isnan(usual) else 0.0
    loss, first = reading.scalars.get("loss", math.nan), memory.first_loss
    loss_growth = loss / first if math.isfinite(loss) and first > 0 else 0.0
    grown_weights = weight_growth[~np.isnan(weight_growth)]
    return _Signs(
        typical_ratio=float(np.median(profile.ratio[profile.matrices])),
        growth_decades=grown,
        global_ratio=norm / (profile.global_weight + 1e-12),
        loss_growth=loss_growth,
        weight_growth=float(np.median(grown_weights)) if grown_weights.size else 1.0,
    )


def _weight_growth(layout: Layout, memory: Memory, profile: Profile) -> Floats:
    """Return the growth of each weight matrix since the first sample; NaN where it began near zero."""
    first = np.full(len(layout.names), np.nan)
    if memory.first_weights is not None:
        first[: len(memory.first_weights)] = memory.first_weights
    usable = np.zeros(len(layout.names), np.bool_)
    usable[profile.matrices] = True
    usable &= np.nan_to_num(first) > _NEGLIGIBLE_WEIGHT
    growth = np.full(len(layout.names), np.nan)
    growth[usable] = profile.weight[usable] / first[usable]
    return growth


def _cause(memory: Memory) -> str:
    if memory.samples <= 3:
        return "The gradients are out of proportion from the first steps: the initialisation or the learning rate."
    return "The updates overshoot: the learning rate is too high for this network at this point, or a batch is off."
