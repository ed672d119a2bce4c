"""Gradients that fade on their way from the output to the input, or everywhere, while the run does not learn."""

import math
from dataclasses import dataclass

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.history import History
from gradwatch_server.diagnosis.sample import TINY, Indices, Profile, RunParameters, Sample, median, rank_correlation
from gradwatch_server.diagnosis.thresholds import Vanishing

_LEARNED = 0.9
"""Share of the first loss that has to be gone for a run to be converged whose gradients were tiny all along."""
_LEARNING = 0.5
"""Share of the first loss by which a run has come down that learns in spite of fading."""
_UNLEARNED = 0.8
_STUCK = 0.1
"""Share of the first loss by which a run has come down at most that does not learn."""
_ABRUPT_SHARE = 0.6
"""Share of the fading that lies between two neighbours, from which it is not the chain rule's."""
_PATIENCE = 5
"""An abrupt fading has to last this many times as long: what starts at zero does not stay there."""
FADED_DECADES = 2.5
"""A gradient that has faded this far before it reaches zero has underflowed."""


@dataclass(frozen=True)
class Fading:
    """How the gradient fades over a set of parameters in depth order."""

    decades: float
    """From the last third to the first, in ratio and in RMS; 0 where it is not steady."""
    slope: float
    """Decades a layer."""
    starved: Indices
    abrupt: bool = False
    """Most of it happens between two layers, as behind a head or a gain that starts at zero."""
    mild: bool = False
    """Less than what alarms by itself."""


def find(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Vanishing
) -> Finding | None:
    """Look for gradients that fade with depth, and for gradients that are negligible everywhere."""
    if not limits.enabled:
        return None
    stuck = not memory.losses.progress() > _STUCK or memory.losses.relapse() > _UNLEARNED
    fading = max(
        (
            fade(profile, _not_dead(layout, memory, profile, members), limits, stuck=stuck)
            for members in (profile.matrices, profile.vectors)
        ),
        key=lambda found: found.decades,
    )
    learning = memory.losses.progress() > _LEARNING and memory.losses.relapse() < _UNLEARNED
    if fading.decades > 0.0 and not (fading.abrupt and learning):
        return _fading(layout, memory, reading, profile, limits, fading)
    return _starved(layout, memory, reading, profile, limits) or _collapsed(layout, memory, reading, profile, limits)


def _not_dead(layout: RunParameters, memory: History, profile: Profile, members: Indices) -> Indices:
    """Leave out gradients of exactly zero that did not fade to zero but end at once: something is dead, or cut off.

    They have faded where the first that is left is small already, or where squashing functions are in their flat ends:
    then the layer behind still has an input, and the run does not learn.
    """
    if profile.all_alive:
        return members
    zero = profile.gradient[members] == 0.0
    if not zero.any() or zero.all():
        return members
    living = members[~zero]
    logs = np.log10(profile.rms[living])
    third = max(1, len(living) // 3)
    if len(living) >= 3 and median(logs[-third:]) - logs[0] > FADED_DECADES:
        return members
    stuck = not memory.losses.progress() > _STUCK or memory.losses.relapse() > _UNLEARNED
    silent = (profile.gradient == 0.0) & layout.matrix
    fed_by_zero = np.isin(layout.owners[silent], layout.owners[profile.alive]).any()
    at_the_input = bool(zero[: int(zero.sum())].all()) and 2 * zero.sum() >= len(members)
    return members if stuck and not fed_by_zero and at_the_input else living


def fade(profile: Profile, members: Indices, limits: Vanishing, *, stuck: bool = False) -> Fading:
    """Measure how the gradient fades over these parameters.

    Ratio and RMS must both fade: the first alone is misled by weights that start at zero, the second by layers of
    other widths.
    """
    none = Fading(0.0, 0.0, members[:0])
    if len(members) < limits.layers:
        return none
    third = max(1, len(members) // 3)
    decades, measures = math.inf, []
    for measure in (profile.rms, profile.ratio):
        logs = np.log10(np.maximum(measure[members], TINY))
        decades = min(decades, median(logs[-third:]) - median(logs[:third]))
        if not decades > 0.0 or decades < min(limits.attenuation_decades, limits.stuck_decades):
            return none
        measures.append(logs)
    order = min(map(rank_correlation, measures))
    mild = stuck and decades >= limits.stuck_decades and order >= limits.stuck_order
    if not mild and (decades < limits.attenuation_decades or order < limits.order):
        return none
    logs = measures[0]
    slope = float(np.polyfit(np.arange(len(members)), logs, 1)[0])
    steps = np.diff(np.convolve(logs, np.full(3, 1 / 3), "valid") if len(logs) > 9 else logs)
    abrupt = bool(steps.max() > _ABRUPT_SHARE * decades)
    starved = members[logs < median(logs[-third:]) - min(decades, limits.attenuation_decades)]
    return Fading(decades, slope, starved, abrupt, mild=decades < limits.attenuation_decades)


def _fading(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Vanishing, fading: Fading
) -> Finding:
    worst = fading.starved[np.argsort(profile.rms[fading.starved], kind="stable")]
    output = float(np.nanmax(profile.rms[profile.matrices])) if profile.matrices.size else 0.0
    parameters, left_out = blame(layout.names, worst, profile.rms, output * 10**-limits.attenuation_decades)
    learning = memory.losses.progress() > _LEARNING and memory.losses.relapse() < _UNLEARNED
    return Finding(
        rule="vanishing",
        severity=limits.severity(critical=fading.decades >= limits.critical_decades or not learning),
        first_step=memory.began("vanishing", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "attenuation_decades": fading.decades,
            "decades_per_layer": fading.slope,
            "starved_parameters": float(len(worst)),
        },
        summary=f"The gradient fades by a factor of 10^{fading.decades:.1f} from the last layers to the first",
        cause=f"Each layer passes on only about {10**-fading.slope:.2g} of the gradient that it receives: saturating "
        "activations, or weights that are initialised too small.",
        remedy="Use ReLU or GELU with He initialisation (torch.nn.init.kaiming_normal_), or add residual connections "
        "or normalisation between the layers.",
        hold_samples=limits.hold_samples * (_PATIENCE if fading.abrupt else 2 if fading.mild else 1),
        clear_samples=limits.clear_samples,
    )


def _starved(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Vanishing
) -> Finding | None:
    """Look for gradients that move no weight matrix: saturated or underflowing, not converged.

    Converged is where the loss has come down, or where gradients were large once and the loss has stayed down since.
    """
    leverage = profile.leverages
    if not leverage.size or not (
        leverage.max() < limits.leverage and profile.ratio[profile.matrices].max() < limits.ratio
    ):
        return None
    losses = memory.losses
    always = memory.best_leverage < limits.leverage and not losses.progress(profile.loss) > _LEARNED
    if not always and losses.relapse(profile.loss) < _UNLEARNED and losses.progress(profile.loss) > -_LEARNING:
        return None
    worst = profile.matrices[np.argsort(leverage, kind="stable")]
    parameters, left_out = blame(layout.names, worst, profile.leverage, limits.leverage)
    return Finding(
        rule="vanishing",
        severity=limits.severity(critical=True),
        first_step=memory.began("vanishing", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={"largest_leverage": float(leverage.max()), "loss": profile.loss, "first_loss": losses.reference},
        summary="No weight matrix has a gradient that could move the loss, which is far from low",
        cause="The outputs are saturated, signals fade on their way forward, or gradients underflow in half precision: "
        "nothing reaches the weights.",
        remedy="Use a loss that matches the output (cross-entropy on logits instead of squared error on a sigmoid), "
        "initialise with torch.nn.init.kaiming_normal_, and in half precision scale the loss (torch.amp.GradScaler).",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )


def _collapsed(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Vanishing
) -> Finding | None:
    """Look for layers that have lost the gradient that they had, while others still have theirs.

    Whether the gradient fades steadily does not matter here: in post-norm transformers most layers lose it at once.
    Branches that start at a tiny gain never had more; where the loss is nearly gone, all layers lose theirs together.
    """
    members = profile.matrices
    leverage = profile.leverages
    living = leverage > 0.0
    if np.count_nonzero(living) < limits.layers:
        return None
    typical, largest = median(leverage[living]), float(leverage.max())
    gap = 10**-limits.collapse_decades
    if not (typical < limits.leverage and typical < gap * largest and typical < gap * memory.best_typical_leverage):
        return None
    starved = members[living & (leverage <= typical)]
    worst = starved[np.argsort(profile.leverage[starved], kind="stable")]
    parameters, left_out = blame(layout.names, worst, profile.leverage, limits.leverage)
    return Finding(
        rule="vanishing",
        severity=limits.severity(critical=not memory.losses.progress() > _LEARNING),
        first_step=memory.began("vanishing", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "median_leverage": typical,
            "largest_leverage": largest,
            "best_median_leverage": memory.best_typical_leverage,
        },
        summary=f"Half of the layers have less than {typical / memory.best_typical_leverage:.1g} of the gradient that "
        "they once had, others still have theirs",
        cause="Most layers have stopped passing gradients on: saturated, or their signal is drowned by the norms "
        "behind them. The first steps were too large.",
        remedy="Warm the learning rate up from 0 over the first few hundred steps, lower it tenfold, or put the norms "
        "before the branches (torch.nn.TransformerEncoderLayer(norm_first=True)).",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )
