"""Rule "slow": every weight moves by next to nothing for long, and the loss does not fall."""

import math

import numpy as np

from gradwatch_server.diagnosis.finding import Symptom
from gradwatch_server.diagnosis.rule import Limits, Observation, Rule, Samples, Severity, Share
from gradwatch_server.diagnosis.slow_steps import SLOW

_USUAL = 1e-3
"""Change of a weight in one step, as a share of its norm, that trainings usually make; good ones differ by a decade."""


class SlowLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights that hardly move while the loss does not fall."""

    slow_steps: Samples = 50
    """Steps for which no weight matrix has moved by more than a millionth of itself in a step."""
    progress: Share = 0.05
    """Share of the first loss by which the loss has come down meanwhile, from which the run learns all the same."""
    done: Share = 0.5
    """Share of the first loss from which a run that has come down so far may slow down, as schedules end."""
    highest_severity: Severity = "warning"
    hold_samples: Samples = 1


def _find(observation: Observation, limits: SlowLimits) -> Symptom | None:
    stretch, losses = observation.slow_steps, observation.history.losses
    if stretch is None:
        return None
    steps = observation.sample.step - stretch.since
    fallen = (stretch.loss - losses.now) / losses.scale if losses.first else math.nan
    if steps < limits.slow_steps or not (fallen < limits.progress and losses.progress() < limits.done):
        return None
    profile = observation.profile
    share = np.where((profile.update > 0.0) & (profile.weight > 0.0), profile.update / profile.weight, 0.0)
    factor = 10 ** round(math.log10(_USUAL / stretch.fastest))
    rate = "" if math.isnan(stretch.rate) else f" of {stretch.rate:.3g}"
    return Symptom(
        summary=f"No weight matrix has moved by more than {stretch.fastest:.1g} of itself in a step for {steps} steps, "
        "and the loss does not fall",
        cause=f"The learning rate{rate} is too small for this network by a factor of about {factor:,}, or gradients "
        "are scaled down before the step: trainings usually change a weight by a thousandth of itself.",
        remedy="Raise the rate; look for a schedule that divides it at each step, and for a loss or gradients that are "
        "divided more than once.",
        first_step=stretch.since,
        blamed=observation.blame(profile.matrices, share, SLOW),
        evidence={"slow_steps": float(steps), "largest_update_share": stretch.fastest},
        critical=False,
    )


RULE = Rule(
    name="slow",
    subject=Observation,
    limits=SlowLimits,
    find=_find,
    colour="light-green",
    inhibited_by=("exploding", "nonfinite", "unmoved"),
    notes="""\
What counts is the change of each weight matrix that the agent measures after a step, whatever the optimizer made of the
gradient. A learning rate that rises begins the count anew: a warm-up may start at next to nothing. Where nothing moves
at all, `unmoved` tells it. Where no loss is known, the rule says nothing.
""",
)
