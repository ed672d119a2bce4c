"""NaN and Inf: at once, whatever the history."""

import math

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.memory import Memory
from gradwatch_server.diagnosis.reading import Flags, Indices, Layout, Profile, Reading
from gradwatch_server.diagnosis.thresholds import Nonfinite

EVENT = "nonfinite_module"
"""Kind of the event by which an agent names the first module whose output or gradient was not finite.

``parameter`` is the module's qualified name (empty: the loss itself), ``message`` says what it computed and from what.
"""


def find(layout: Layout, memory: Memory, reading: Reading, profile: Profile, limits: Nonfinite) -> Finding | None:
    """Look for gradients, weights or a loss that are not finite.

    A gradient goes bad where the backward pass meets the fault and stays bad from there towards the input: of the bad
    parameters the one nearest to the output is where it began. Where everything is bad at once the pattern cannot
    tell, and the module that the agent named, if it did, comes first.
    """
    size = len(layout.names)
    bad = profile.present & (~np.isfinite(profile.gradient) | (reading.vector("nonfinite_count", size) > 0))
    bad_weight = ~np.isfinite(profile.weight)
    loss = reading.scalars.get("loss", 0.0)
    if not limits.enabled or not (bad.any() or bad_weight.any() or not math.isfinite(loss)):
        return None
    named = _named(reading)
    gradients = int(profile.present.sum())
    everything = int(bad.sum()) == gradients
    first = np.array(memory.origin, np.intp) if memory.origin else _origin_first(layout, bad | bad_weight, bad)
    chosen = _named_first(layout, first, named)
    counts = reading.vector("nonfinite_count", size)
    values = np.where(np.isfinite(profile.gradient), np.where(counts > 0, counts, profile.weight), profile.gradient)
    parameters, left_out = blame(layout.names, chosen, values, math.inf)
    where = named or (parameters[0].name if parameters else "the loss")
    return Finding(
        rule="nonfinite",
        severity=limits.severity(critical=bool(bad.any() or bad_weight.any())),
        first_step=memory.began("nonfinite", _first_step(reading)),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "nonfinite_gradients": float(bad.sum()),
            "nonfinite_weights": float(bad_weight.sum()),
            "gradients": float(gradients),
            "loss": loss,
        },
        summary=_summary(int(bad.sum()), gradients, int(bad_weight.sum()), loss),
        cause=_cause(everything=everything, loss=loss, where=where, named=named, suspect_since=memory.suspect_since),
        remedy="Look at the first bad step for log(0), sqrt(0), 0/0, overflow in half precision or NaN in the data, "
        "guard it (torch.clamp(x, min=1e-6)), and resume from a checkpoint before it.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )


def _first_step(reading: Reading) -> int:
    """Return the first step whose loss was not finite, or the sample's."""
    return min((step for step, loss in reading.losses if not math.isfinite(loss)), default=reading.step)


def _named(reading: Reading) -> str | None:
    """Return the module that the agent named as the first one."""
    for event in reading.events:
        if event.kind == EVENT:
            return event.parameter or "the loss"
    return None


def _origin_first(layout: Layout, chosen: Flags, bad: Flags) -> Indices:
    """Return the chosen ones: bad gradients from output to input, then bad weights."""
    order = layout.order[::-1]
    listed = order[chosen[order]]
    return listed[np.argsort(~bad[listed], kind="stable")]


def _named_first(layout: Layout, listed: Indices, named: str | None) -> Indices:
    """Move the parameters of the module that the agent named to the front."""
    if named is None:
        return listed
    elsewhere = np.array([not (layout.names[index] + ".").startswith(named + ".") for index in listed], np.bool_)
    return listed[np.argsort(elsewhere, kind="stable")]


def _summary(bad: int, gradients: int, bad_weights: int, loss: float) -> str:
    of_all = f"{bad} of {gradients} gradients" if gradients > 1 else "the only gradient"
    parts = [f"{of_all} {'is' if bad == 1 else 'are'} not finite"] if bad else []
    parts += [f"{bad_weights} {'weight is' if bad_weights == 1 else 'weights are'} not finite"] if bad_weights else []
    parts += ["the loss is not finite"] if not math.isfinite(loss) else []
    return ", ".join(parts)


def _cause(*, everything: bool, loss: float, where: str, named: str | None, suspect_since: int | None) -> str:
    if suspect_since is not None:
        return f"The numbers grew until they overflowed: an explosion that began at step {suspect_since}."
    if named is not None:
        return f"The first result that was not finite came out of {where}."
    if math.isinf(loss):
        return "The loss itself overflowed or is the logarithm of zero, so every gradient behind it is bad."
    if not math.isfinite(loss):
        return "The forward pass produced NaN somewhere before the loss, so every gradient is bad at once."
    if everything:
        return "Every gradient is bad, the loss is not: the fault lies in the loss's slope or in the last layers."
    return f"The backward pass went bad at or just after {where}; gradients nearer to the output are finite."
