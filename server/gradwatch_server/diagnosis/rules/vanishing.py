"""Rule "vanishing": gradients fade on their way from the output to the input, or everywhere, and nothing is learned."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from gradwatch_server.diagnosis.finding import Symptom
from gradwatch_server.diagnosis.rule import ChartLimit, Decades, Limits, Observation, Positive, Rule, Samples, Share
from gradwatch_server.diagnosis.run_parameters import Floats, Indices
from gradwatch_server.diagnosis.sample import Profile, attenuation, log10, median, rank_correlation

_LEARNED = 0.9
"""Share of the first loss that has to be gone for a run to be converged whose gradients were tiny all along."""
_LEARNING = 0.5
"""Share of the first loss by which it has to have come down for the run to learn although the gradient fades."""
_UNLEARNED = 0.8
"""Share of the progress that has to be lost for the run to count as fallen back to where it began."""
_STUCK = 0.1
"""A run whose loss has come down by no more than this share does not learn."""
_FEWEST_LAYERS = 3
_BATCHES_DIFFER = 1e-2
"""Share of the limits of leverage and ratio: below it, weights do nothing although the loss varies between batches."""
_ABRUPT_SHARE = 0.6
"""Share of the attenuation between two neighbours from which it is not that of the chain rule."""
_PATIENCE = 5
"""An abrupt attenuation has to last this many times as long: what starts at zero does not stay there."""


class VanishingLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gradients that fade from the output to the input, or everywhere, while the run does not learn."""

    layers: Annotated[int, msgspec.Meta(ge=3)] = 5
    """Fewer layers, but at least three, count only while nothing is learned, and it has to last five times as long."""
    attenuation_decades: Decades = 4.0
    """The first third of the layers receives a ten-thousandth of the gradient of the last third. Networks that learn in
    spite of decay reach 2.8."""
    stuck_decades: Decades = 3.0
    """Less suffices where nothing is learned and the decay is as steady as `stuck_order`; it has to last twice as
    long."""
    stuck_order: Share = 0.9
    """Least rank correlation of gradient and depth that goes with `stuck_decades`."""
    critical_decades: Decades = 6.0
    """From here on it is critical even where the loss falls; below, a run that has halved its loss gets a warning."""
    order: Share = 0.7
    """Least rank correlation of gradient and depth: decay is steady; tiny branches (LayerScale, ReZero) are not."""
    leverage: Positive = 1e-4
    """No weight matrix exceeds this leverage and the ratio below: nothing that the optimizer could do to the weights
    moves the loss. History tells a converged run apart: its gradients were larger once, and its loss has stayed
    down."""
    ratio: Positive = 1e-4
    """The ratio that goes with it."""
    collapse_decades: Decades = 3.0
    """The leverage of half of the matrices lies this far below the largest, and below their own best (post-norm
    transformers)."""
    hold_samples: Samples = 4
    clear_samples: Samples = 10


@dataclass(frozen=True)
class _Decay:
    """The attenuation of the gradient over parameters in depth order."""

    decades: float
    """From the last third to the first, in ratio and in RMS; 0 where it is not steady."""
    slope: float
    """Decades a layer."""
    starved: Indices
    abrupt: bool = False
    """Most of it lies between two layers, as behind a head or a gain that starts at zero."""
    mild: bool = False
    """Less than what alarms by itself."""


def _find(observation: Observation, limits: VanishingLimits) -> Symptom | None:
    """Look for gradients that fade with depth, and for gradients that are negligible everywhere."""
    profile, stuck = observation.profile, _is_stuck(observation)
    decay = max(
        (
            _find_decay(profile, _without_dead(observation, members), limits, parts, stuck=stuck)
            for members, parts in _chains(observation)
        ),
        key=lambda found: found.decades,
    )
    if decay.decades > 0.0 and not (decay.abrupt and _is_learning(observation)):
        return _faded(observation, limits, decay)
    return _starved(observation, limits) or _collapsed(observation, limits)


def _chains(observation: Observation) -> list[tuple[Indices, Indices]]:
    """Return parameters that may lie behind each other, from input to output, each with the numbers of its parts.

    They are the weight matrices, the biases and gains, and the matrices of each part of the model by itself: two chains
    side by side, as layers and their gates, are ordered within each only.
    """
    profile, parts = observation.profile, observation.parameters.parts
    chains = [(members, parts[members]) for members in (profile.matrices, profile.vectors)]
    numbers = np.unique(parts[profile.matrices])
    if len(numbers) > 1:
        alone = [profile.matrices[parts[profile.matrices] == number] for number in numbers if number >= 0]
        chains += [(members, parts[members]) for members in alone]
    return chains


def _is_stuck(observation: Observation) -> bool:
    """Return whether the loss has hardly come down, or has risen back to its beginning."""
    losses = observation.history.losses
    return not losses.progress() > _STUCK or losses.relapse() > _UNLEARNED


def _is_learning(observation: Observation) -> bool:
    """Return whether the loss has halved and stayed down."""
    losses = observation.history.losses
    return losses.progress() > _LEARNING and losses.relapse() < _UNLEARNED


def _without_dead(observation: Observation, members: Indices) -> Indices:
    """Leave out gradients of exactly zero that did not fade to zero but end at once: something is dead, or cut off.

    A zero gradient has faded if the first one that is left is small already, or if squashing functions are in their
    flat ends: then the layer behind still has an input, and the run does not learn.
    """
    profile, parameters = observation.profile, observation.parameters
    if profile.all_alive:
        return members
    zero = profile.gradient[members] == 0.0
    if not zero.any() or zero.all():
        return members
    living = members[~zero]
    if profile.underflows(living):
        return members
    silent = (profile.gradient == 0.0) & parameters.matrix
    fed_by_zero = np.isin(parameters.modules[silent], parameters.modules[profile.alive]).any()
    at_the_input = bool(zero[: int(zero.sum())].all()) and 2 * zero.sum() >= len(members)
    return members if _is_stuck(observation) and not fed_by_zero and at_the_input else living


def _fades_within(logs: Floats, parts: Indices, decades: float) -> bool:
    """Return whether a part of the model shows half of an attenuation by itself.

    Networks with a loss each, such as actor and critic, do not lie behind each other: between them, it says nothing.
    """
    numbers = np.unique(parts)
    return len(numbers) < 2 or any(
        attenuation(logs[parts == number]) >= decades / 2 for number in numbers if np.count_nonzero(parts == number) > 1
    )


def _find_decay(profile: Profile, members: Indices, limits: VanishingLimits, parts: Indices, *, stuck: bool) -> _Decay:
    """Measure how the gradient fades over these parameters.

    Ratio and RMS must both fade: weights that start at zero mislead the ratio alone, layers of other widths the RMS.
    """
    none = _Decay(0.0, 0.0, members[:0])
    few = len(members) < limits.layers
    if len(members) < _FEWEST_LAYERS or (few and not stuck):
        return none
    # 1. Most samples end here.
    logs, least = log10(profile.rms[members]), min(limits.attenuation_decades, limits.stuck_decades)
    decades = attenuation(logs)
    if not decades > 0.0 or decades < least:
        return none
    ratios = log10(profile.ratio[members])
    decades = min(decades, attenuation(ratios))
    if not decades > 0.0 or decades < least:
        return none
    # 2. It has to be steady; where the run is stuck, less suffices if it is steadier.
    order = min(rank_correlation(logs), rank_correlation(ratios))
    mild = stuck and decades >= limits.stuck_decades and order >= limits.stuck_order
    if (few or not mild) and (decades < limits.attenuation_decades or order < limits.order):
        return none
    if len(parts) == len(members) and not _fades_within(logs, parts, decades):
        return none
    # 3. Describe it.
    steps = np.diff(np.convolve(logs, np.full(3, 1 / 3), "valid") if len(logs) > 9 else logs)
    last = median(logs[-max(1, len(logs) // 3) :])
    return _Decay(
        decades,
        profile.decades_per_layer(members),
        starved=members[logs < last - min(decades, limits.attenuation_decades)],
        abrupt=few or bool(steps.max() > _ABRUPT_SHARE * decades),
        mild=decades < limits.attenuation_decades,
    )


def _faded(observation: Observation, limits: VanishingLimits, decay: _Decay) -> Symptom:
    profile = observation.profile
    worst = decay.starved[np.argsort(profile.rms[decay.starved], kind="stable")]
    output = float(np.nanmax(profile.rms[profile.matrices])) if profile.matrices.size else 0.0
    return Symptom(
        summary=f"The gradient fades by a factor of 10^{decay.decades:.1f} from the last layers to the first",
        cause=f"Each layer passes on only about {10**-decay.slope:.2g} of the gradient that it receives: saturating "
        "activations, or weights that are initialised too small.",
        remedy="Use ReLU or GELU with He initialisation (kaiming_normal_ of torch.nn.init), or add residual "
        "connections or normalisation between the layers.",
        first_step=observation.sample.step,
        blamed=observation.blame(worst, profile.rms, output * 10**-limits.attenuation_decades),
        evidence={
            "attenuation_decades": decay.decades,
            "decades_per_layer": decay.slope,
            "starved_parameters": float(len(worst)),
        },
        critical=decay.decades >= limits.critical_decades or not _is_learning(observation),
        hold_samples=limits.hold_samples * (_PATIENCE if decay.abrupt else 2 if decay.mild else 1),
    )


def _starved(observation: Observation, limits: VanishingLimits) -> Symptom | None:
    """Look for gradients that move no weight matrix: saturated or underflowing, not converged.

    A run is converged where the loss has come down, or where gradients were large once and the loss has stayed down
    since.
    """
    profile, losses = observation.profile, observation.history.losses
    leverage, members = profile.leverages, profile.matrices
    if not members.size or not (leverage.max() < limits.leverage and profile.ratio[members].max() < limits.ratio):
        return None
    if not losses.has_scale:
        return None
    progress = losses.progress(profile.loss)
    # At a minimum of the mean the gradients of single batches differ from zero, unless every batch is fitted.
    collapsed = profile.loss > 0.0 and losses.varies and leverage.max() < _BATCHES_DIFFER * limits.leverage
    always = observation.history.best_leverage < limits.leverage and not progress > _LEARNED
    kept = losses.relapse(profile.loss) < _UNLEARNED and progress > -_LEARNING
    if not always and kept and not collapsed:
        return None
    worst = members[np.argsort(leverage, kind="stable")]
    return Symptom(
        summary="No weight matrix has a gradient that could move the loss, which is far from low",
        cause="The outputs are saturated, signals fade on their way forward, or gradients underflow in half precision: "
        "nothing reaches the weights.",
        remedy="Use a loss that matches the output (cross-entropy on logits instead of squared error on a sigmoid), "
        "initialise with kaiming_normal_ of torch.nn.init, and in half precision scale the loss "
        "(torch.amp.GradScaler).",
        first_step=observation.sample.step,
        blamed=observation.blame(worst, profile.leverage, limits.leverage),
        evidence={"largest_leverage": float(leverage.max()), "loss": profile.loss, "first_loss": losses.reference},
        critical=True,
        hold_samples=_PATIENCE * limits.hold_samples if kept and not always else None,
    )


def _collapsed(observation: Observation, limits: VanishingLimits) -> Symptom | None:
    """Look for layers that have lost the gradient that they had, while others still have theirs.

    Whether the gradient fades steadily does not matter here: in post-norm transformers most layers lose it at once.
    Branches that start at a tiny gain never had more; where the loss is nearly gone, all layers lose theirs together.
    """
    profile, best = observation.profile, observation.history.best_typical_leverage
    living = profile.leverages > 0.0
    if np.count_nonzero(living) < limits.layers:
        return None
    typical, largest = median(profile.leverages[living]), float(profile.leverages.max())
    gap = 10**-limits.collapse_decades
    if not (typical < limits.leverage and typical < gap * largest and typical < gap * best):
        return None
    starved = profile.matrices[living & (profile.leverages <= typical)]
    worst = starved[np.argsort(profile.leverage[starved], kind="stable")]
    return Symptom(
        summary=f"Half of the layers have less than {typical / best:.1g} of the gradient that they once had, others "
        "still have theirs",
        cause="Most layers have stopped passing gradients on: saturated, or their signal is drowned by the norms "
        "behind them. The first steps were too large.",
        remedy="Warm the learning rate up from 0 over the first few hundred steps, lower it tenfold, or put the norms "
        "before the branches (torch.nn.TransformerEncoderLayer(norm_first=True)).",
        first_step=observation.sample.step,
        blamed=observation.blame(worst, profile.leverage, limits.leverage),
        evidence={"median_leverage": typical, "largest_leverage": largest, "best_median_leverage": best},
        critical=not observation.history.losses.progress() > _LEARNING,
    )


RULE = Rule(
    name="vanishing",
    subject=Observation,
    limits=VanishingLimits,
    find=_find,
    colour="blue",
    inhibited_by=("nonfinite",),
    chart_limits=(ChartLimit("attenuation_decades", "grad_norm", of_rms=True),),
    notes="""\
Networks side by side (actor and critic, generator and judge) are no chain: at least half of an attenuation has to lie
within one part of the model, as the names tell parts. Chains side by side, such as layers and their gates, are also
looked at each by itself. A loss that passes through zero, or is zero by construction, does not show starvation.

Where the losses of batches differ and yet no matrix has a hundredth of the gradient that could move them, the run has
collapsed, to chance for instance, and has not converged; it has to last five times as long.

An attenuation most of which lies between two neighbours (a head or gain that starts at zero) has to last five times as
long, and is silent once the run learns. Gradients that end at exactly zero at once are dead, not vanishing, unless
squashing functions explain them.
""",
)
