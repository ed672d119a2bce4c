"""Rule "exploding": gradients or weights grow out of proportion while the run does not learn."""

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np

from gradwatch_server.diagnosis.clip_advice import CLIP
from gradwatch_server.diagnosis.finding import Blamed, Symptom
from gradwatch_server.diagnosis.rule import (
    AboveOne,
    ChartLimit,
    Decades,
    Limits,
    Observation,
    Positive,
    Rule,
    Samples,
    Share,
)
from gradwatch_server.diagnosis.run_parameters import Floats
from gradwatch_server.diagnosis.sample import Profile, Sample, attenuation, extended, log10, median, rank_correlation

_LEARNING = 0.2
"""Share of the first loss by which it has to have come down for the run to count as learning."""
_UNLEARNED = 0.8
"""Share of the progress that has to be lost for the run to count as fallen back to where it began."""
_MARGIN = 0.5
"""Growth of the loss over its beginning, as a share, that noise does not explain."""
_ROSE = 2.0
"""Growth of the loss over its beginning, as a share, just before it overflows: an explosion, not a faulty operation."""
_BURST = 3  # losses in a row are no single outlier
_FEWEST = 3  # matrices: half of fewer says nothing
_OBVIOUS = 20.0
"""Times both limits, in geometric mean: sixty times further than the noisiest healthy run."""


class ExplodingLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gradients or weights that grow out of proportion while the run does not learn."""

    growth_decades: Decades = 2.0
    """A surge of 100 times while the loss is 1.5 times where it began (or, after progress, half as much again above).
    Batch noise and recovering spikes reach 1.75 in the zoo. A falling loss silences it: leaving a saddle multiplies
    gradients, too."""
    mild_growth_decades: Decades = 1.0
    """A surge of ten times, if it lasts for `mild_hold_samples`."""
    mild_hold_samples: Samples = 8
    """Samples in a row that a mild surge has to last; spikes do not."""
    growth_deviations: Positive = 5.0
    """A surge also has to exceed this many robust standard deviations of the run's own noise: batches of one vary by a
    decade."""
    growth_decades_alone: Decades = 2.5
    """A surge has to be this large where no loss is known."""
    leverage: Positive = 5.0
    """From the first sample on, half of the weight matrices exceed this leverage and the ratio below, and half of the
    loss is not gone: the initialisation is too large. A loss near zero raises the leverage alone."""
    ratio: Positive = 5.0
    """The ratio that goes with it. A summed loss raises the ratio alone."""
    amplification_decades: Decades = 1.0
    """The gradient grows tenfold from the last third of the layers to the first, at high leverage, nothing learned."""
    swelling_decades: Decades = 4.0
    """The gradient of biases and gains, which is what flows back, grows ten-thousandfold towards the input. Where the
    signal grows on its way forward, too, the gradients of the matrices, which are the product of both, look even, and a
    loss that falls from an absurd height looks like learning."""
    swelling_order: Share = 0.9
    """Least rank correlation of that growth with depth: it has to be steady."""
    weight_growth: AboveOne = 4.0
    """Half of at least three matrices grew fourfold within `weight_growth_steps`, and nothing is learned: the only sign
    under Adam, whose gradients do not say how large its steps are."""
    weight_growth_steps: Samples = 20
    """Steps within which that growth counts."""
    runaway_growth: AboveOne = 10.0
    """Half of the matrices grew tenfold since the first sample, however long it took."""
    loss_rise: Positive = 2.0
    """The loss of every step has been at three times its beginning (risen by 2.0 of it) for `loss_rise_steps`. Of the
    healthy runs only adversarial ones come near three times, and their losses pass through zero."""
    loss_rise_steps: Annotated[int, msgspec.Meta(ge=5, le=64)] = 20
    """Steps for which the loss has to stay there."""
    risen_growth: AboveOne = 5.0
    """With the risen loss, half of the matrices have grown fivefold since the first sample, and by 60% since the loss
    rose, beyond their pace until then."""
    loss_surge_decades: Decades = 3.0
    """Between two samples the loss was a thousand times its beginning for three steps in a row: an explosion that was
    over before the next sample. Healthy runs reach 28 times, once (lbfgs)."""
    clear_samples: Samples = 10


def _find(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for a sign of an explosion; any of them suffices. Norms are before any clipping."""
    if observation.sample.scalars.get("clip_norm", 0.0) == math.inf:
        return _overflow_before_clipping(observation)
    if observation.profile.matrices.size:
        for check in _CHECKS:
            found = check(observation, limits)
            if found is not None:
                return found
    return _not_recovered(observation, limits)


def _symptom(
    observation: Observation,
    *,
    summary: str,
    cause: str,
    blamed: Blamed,
    evidence: Mapping[str, float],
    hold_samples: int | None = None,
    by_loss_alone: bool = False,
) -> Symptom:
    """Return the symptom of an explosion; one that has ended in NaN or infinity fires at once."""
    history, sample, profile = observation.history, observation.sample, observation.profile
    overflowed = profile.overflowed or not math.isfinite(sample.scalars.get("loss", 0.0))
    usual = {
        "global_grad_norm": profile.global_gradient,
        "usual_grad_norm": 10**history.usual_log_gradient if history.log_gradients else math.nan,
        "first_loss": history.losses.reference,
        "loss": sample.scalars.get("loss", math.nan),
    }
    return Symptom(
        summary=summary,
        cause=cause,
        remedy=_remedy(sample),
        first_step=sample.step,
        blamed=blamed,
        evidence={**usual, **evidence},
        critical=overflowed or (history.losses.progress(profile.loss) < 0.5 and not by_loss_alone),
        hold_samples=1 if overflowed else hold_samples,
    )


def _is_learning(observation: Observation) -> bool:
    """Return whether the loss, now and lately, lies clearly below its beginning; False where no loss is known."""
    losses, loss = observation.history.losses, observation.profile.loss
    return min(losses.progress(loss), losses.progress()) > _LEARNING and losses.relapse() < _UNLEARNED


def _loss_burst(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for several losses in a row, between two samples, that lie many decades above the beginning."""
    losses, profile = observation.history.losses, observation.profile
    if not losses.first or min(losses.first) <= 0.0:
        return None
    highest = losses.reference * 10**limits.loss_surge_decades
    beyond = [loss > highest for _, loss in observation.sample.losses]
    if not any(all(beyond[first : first + _BURST]) for first in range(len(beyond) - _BURST + 1)):
        return None
    largest = max(loss for _, loss in observation.sample.losses)
    return _symptom(
        observation,
        summary=f"Between two samples the loss rose to {largest:.3g}, from {losses.reference:.3g} at the start",
        cause="The updates overshoot: the learning rate, or the inputs, are too large for this network.",
        blamed=observation.blame_larger_half(profile.ratio, limits.ratio),
        evidence={"largest_loss": largest},
        hold_samples=1,
        by_loss_alone=not observation.history.weights_follow(observation.sample.step, profile),
    )


def _gradient_surge(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for a gradient far above the usual ones of this run, with a loss above its beginning."""
    history, profile = observation.history, observation.profile
    needed = _needed_surge(observation, limits)
    if needed is None or not history.log_gradients or not profile.global_gradient > 0.0:
        return None
    if not history.weights_follow(observation.sample.step, profile):
        return None
    decades = math.log10(profile.global_gradient) - history.usual_log_gradient
    if decades < needed or decades < limits.growth_deviations * history.spread_log_gradient:
        return None
    loss = f", and the loss is {profile.loss:.3g}, from {history.losses.reference:.3g} at the start"
    return _symptom(
        observation,
        summary=f"The gradient is {10**decades:.3g} times what is usual in this run"
        + ("" if math.isnan(profile.loss) else loss),
        cause="The updates overshoot: the learning rate is too high for this network at this point, or a batch is far "
        "out of range.",
        blamed=observation.blame_larger_half(10.0 ** _surge(history.log_usual, profile), 10**needed),
        evidence={"growth_decades": decades},
        hold_samples=limits.mild_hold_samples if decades < limits.growth_decades else None,
    )


def _needed_surge(observation: Observation, limits: ExplodingLimits) -> float | None:
    """Return by how many decades the gradient has to surge to count; None while the loss is not above its beginning."""
    losses, loss = observation.history.losses, observation.profile.loss
    if math.isnan(loss):
        return limits.growth_decades_alone
    settled = observation.sample.settled_loss(loss)
    if losses.progress(settled) < -_MARGIN or losses.relapse(settled) > 1.0 + _MARGIN:
        return limits.mild_growth_decades
    return None


def _weight_growth(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for weights that grow many times over within a few samples while nothing is learned."""
    if len(observation.profile.matrices) < _FEWEST or _is_learning(observation):
        return None
    grown, least = observation.profile.typical_growth, math.log10(limits.weight_growth)
    oldest = observation.sample.step - limits.weight_growth_steps
    earlier = min((growth for step, growth in observation.history.growths if step >= oldest), default=grown)
    recent = max(grown - earlier, grown - math.log10(limits.runaway_growth / limits.weight_growth))
    if recent < least:
        return None
    return _symptom(
        observation,
        summary=f"Half of the weight matrices have grown {10**recent:.3g} times over in a few samples, "
        "and the loss has not come down",
        cause="Each update is about as large as the weights themselves: the learning rate is too high, or a weight "
        "decay has the wrong sign.",
        blamed=observation.blame_larger_half(observation.profile.growth_times, limits.weight_growth),
        evidence={"weight_growth": 10**recent},
    )


def _out_of_proportion(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for gradients that are large against the weights and in their effect on the loss, which is still high."""
    losses, profile = observation.history.losses, observation.profile
    leverage = profile.typical_leverage
    if len(profile.matrices) < _FEWEST or not leverage >= limits.leverage:
        return None
    if observation.history.proportionate or not losses.has_scale:
        return None
    if losses.progress(profile.loss) > 0.5 or losses.progress() > 0.5:
        return None
    ratio = profile.typical(profile.ratio)
    if ratio < limits.ratio:
        return None
    return _symptom(
        observation,
        summary=f"Half of the weight matrices have gradients over {ratio:.3g} times their weights, and nothing is "
        "learned yet",
        cause="Signals grow from layer to layer: the initial weights, or the inputs, are too large.",
        blamed=observation.blame_larger_half(profile.ratio, limits.ratio),
        evidence={"median_ratio": ratio, "median_leverage": leverage},
        hold_samples=1 if ratio / limits.ratio * leverage / limits.leverage > _OBVIOUS**2 else None,
    )


def _amplification(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for a gradient that grows from the last layers to the first while nothing is learned."""
    profile, members = observation.profile, observation.profile.matrices
    third = len(members) // 3
    if third < 2 or _is_learning(observation) or not profile.typical_leverage > limits.leverage:
        return None
    if not observation.history.losses.has_scale:
        return None
    decades = min(-attenuation(log10(measure[members])) for measure in (profile.rms, profile.ratio))
    if decades < limits.amplification_decades:
        return None
    limit = 10**limits.amplification_decades * median(profile.ratio[members[-third:]])
    return _symptom(
        observation,
        summary=f"The gradient grows by a factor of 10^{decades:.1f} from the last layers to the first",
        cause=f"Each layer amplifies the gradient about {10 ** (decades / max(1, len(members) - third)):.2g} times: "
        "the initial weights are too large.",
        blamed=observation.blame_larger_half(profile.ratio, limit),
        evidence={"amplification_decades": decades, "median_leverage": profile.typical_leverage},
    )


def _swelling(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for a gradient of biases and gains that grows steadily, by decades, from the output to the input."""
    profile = observation.profile
    members = profile.vectors if profile.all_alive else profile.vectors[profile.gradient[profile.vectors] > 0.0]
    if len(members) < 6:
        return None
    logs = log10(profile.rms[members])
    decades = -attenuation(logs)
    if decades < limits.swelling_decades or -rank_correlation(logs) < limits.swelling_order:
        return None
    return _symptom(
        observation,
        summary=f"What flows back grows by a factor of 10^{decades:.1f} from the last layers to the first",
        cause="Each layer makes both the signal and its gradient larger: residual streams without a norm or a scale, "
        "or initial weights that are too large.",
        blamed=observation.blame_larger_half(profile.ratio, limits.ratio),
        evidence={"swelling_decades": decades},
    )


def _loss_rise(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for a loss that has been far above its beginning at every step for long, with weights that have grown.

    Where samples lie apart, the explosion itself may be over before any of them.
    """
    history, profile = observation.history, observation.profile
    losses, grown = history.losses, profile.typical_growth
    risen = losses.risen(limits.loss_rise, limits.loss_rise_steps) and grown >= math.log10(limits.risen_growth)
    if not (risen and history.grew_with_the_loss(observation.sample.step, profile)):
        return None
    return _symptom(
        observation,
        summary=f"The loss has been more than {1 + limits.loss_rise:.3g} times where it began for "
        f"{limits.loss_rise_steps} steps, and the weights have grown {10**grown:.3g} times over",
        cause="The updates overshoot: the learning rate is too high for this network.",
        blamed=observation.blame_larger_half(profile.growth_times, limits.risen_growth),
        evidence={"weight_growth": 10**grown, "usual_loss": losses.now},
        hold_samples=1,
    )


_CHECKS = (_loss_burst, _gradient_surge, _weight_growth, _out_of_proportion, _amplification, _swelling, _loss_rise)
"""They need weight matrices. The first one that finds something decides."""


def _overflow_before_clipping(observation: Observation) -> Symptom:
    """Return the explosion that ``clip_grad_norm_`` hides: it saw an infinite norm, and scaled the gradient to zero."""
    matrices = observation.matrices_with_gradient
    return _symptom(
        observation,
        summary="The gradient's norm overflowed before clipping, which then scaled the gradient to zero",
        cause="Signals grow from layer to layer until they overflow: the initial weights, the inputs or the learning "
        "rate are far too large.",
        blamed=observation.blame(matrices, np.full(len(observation.parameters.names), math.inf), math.inf),
        evidence={"clip_norm": math.inf},
        hold_samples=1,
    )


def _not_recovered(observation: Observation, limits: ExplodingLimits) -> Symptom | None:
    """Look for a loss that has been as bad as at the beginning, or not finite, ever since a sign of an explosion."""
    history, profile = observation.history, observation.profile
    since = history.suspect_since if history.suspect_since is not None else _rise_before_overflow(observation)
    loss = observation.sample.scalars.get("loss")
    if since is None or not (profile.overflowed or (loss is not None and _is_lost(observation, loss))):
        return None
    values = np.nan_to_num(profile.ratio, nan=math.inf if profile.overflowed else 0.0)
    matrices = observation.matrices_with_gradient
    recovering = not profile.overflowed and history.losses.progress(loss) > -_MARGIN
    return _symptom(
        observation,
        summary=f"The run has not recovered from the explosion of step {since}",
        cause="The weights are far from where they learned: the learning rate was too high, or a batch out of range.",
        blamed=observation.blame(matrices[np.argsort(-values[matrices], kind="stable")], values, 1.0),
        evidence={"explosion_step": float(since)},
        hold_samples=(3 if recovering else 1) * limits.mild_hold_samples,
    )


def _is_lost(observation: Observation, loss: float) -> bool:
    """Return whether a loss is not finite, or as bad as at the beginning."""
    losses = observation.history.losses
    return not math.isfinite(loss) or losses.progress(loss) < -_MARGIN or losses.relapse(loss) > _UNLEARNED


def _rise_before_overflow(observation: Observation) -> int | None:
    """Return the step from which the loss rose far above its beginning before it overflowed; None if it did not.

    Where samples are sparse, an explosion is over before one of them shows it; the losses between them tell.
    """
    rose = None
    for step, loss in observation.sample.losses:
        if not math.isfinite(loss):
            return rose
        if rose is None and observation.history.losses.progress(loss) < -_ROSE:
            rose = step
    return None


def _surge(log_usual: Floats | None, profile: Profile) -> Floats:
    """Return by how many decades each gradient exceeds its own usual size; 0 where nothing is known."""
    usual = extended(log_usual, len(profile.gradient), np.nan)
    surge: Floats = np.nan_to_num(log10(profile.gradient) - usual, nan=0.0, posinf=40.0)
    return surge


def _remedy(sample: Sample) -> str:
    rate = sample.scalars.get("learning_rate")
    lower = f"Lower the learning rate from {rate:.3g} to {rate / 10:.3g}" if rate else "Lower the learning rate tenfold"
    return (
        f"{lower} or warm it up, initialise with kaiming_normal_ of torch.nn.init or add normalisation, and clip "
        f"adaptively: {CLIP}."
    )


RULE = Rule(
    name="exploding",
    subject=Observation,
    limits=ExplodingLimits,
    find=_find,
    colour="dark-red",
    inhibited_by=("nonfinite",),
    chart_limits=(ChartLimit("median_ratio", "ratio"), ChartLimit("amplification_decades", "ratio")),
    notes="""\
A loss that rises is no explosion by itself: another loss may join or take its place, batches or sequences may grow
under a sum, episodes may grow longer, a margin may be ramped up. So a surge of the gradient or of the loss counts
where the weights follow: in one step half of the matrices changed by 60% of themselves, or grew by as much within 20
steps, or since the loss rose, beyond the pace at which they had grown until then (growth is measured from half of an
orthonormal matrix's norm at least, so that weights that begin small may grow). A loss a thousandfold between two
samples is a warning without them. Signs of an initialisation that is too large count from the first sample on only,
and not where the loss passes through zero.

The rule fires at once where the numbers overflow after one of these signs (or where the losses between two samples
rose to three times the beginning before they overflowed), where `leverage` and `ratio` are both exceeded twentyfold,
and where `clip_grad_norm_` saw an infinite norm. After a sign it goes on holding while the loss is as bad as at the
beginning: a spike that recovers resolves by itself, a divergence does not. Norms are before clipping:
`clip_grad_norm_` hides nothing.
""",
)
