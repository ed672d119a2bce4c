"""Gradients that fade on their way from the output to the input, or everywhere, while the run does not learn."""

import math

import numpy as np
from numpy.typing import NDArray

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.memory import Memory
from gradwatch_server.diagnosis.reading import Floats, Layout, Profile, Reading
from gradwatch_server.diagnosis.thresholds import Vanishing

_TINY = 1e-45
"""The smallest positive float32: stands for zero on a logarithmic scale."""


def find(layout: Layout, memory: Memory, reading: Reading, profile: Profile, limits: Vanishing) -> Finding | None:
    """Look for gradients that fade with depth, and for gradients that are negligible everywhere."""
    if not limits.enabled:
        return None
    faded = max(
        (_attenuation(profile, members, limits) for members in (profile.matrices, profile.vectors)),
        key=lambda found: found[0],
    )
    if faded[0] >= limits.attenuation_decades:
        return _fading(layout, memory, reading, profile, limits, *faded)
    return _starved(layout, memory, reading, profile, limits)


def _attenuation(
    profile: Profile, members: NDArray[np.intp], limits: Vanishing
) -> tuple[float, float, NDArray[np.intp]]:
    """Return by how many decades the gradient fades over these parameters, the slope per layer, and who is starved.

    Ratio and RMS must both fade: the first alone is misled by weights that start at zero, the second by layers of
    other widths. Zero where fading is not steady in depth.
    """
    none = (0.0, 0.0, members[:0])
    if len(members) < limits.layers:
        return none
    third = max(1, len(members) // 3)
    decades = math.inf
    for measure in (profile.rms, profile.ratio):
        logs = np.log10(np.maximum(measure[members], _TINY))
        decades = min(decades, float(np.median(logs[-third:]) - np.median(logs[:third])))
        if _rank_correlation(logs) < limits.order:
            return none
    logs = np.log10(np.maximum(profile.rms[members], _TINY))
    slope = float(np.polyfit(np.arange(len(members)), logs, 1)[0])
    starved = members[logs < np.median(logs[-third:]) - limits.attenuation_decades]
    return decades, slope, starved


def _rank_correlation(values: Floats) -> float:
    """Return Spearman's rank correlation of values with their position; 0 where all are equal."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)
    if np.ptp(values) == 0.0:
        return 0.0
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])


def _fading(
    layout: Layout,
    memory: Memory,
    reading: Reading,
    profile: Profile,
    limits: Vanishing,
    decades: float,
    slope: float,
    starved: NDArray[np.intp],
) -> Finding:
    worst = starved[np.argsort(profile.rms[starved], kind="stable")]
    output = float(np.nanmax(profile.rms[profile.matrices])) if profile.matrices.size else 0.0
    parameters, left_out = blame(layout.names, worst, profile.rms, output * 10**-limits.attenuation_decades)
    return Finding(
        rule="vanishing",
        severity="critical" if decades >= limits.critical_decades else "warning",
        first_step=memory.began("vanishing", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={"attenuation_decades": decades, "decades_per_layer": slope, "starved_parameters": float(len(worst))},
        summary=f"The gradient fades by a factor of 10^{decades:.1f} from the last layers to the first",
        cause=f"Each layer passes on only about {10**-slope:.2g} of the gradient that it receives: saturating "
        "activations, or weights that are initialised too small.",
        remedy="Use ReLU or GELU with He initialisation (torch.nn.init.kaiming_normal_), or add residual connections "
        "or normalisation between the layers.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )


def _starved(layout: Layout, memory: Memory, reading: Reading, profile: Profile, limits: Vanishing) -> Finding | None:
    """Look for gradients that move no weight matrix while the loss has not fallen: saturated, not converged."""
    ratios = profile.ratio[profile.matrices]
    loss, first = reading.scalars.get("loss", math.nan), memory.first_loss
    if not ratios.size or not ratios.max() < limits.starved_ratio:
        return None
    if not (math.isfinite(loss) and math.isfinite(first) and loss > 0.5 * first > 0):
        return None
    worst = profile.matrices[np.argsort(ratios, kind="stable")]
    parameters, left_out = blame(layout.names, worst, profile.ratio, limits.starved_ratio)
    return Finding(
        rule="vanishing",
        severity="critical",
        first_step=memory.began("vanishing", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={"largest_ratio": float(ratios.max()), "loss": loss, "first_loss": first},
        summary=f"No weight matrix has a gradient over {ratios.max():.1g} of its weights, and the loss has not fallen",
        cause="The outputs are saturated, or the gradients underflow in half precision: nothing reaches the weights.",
        remedy="Use a loss that matches the output (cross-entropy on logits instead of squared error on a sigmoid), "
        "lower the learning rate, and scale the loss in half precision (torch.amp.GradScaler).",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )
