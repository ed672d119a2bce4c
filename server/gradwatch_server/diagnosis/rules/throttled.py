"""Rule "throttled": adaptive clipping that sets the length of every step, or that never does anything."""

import numpy as np

from gradwatch_server.diagnosis.finding import Symptom
from gradwatch_server.diagnosis.history import CLIPPED_SHARE
from gradwatch_server.diagnosis.rule import ChartLimit, Limits, Observation, Rule, Samples, Severity

_LEARNING = 0.2
"""Share of the first loss by which it has to have come down for the run to learn in spite of being clipped."""


class ThrottledLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Clipping that decides every step, or that never does anything."""

    clipped_samples: Samples = 100
    """Samples in a row at which half of the weight matrices have 95% of their units clipped (of those with a gradient),
    while a fifth of the loss is not gone yet."""
    learning_clipped_samples: Samples = 500
    """The same whatever the loss does: the threshold sets the length of every step."""
    unclipped_samples: Samples = 1_000
    """Samples in a row at which adaptive clipping was on and clipped nothing of any parameter."""
    highest_severity: Severity = "warning"
    hold_samples: Samples = 1


def _find(observation: Observation, limits: ThrottledLimits) -> Symptom | None:
    """Look for clipping that has clipped nearly everything for long, or nothing for very long.

    Both counts end at the sample before this one, whose own clipping does not decide.
    """
    history, profile = observation.history, observation.profile
    learning = history.losses.progress() > _LEARNING
    if history.clipped_samples >= (limits.learning_clipped_samples if learning else limits.clipped_samples):
        loss = "the loss has come down in spite of it" if learning else "the loss has not come down"
        clipped, samples = True, history.clipped_samples
        summary = f"Clipping has scaled down nearly every unit for {samples} samples, and {loss}"
        cause = "The threshold, not the gradient, sets the length of every step."
        remedy = "Double the threshold, for instance 0.02 instead of 0.01 (the paper's grid ends at 0.16)."
    elif history.unclipped_samples >= limits.unclipped_samples:
        clipped, samples = False, history.unclipped_samples
        summary = f"Clipping has been on for {samples} samples and has not clipped anything"
        cause = "The threshold lies above every gradient of this run."
        remedy = "Halve the threshold, or turn clipping off: it costs time and does nothing."
    else:
        return None
    share = np.maximum(observation.sample.clipped_share(len(profile.gradient)), 0.0)
    worst = profile.matrices[np.argsort(-share[profile.matrices], kind="stable")]
    return Symptom(
        summary=summary,
        cause=cause,
        remedy=remedy,
        first_step=observation.sample.step,
        blamed=observation.blame(worst, share, CLIPPED_SHARE if clipped else 0.0),
        evidence={"samples": float(samples), "clipped_unit_share": profile.typical(share)},
        critical=clipped,
    )


RULE = Rule(
    name="throttled",
    subject=Observation,
    limits=ThrottledLimits,
    find=_find,
    colour="yellow",
    chart_limits=(ChartLimit("clipped_unit_share", "clipped_unit_share"),),
)
