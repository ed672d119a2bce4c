"""NaN and Inf: at once, whatever the history."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradwatch_server.diagnosis.finding import MOST_BLAMED, Blame, Finding, blame
from gradwatch_server.diagnosis.history import History
from gradwatch_server.diagnosis.sample import Flags, Indices, Profile, RunParameters, Sample
from gradwatch_server.diagnosis.thresholds import Nonfinite

RULE = "nonfinite"
EVENT = "nonfinite_module"
"""Kind of the event by which an agent names the first module whose output or gradient was not finite.

``parameter`` is the module's qualified name (empty or none: the loss itself), ``message`` what it saw there.
"""


def find(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Nonfinite
) -> Finding | None:
    """Look for gradients, weights or a loss that are not finite.

    A gradient goes bad where the backward pass meets the fault and stays bad from there towards the input: of the bad
    parameters the one nearest to the output is where it began. Where everything is bad at once the pattern cannot
    tell: see ``refine``. Where the loss alone is bad, what made it is blamed: the last weight matrix.
    """
    size = len(layout.names)
    counts = reading.vector("nonfinite_count", size)
    bad = profile.present & (~profile.finite | (counts > 0))
    bad_weight = ~np.isfinite(profile.weight)
    loss = reading.scalars.get("loss", 0.0)
    if not limits.enabled or not (bad.any() or bad_weight.any() or not math.isfinite(loss)):
        return None
    gradients = int(profile.present.sum())
    chosen = _origin_first(layout, bad | bad_weight, bad)
    if not chosen.size:
        chosen = layout.order[(layout.matrix & layout.trainable)[layout.order]][-1:]
    values = np.where(np.isfinite(profile.gradient), np.where(counts > 0, counts, profile.weight), profile.gradient)
    parameters, left_out = blame(layout.names, chosen, values, math.inf)
    exploded = {} if memory.suspect_since is None else {"explosion_step": float(memory.suspect_since)}
    return Finding(
        rule=RULE,
        severity=limits.severity(critical=bool(bad.any() or bad_weight.any())),
        first_step=memory.began(RULE, _first_step(reading)),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "nonfinite_gradients": float(bad.sum()),
            "nonfinite_weights": float(bad_weight.sum()),
            "gradients": float(gradients),
            "loss": loss,
            **exploded,
        },
        summary=_summary(int(bad.sum()), gradients, int(bad_weight.sum()), loss),
        cause=_cause(
            everything=int(bad.sum()) == gradients,
            loss=loss,
            where=parameters[0].name if parameters else "the loss",
            suspect_since=memory.suspect_since,
        ),
        remedy="Look at the first bad step for log(0), sqrt(0), 0/0, overflow in half precision or NaN in the data, "
        "guard it (torch.clamp(x, min=1e-6)), and resume from a checkpoint before it.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )


def refine(finding: Finding, names: Sequence[str], module: str | None, message: str) -> Finding:
    """Return the finding with the module that the agent named: its parameters are blamed first, it is the cause.

    A module without parameters stands for the nearest one around it that has some; the loss itself, and a model as a
    whole, move nobody.
    """
    where = f"module {module}" if module else "the loss"
    sentence = f"The first result that was not finite came out of {where}" + (f": {message}" if message else "")
    sentence = sentence.rstrip(".") + "."
    if sentence in finding.cause:
        return finding
    around, inside = module or "", list[str]()
    while around and not inside:
        inside = [name for name in reversed(names) if name.startswith(around + ".")]
        around = around.rpartition(".")[0]
    known = {blamed.name: blamed for blamed in finding.parameters}
    first = [known.get(name, Blame(name, math.nan, math.inf)) for name in inside]
    rest = [blamed for blamed in finding.parameters if blamed.name not in inside]
    listed = [*first, *rest][:MOST_BLAMED]
    most = max(len(finding.parameters) + finding.left_out, len(first) + len(rest))
    return replace(
        finding,
        parameters=listed,
        left_out=most - len(listed),
        cause=f"{finding.cause} {sentence}" if "explosion_step" in finding.evidence else sentence,
    )


def _first_step(reading: Sample) -> int:
    """Return the first step whose loss was not finite, or the sample's."""
    return min((step for step, loss in reading.losses if not math.isfinite(loss)), default=reading.step)


def _origin_first(layout: RunParameters, chosen: Flags, bad: Flags) -> Indices:
    """Return the chosen ones: bad gradients from output to input, then bad weights."""
    order = layout.order[::-1]
    listed = order[chosen[order]]
    return listed[np.argsort(~bad[listed], kind="stable")]


def _summary(bad: int, gradients: int, bad_weights: int, loss: float) -> str:
    of_all = f"{bad} of {gradients} gradients" if gradients > 1 else "the only gradient"
    parts = [f"{of_all} {'is' if bad == 1 else 'are'} not finite"] if bad else []
    parts += [f"{bad_weights} {'weight is' if bad_weights == 1 else 'weights are'} not finite"] if bad_weights else []
    parts += ["the loss is not finite"] if not math.isfinite(loss) else []
    return ", ".join(parts)


def _cause(*, everything: bool, loss: float, where: str, suspect_since: int | None) -> str:
    if suspect_since is not None:
        return f"The numbers grew until they overflowed: an explosion that began at step {suspect_since}."
    if math.isinf(loss):
        return "The loss itself overflowed or is the logarithm of zero, so every gradient behind it is bad."
    if not math.isfinite(loss):
        return "The forward pass produced NaN somewhere before the loss, so every gradient is bad at once."
    if everything:
        return "Every gradient is bad, the loss is not: the fault lies in the loss's slope or in the last layers."
    return f"The backward pass went bad at or just after {where}; gradients nearer to the output are finite."
