"""NaN and Inf: at once, whatever the history."""

import math

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.memory import Memory
from gradwatch_server.diagnosis.reading import Layout, Profile, Reading
from gradwatch_server.diagnosis.thresholds import Nonfinite


def find(layout: Layout, memory: Memory, reading: Reading, profile: Profile, limits: Nonfinite) -> Finding | None:
    """Look for gradients, weights or a loss that are not finite.

    A gradient goes bad where the backward pass meets the fault and stays bad from there towards the input: of the bad
    parameters the one nearest to the output is where it began.
    """
    counts = reading.vector("nonfinite_count", len(layout.names))
    bad = profile.present & (~np.isfinite(profile.gradient) | (counts > 0))
    bad_weight = ~np.isfinite(profile.weight)
    loss = reading.scalars.get("loss", 0.0)
    if not limits.enabled or not (bad.any() or bad_weight.any() or not math.isfinite(loss)):
        return None
    fresh = bad | bad_weight
    nearest_output_first = np.argsort(-layout.depth, kind="stable")
    chosen = nearest_output_first[fresh[nearest_output_first]]
    values = np.where(np.isfinite(profile.gradient), np.where(counts > 0, counts, profile.weight), profile.gradient)
    parameters, left_out = blame(layout.names, chosen, values, math.inf)
    gradients = int(profile.present.sum())
    everything = bool(bad.sum() == gradients)
    return Finding(
        rule="nonfinite",
        severity="critical",
        first_step=memory.began("nonfinite", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "nonfinite_gradients": float(bad.sum()),
            "nonfinite_weights": float(bad_weight.sum()),
            "gradients": float(gradients),
            "loss": loss,
        },
        summary=_summary(int(bad.sum()), gradients, int(bad_weight.sum()), loss),
        cause=_cause(everything=everything, loss=loss, where=parameters[0].name if parameters else "the loss"),
        remedy="Look at the first bad step for log(0), sqrt(0), 0/0, overflow in half precision or NaN in the data, "
        "guard that operation with an eps or a clamp, and resume from a checkpoint before it.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )


def _summary(bad: int, gradients: int, bad_weights: int, loss: float) -> str:
    parts = [f"{bad} of {gradients} gradients are not finite"] if bad else []
    parts += [f"{bad_weights} weights are not finite"] if bad_weights else []
    parts += ["the loss is not finite"] if not math.isfinite(loss) else []
    return ", ".join(parts)


def _cause(*, everything: bool, loss: float, where: str) -> str:
    if not math.isfinite(loss):
        return "The forward pass produced a loss that is not finite, so every gradient behind it is bad."
    if everything:
        return "Every gradient is bad: the fault lies in the loss or in the last layers."
    return f"The backward pass went bad at or just before {where}; gradients nearer to the output are finite."
