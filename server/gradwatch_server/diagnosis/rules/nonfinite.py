"""Rule "nonfinite": NaN or infinite gradients, weights or loss, whatever the history."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradwatch_server.diagnosis.finding import MOST_BLAMED, Blame, Finding, Symptom
from gradwatch_server.diagnosis.rule import Limits, Observation, Rule, Samples
from gradwatch_server.diagnosis.run_parameters import Flags, Floats, Indices
from gradwatch_server.diagnosis.sample import Sample

EVENT = "nonfinite_module"
"""Kind of the event by which an agent names the first module whose output or gradient was not finite.

``parameter`` is the module's qualified name (empty or none: the loss itself), ``message`` what it saw there.
"""


class NonfiniteLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NaN or infinite gradients, weights or loss."""

    hold_samples: Samples = 1


def _find(observation: Observation, _limits: NonfiniteLimits) -> Symptom | None:
    """Look for gradients, weights or a loss that are not finite.

    A gradient goes bad where the backward pass meets the fault, and stays bad from there towards the input: the bad
    parameter nearest to the output is where it began. Where everything is bad at once the pattern cannot tell: see
    ``refine``. Where the loss alone is bad, the last weight matrix is blamed, which made it.
    """
    history, sample, profile = observation.history, observation.sample, observation.profile
    bad_weight, loss = ~np.isfinite(profile.weight), _loss_of(sample)
    if not (profile.nonfinite.any() or bad_weight.any() or (loss is not None and not math.isfinite(loss))):
        return None
    bad, bad_weights, gradients = (int(flags.sum()) for flags in (profile.nonfinite, bad_weight, profile.present))
    exploded = {} if history.suspect_since is None else {"explosion_step": float(history.suspect_since)}
    blamed = observation.blame(_suspects(observation, bad_weight), _bad_values(observation), math.inf)
    return Symptom(
        summary=_summary(bad, gradients, bad_weights, loss),
        cause=_cause(
            everything=bad == gradients,
            loss=loss,
            where=blamed.parameters[0].name if blamed.parameters else "the loss",
            suspect_since=history.suspect_since,
        ),
        remedy="Look at the first bad step for log(0), sqrt(0), 0/0, overflow in half precision or NaN in the data, "
        "guard it (torch.clamp(x, min=1e-6)), and resume from a checkpoint before it.",
        first_step=_first_step(sample),
        blamed=blamed,
        evidence={
            "nonfinite_gradients": float(bad),
            "nonfinite_weights": float(bad_weights),
            "gradients": float(gradients),
            **({} if loss is None else {"loss": loss}),
            **exploded,
        },
        critical=bool(bad or bad_weights),
    )


def refine(finding: Finding, names: Sequence[str], module: str | None, message: str) -> Finding:
    """Return the finding with the module that the agent named: it is the cause, and its parameters are blamed first.

    A module without parameters stands for the nearest one around it that has some. The order does not change where the
    agent named the loss itself or the whole model.
    """
    sentence = _origin(module, message)
    if sentence in finding.cause:
        return finding
    inside = _parameters_of(module or "", names)
    existing = {blamed.name: blamed for blamed in finding.parameters}
    first = [existing.get(name, Blame(name, math.nan, math.inf)) for name in inside]
    rest = [blamed for blamed in finding.parameters if blamed.name not in inside]
    listed = [*first, *rest][:MOST_BLAMED]
    most = max(len(finding.parameters) + finding.left_out, len(first) + len(rest))
    return replace(
        finding,
        parameters=listed,
        left_out=most - len(listed),
        cause=f"{finding.cause} {sentence}" if "explosion_step" in finding.evidence else sentence,
    )


def _origin(module: str | None, message: str) -> str:
    where = f"module {module}" if module else "the loss"
    sentence = f"The first result that was not finite came out of {where}" + (f": {message}" if message else "")
    return sentence.rstrip(".") + "."


def _parameters_of(module: str, names: Sequence[str]) -> list[str]:
    """Return the parameters of a module, or of the nearest one around it that has some, from output to input."""
    while module:
        inside = [name for name in reversed(names) if name.startswith(module + ".")]
        if inside:
            return inside
        module = module.rpartition(".")[0]
    return []


def _suspects(observation: Observation, bad_weight: Flags) -> Indices:
    """Return bad gradients from output to input, then bad weights; the last weight matrix if only the loss is bad."""
    parameters, bad = observation.parameters, observation.profile.nonfinite
    listed = parameters.by_depth(bad | bad_weight)[::-1]
    if not listed.size:
        return parameters.by_depth(parameters.matrix & parameters.trainable)[-1:]
    return listed[np.argsort(~bad[listed], kind="stable")]


def _bad_values(observation: Observation) -> Floats:
    """Return the bad value of each parameter: its gradient, its number of bad elements, or its weight."""
    profile = observation.profile
    counts = observation.sample.vector("nonfinite_count", len(profile.gradient))
    return np.where(np.isfinite(profile.gradient), np.where(counts > 0, counts, profile.weight), profile.gradient)


def _first_step(sample: Sample) -> int:
    """Return the first step since the last sample whose loss was not finite; the sample's step if there is none."""
    return min((step for step, loss in sample.losses if not math.isfinite(loss)), default=sample.step)


def _loss_of(sample: Sample) -> float | None:
    """Return the loss of the sample's step; None where it is not known, which may be because it comes later."""
    return sample.scalars.get("loss", dict(sample.losses).get(sample.step))


def _summary(bad: int, gradients: int, bad_weights: int, loss: float | None) -> str:
    of_all = f"{bad} of {gradients} gradients" if gradients > 1 else "the only gradient"
    parts = [f"{of_all} {'is' if bad == 1 else 'are'} not finite"] if bad else []
    parts += [f"{bad_weights} {'weight is' if bad_weights == 1 else 'weights are'} not finite"] if bad_weights else []
    parts += ["the loss is not finite"] if loss is not None and not math.isfinite(loss) else []
    return ", ".join(parts)


def _cause(*, everything: bool, loss: float | None, where: str, suspect_since: int | None) -> str:
    if suspect_since is not None:
        return f"The numbers grew until they overflowed: an explosion that began at step {suspect_since}."
    if loss is not None and math.isinf(loss):
        return "The loss itself overflowed or is the logarithm of zero, so every gradient behind it is bad."
    if loss is not None and not math.isfinite(loss):
        return "The forward pass produced NaN somewhere before the loss, so every gradient is bad at once."
    if everything and loss is None:
        return "Every gradient is bad, the loss is not known: the fault lies in the forward pass or the loss."
    if everything:
        return "Every gradient is bad, the loss is not: the fault lies in the loss's slope or in the last layers."
    return f"The backward pass went bad at or just after {where}; gradients nearer to the output are finite."


RULE = Rule(
    name="nonfinite",
    subject=Observation,
    limits=NonfiniteLimits,
    find=_find,
    colour="semi-dark-red",
    notes="""\
NaN or infinity in a gradient or a weight is critical; in the loss alone it is a warning. `first_step` is the first step
with a bad loss, which is known of every step. A bad gradient goes on towards the input, so the bad parameter nearest to
the output is blamed, and stays blamed when everything is bad one step later. Where everything is bad at once, the event
`nonfinite_module` of the agent decides, whether it comes before the alert fires, with it or after it: the parameters of
the module that it names come first. Without the event the last layer is blamed.
""",
)
