"""Recommends a threshold for adaptive clipping from the units that each candidate would have clipped. It is pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gradwatch.wire import HISTOGRAM_EDGES
from gradwatch_server.diagnosis.finding import Finding

Floats = NDArray[np.float64]

CLIP: Final = "gradwatch.attach(..., clip=0.01)"
"""The call that a remedy names until a threshold is recommended."""
THRESHOLDS: Final = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
"""The candidates: the grid of Brock et al. (2021), with one more at either end."""
USUAL_SHARE: Final = 0.05
"""Share of units that a threshold may clip at a usual step: it then clips outliers and does not throttle learning."""
FEWEST_SAMPLES: Final = 5

_ABOVE: Final = [int(np.searchsorted(HISTOGRAM_EDGES, threshold * (1 + 1e-9))) for threshold in THRESHOLDS]
"""Index of the first bin of the histogram above each candidate."""


@dataclass(frozen=True, eq=False)
class Advice:
    """The units that each of ``THRESHOLDS`` would have clipped, and the recommended threshold."""

    shares: Floats
    """Share of units over all samples, shape (thresholds,)."""
    thirds: Floats
    """Share of units for each third of the depth, shape (3, thresholds)."""
    rates: Floats
    """Share of units at each sample, shape (samples, thresholds)."""
    recommended: float | None
    """None where no candidate can be recommended."""
    reason: str
    """A sentence that explains the recommendation."""


def advise(steps: Sequence[int], histograms: Floats) -> Advice:
    """Return the units that each threshold would have clipped, and the threshold to take.

    Args:
        steps: the steps of the samples.
        histograms: counts of units by their ratio, shape (samples, 3 thirds of the depth, bins).
    """
    above = np.stack([histograms[:, :, first:].sum(axis=2) for first in _ABOVE], axis=2)
    units = histograms.sum(axis=2)
    rates = _share(above.sum(axis=1), units.sum(axis=1)[:, None])
    recommended, reason = _recommend(steps, rates)
    return Advice(
        shares=_share(above.sum(axis=(0, 1)), units.sum()),
        thirds=_share(above.sum(axis=0), units.sum(axis=0)[:, None]),
        rates=rates,
        recommended=recommended,
        reason=reason,
    )


def threshold_in_force(attributes: Mapping[str, str]) -> float | None:
    """Return the threshold with which a run's agent was registered; None where it does not clip."""
    try:
        return float(attributes["agc_clip"])
    except (KeyError, ValueError):
        return None


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


def _recommend(steps: Sequence[int], rates: Floats) -> tuple[float | None, str]:
    if len(steps) < FEWEST_SAMPLES:
        return None, f"Too few samples to tell: {len(steps)} of {FEWEST_SAMPLES}."
    worst = rates.max(axis=0)
    if not worst[0] > 0.0:
        return None, f"No unit's gradient was ever above {THRESHOLDS[0]} of its weight: clipping would change nothing."
    usual = np.median(rates, axis=0)
    for threshold, share, most, at in zip(THRESHOLDS, usual, worst, rates.argmax(axis=0), strict=True):
        if share <= USUAL_SHARE:
            return threshold, (
                f"The smallest threshold that leaves a usual step alone: it would have clipped {share:.1%} of the "
                f"units at the median step and {most:.1%} at step {steps[at]}, the worst."
            )
    return None, (
        f"Even {THRESHOLDS[-1]} would have clipped {usual[-1]:.0%} of the units at the median step: the gradients are "
        "large beside the weights nearly everywhere. Lower the learning rate or change the initialisation first."
    )


def name_threshold(finding: Finding, threshold: float) -> Finding:
    """Return the finding with the threshold for adaptive clipping that this run's own ratios recommend."""
    advised = f"gradwatch.attach(..., clip={threshold:g}), which leaves this run's usual steps alone"
    return replace(finding, remedy=finding.remedy.replace(CLIP, advised))
