"""Gradients or weights that grow out of proportion while the run does not learn."""

import math
from dataclasses import dataclass, replace

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.history import History
from gradwatch_server.diagnosis.sample import (
    TINY,
    Floats,
    Indices,
    Profile,
    RunParameters,
    Sample,
    median,
    rank_correlation,
)
from gradwatch_server.diagnosis.thresholds import Exploding

RULE = "exploding"
_CLIP = "gradwatch.attach(..., clip=0.01)"
_LEARNING = 0.2
"""Share of the first loss by which it has to have come down for the run to count as learning."""
_UNLEARNED = 0.8
"""Share of the progress that has to be lost for the run to count as fallen back to where it began."""
_MARGIN = 0.5
"""Growth of the loss over its beginning, as a share, that noise does not explain."""
_ROSE = 2.0
"""Growth of the loss over its beginning, as a share, just before it overflows: an explosion, not a faulty operation."""
_BURST = 3
"""Losses in a row that are no single outlier."""
_FEWEST = 3
"""Of fewer matrices, half says nothing."""
_GRAVE = 20.0
"""Times both limits, in geometric mean: sixty times further than the noisiest healthy run."""


@dataclass(frozen=True)
class Sign:
    """What is out of proportion at one sample."""

    summary: str
    cause: str
    worst: Indices
    """Parameters to blame, worst first."""
    values: Floats
    """What they are blamed for, shape (parameters,)."""
    limit: float
    evidence: dict[str, float]
    grave: bool = False
    """So large that it needs no second sample."""
    mild: bool = False
    """So small that it has to last."""
    fading: bool = False
    """Perhaps on its way back: it has to last for long."""


def sign(layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """Look for a sign of an explosion; any of them suffices. Norms are before any clipping."""
    if reading.scalars.get("clip_norm", 0.0) == math.inf:
        return _clipped_away(layout, profile)
    if profile.matrices.size:
        for look in (_burst, _surging, _blowing_up, _out_of_proportion, _amplifying, _swelling, _diverged):
            found = look(memory, reading, profile, limits)
            if found is not None:
                return found
    return _not_recovered(layout, memory, reading, profile)


def find(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Exploding, found: Sign | None
) -> Finding | None:
    """Say what ``sign`` found; an explosion that has ended in NaN or Inf fires at once."""
    if not limits.enabled or found is None:
        return None
    overflowed = profile.overflowed or not math.isfinite(reading.scalars.get("loss", 0.0))
    parameters, left_out = blame(layout.names, found.worst, found.values, found.limit)
    return Finding(
        rule=RULE,
        severity=limits.severity(critical=overflowed or memory.losses.progress(profile.loss) < 0.5),
        first_step=memory.began(RULE, reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "global_grad_norm": profile.global_gradient,
            "usual_grad_norm": 10**memory.usual_log_gradient if memory.log_gradients else math.nan,
            "first_loss": memory.losses.reference,
            "loss": reading.scalars.get("loss", math.nan),
            **found.evidence,
        },
        summary=found.summary,
        cause=found.cause,
        remedy=_remedy(reading),
        hold_samples=_hold(found, limits, overflowed=overflowed),
        clear_samples=limits.clear_samples,
    )


def _hold(found: Sign, limits: Exploding, *, overflowed: bool) -> int:
    if overflowed or found.grave:
        return 1
    if found.fading:
        return 3 * limits.mild_hold_samples
    return limits.mild_hold_samples if found.mild else limits.hold_samples


def _learning(memory: History, profile: Profile) -> bool:
    """Return whether the loss, now and lately, lies clearly below where it began; False where none is known."""
    losses = memory.losses
    return min(losses.progress(profile.loss), losses.progress()) > _LEARNING and losses.relapse() < _UNLEARNED


def _surging(memory: History, reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """The gradient is far above what is usual in this run, and the loss above where it began."""
    if not memory.log_gradients or not profile.global_gradient > 0.0:
        return None
    losses, loss = memory.losses, reading.settled_loss(profile.loss)
    if math.isnan(profile.loss):
        needed = limits.growth_decades_alone
    elif losses.progress(loss) < -_MARGIN or losses.relapse(loss) > 1.0 + _MARGIN:
        needed = limits.mild_growth_decades
    else:
        return None
    decades = math.log10(profile.global_gradient) - memory.usual_log_gradient
    if decades < needed or decades < limits.growth_deviations * memory.spread_log_gradient:
        return None
    surge = _surge(memory, profile)
    return Sign(
        summary=f"The gradient is {10**decades:.3g} times what is usual in this run"
        + (
            ""
            if math.isnan(profile.loss)
            else f", and the loss is {profile.loss:.3g}, from {losses.reference:.3g} at the start"
        ),
        cause="The updates overshoot: the learning rate is too high for this network at this point, or a batch is far "
        "out of range.",
        worst=_largest(surge, profile),
        values=10.0**surge,
        limit=10**needed,
        evidence={"growth_decades": decades},
        mild=decades < limits.growth_decades,
    )


def _blowing_up(memory: History, reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """The weights grow many times over within a few samples, and nothing is learned."""
    if _learning(memory, profile):
        return None
    grown = profile.typical_growth
    earlier = [value for step, value in memory.growths if reading.step - step <= limits.weight_growth_steps]
    recent = max(grown - min(earlier, default=grown), grown - math.log10(limits.runaway_growth / limits.weight_growth))
    if recent < math.log10(limits.weight_growth):
        return None
    values = np.ones(len(profile.weight))
    values[profile.matrices] = 10.0**profile.growth
    return Sign(
        summary=f"Half of the weight matrices have grown {10**recent:.3g} times over in a few samples, "
        "and the loss has not come down",
        cause="Each update is about as large as the weights themselves: the learning rate is too high, or a weight "
        "decay has the wrong sign.",
        worst=_largest(values, profile),
        values=values,
        limit=limits.weight_growth,
        evidence={"weight_growth": 10**recent},
    )


def _out_of_proportion(memory: History, _reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """Before anything is learned, gradients are large both against the weights and in what they do to the loss.

    The ratio alone is large where the loss is a sum; the leverage alone where the loss is nearly zero.
    """
    leverage = profile.typical_leverage
    if (
        len(profile.matrices) < _FEWEST
        or math.isnan(leverage)
        or leverage < limits.leverage
        or memory.losses.progress(profile.loss) > 0.5
        or memory.losses.progress() > 0.5
    ):
        return None
    ratio = profile.typical(profile.ratio)
    if ratio < limits.ratio:
        return None
    return Sign(
        summary=f"Half of the weight matrices have gradients over {ratio:.3g} times their weights, and nothing is "
        "learned yet",
        cause="Signals grow from layer to layer: the initial weights, or the inputs, are too large.",
        worst=_largest(profile.ratio, profile),
        values=profile.ratio,
        limit=limits.ratio,
        evidence={"median_ratio": ratio, "median_leverage": leverage},
        grave=ratio / limits.ratio * leverage / limits.leverage > _GRAVE**2,
    )


def _amplifying(memory: History, _reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """The gradient grows from the last layers to the first, and nothing is learned."""
    members = profile.matrices
    third = len(members) // 3
    if third < 2 or _learning(memory, profile) or not profile.typical_leverage > limits.leverage:
        return None
    decades = math.inf
    for measure in (profile.rms, profile.ratio):
        logs = np.log10(np.maximum(measure[members], TINY))
        decades = min(decades, median(logs[:third]) - median(logs[-third:]))
    if decades < limits.amplification_decades:
        return None
    return Sign(
        summary=f"The gradient grows by a factor of 10^{decades:.1f} from the last layers to the first",
        cause=f"Each layer amplifies the gradient about {10 ** (decades / max(1, len(members) - third)):.2g} times: "
        "the initial weights are too large.",
        worst=_largest(profile.ratio, profile),
        values=profile.ratio,
        limit=10**limits.amplification_decades * median(profile.ratio[members[-third:]]),
        evidence={"amplification_decades": decades, "median_leverage": profile.typical_leverage},
    )


def _swelling(_memory: History, _reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """The gradient of biases and gains grows steadily, by decades, from the output to the input.

    It is what flows back, free of the size of the signals that flow forward: where both grow from layer to layer, the
    gradients of the weight matrices, which are their product, look even. A loss that falls from an absurd height says
    nothing here.
    """
    members = profile.vectors if profile.all_alive else profile.vectors[profile.gradient[profile.vectors] > 0.0]
    third = len(members) // 3
    if third < 2:
        return None
    logs = np.log10(profile.rms[members])
    decades = median(logs[:third]) - median(logs[-third:])
    if decades < limits.swelling_decades or -rank_correlation(logs) < limits.swelling_order:
        return None
    return Sign(
        summary=f"What flows back grows by a factor of 10^{decades:.1f} from the last layers to the first",
        cause="Each layer makes both the signal and its gradient larger: residual streams without a norm or a scale, "
        "or initial weights that are too large.",
        worst=_largest(profile.ratio, profile),
        values=profile.ratio,
        limit=limits.ratio,
        evidence={"swelling_decades": decades},
    )


def _diverged(memory: History, _reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """The loss of every step has been far above its beginning for long, and the weights have grown.

    Where samples lie apart the explosion itself may be over before any of them.
    """
    if not memory.losses.risen(limits.loss_rise, limits.loss_rise_steps):
        return None
    grown = profile.typical_growth
    if grown < math.log10(limits.risen_growth):
        return None
    values = np.ones(len(profile.weight))
    values[profile.matrices] = 10.0**profile.growth
    return Sign(
        summary=f"The loss has been more than {1 + limits.loss_rise:.3g} times where it began for "
        f"{limits.loss_rise_steps} steps, and the weights have grown {10**grown:.3g} times over",
        cause="The updates overshoot: the learning rate is too high for this network.",
        worst=_largest(values, profile),
        values=values,
        limit=limits.risen_growth,
        evidence={"weight_growth": 10**grown, "usual_loss": memory.losses.now},
        grave=True,
    )


def _burst(memory: History, reading: Sample, profile: Profile, limits: Exploding) -> Sign | None:
    """Between two samples the loss was, for several steps in a row, many decades above its beginning."""
    if not memory.losses.first or min(memory.losses.first) <= 0.0:
        return None
    highest = memory.losses.reference * 10**limits.loss_surge_decades
    beyond = [loss > highest for _, loss in reading.losses]
    if not any(all(beyond[first : first + _BURST]) for first in range(len(beyond) - _BURST + 1)):
        return None
    largest = max(loss for _, loss in reading.losses)
    return Sign(
        summary=f"Between two samples the loss rose to {largest:.3g}, from {memory.losses.reference:.3g} at the start",
        cause="The updates overshoot: the learning rate, or the inputs, are too large for this network.",
        worst=_largest(profile.ratio, profile),
        values=profile.ratio,
        limit=limits.ratio,
        evidence={"largest_loss": largest},
        grave=True,
    )


def _clipped_away(layout: RunParameters, profile: Profile) -> Sign:
    """The norm that clipping saw is infinite: what it left behind is nothing."""
    matrices = layout.order[(layout.matrix & layout.trainable & profile.present)[layout.order]]
    return Sign(
        summary="The gradient's norm overflowed before clipping, which then scaled the gradient to zero",
        cause="Signals grow from layer to layer until they overflow: the initial weights, the inputs or the learning "
        "rate are far too large.",
        worst=matrices,
        values=np.full(len(layout.names), math.inf),
        limit=math.inf,
        evidence={"clip_norm": math.inf},
        grave=True,
    )


def _not_recovered(layout: RunParameters, memory: History, reading: Sample, profile: Profile) -> Sign | None:
    """There was a sign, and the loss has been as bad as at the beginning, or not finite, ever since."""
    overflowed = profile.overflowed
    since = memory.suspect_since if memory.suspect_since is not None else _rose_before(memory, reading)
    if since is None:
        return None
    loss = reading.scalars.get("loss")
    lost = overflowed
    if loss is not None:
        losses = memory.losses
        lost |= not math.isfinite(loss) or losses.progress(loss) < -_MARGIN or losses.relapse(loss) > _UNLEARNED
    if not lost:
        return None
    values = np.nan_to_num(profile.ratio, nan=math.inf if overflowed else 0.0)
    matrices = layout.order[(layout.matrix & layout.trainable & profile.present)[layout.order]]
    return Sign(
        summary=f"The run has not recovered from the explosion of step {since}",
        cause="The weights are far from where they learned: the learning rate was too high, or a batch out of range.",
        worst=matrices[np.argsort(-values[matrices], kind="stable")],
        values=values,
        limit=1.0,
        evidence={"explosion_step": float(since)},
        mild=True,
        fading=not overflowed and memory.losses.progress(loss) > -_MARGIN,
    )


def _rose_before(memory: History, reading: Sample) -> int | None:
    """Return the step from which the loss rose far above its beginning before it was no longer finite, if it did.

    Where samples are sparse, an explosion is over before one of them sees it; the losses between them tell.
    """
    finite = True
    rose = None
    for step, loss in reading.losses:
        finite &= math.isfinite(loss)
        if finite and rose is None and memory.losses.progress(loss) < -_ROSE:
            rose = step
    return None if finite else rose


def _surge(memory: History, profile: Profile) -> Floats:
    """Return by how many decades each gradient exceeds its own usual size; 0 where nothing is known."""
    if memory.log_usual is None:
        return np.zeros(len(profile.gradient))
    usual = np.full(len(profile.gradient), np.nan)
    usual[: len(memory.log_usual)] = memory.log_usual
    surge: Floats = np.nan_to_num(np.log10(np.maximum(profile.gradient, TINY)) - usual, nan=0.0, posinf=40.0)
    return surge


def _largest(values: Floats, profile: Profile) -> Indices:
    """Return the weight matrices with the larger half of the values, largest first."""
    order = profile.matrices[np.argsort(-np.nan_to_num(values[profile.matrices]), kind="stable")]
    return order[: max(1, (len(order) + 1) // 2)]


def _remedy(reading: Sample) -> str:
    rate = reading.scalars.get("learning_rate")
    lower = f"Lower the learning rate from {rate:.3g} to {rate / 10:.3g}" if rate else "Lower the learning rate tenfold"
    return (
        f"{lower} or warm it up, initialise with torch.nn.init.kaiming_normal_ or add normalisation, and clip "
        f"adaptively: {_CLIP}."
    )


def name_threshold(finding: Finding, threshold: float) -> Finding:
    """Return the finding with the threshold for adaptive clipping that this run's own ratios recommend."""
    advised = f"gradwatch.attach(..., clip={threshold:g}), which leaves this run's usual steps alone"
    return replace(finding, remedy=finding.remedy.replace(_CLIP, advised))
