"""Clipping that decides every step, or that never does anything."""

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.history import CLIPPED_SHARE, History
from gradwatch_server.diagnosis.sample import Profile, RunParameters, Sample
from gradwatch_server.diagnosis.thresholds import Throttled

_LEARNING = 0.2
"""Share of the first loss by which a run has come down that learns in spite of being clipped."""


def find(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Throttled
) -> Finding | None:
    """Look for adaptive clipping that has clipped nearly everything for long, or nothing for very long.

    Both are counted up to the sample before: how much this one clips is not decisive.
    """
    if not limits.enabled:
        return None
    learning = memory.losses.progress() > _LEARNING
    clipped = memory.clipped_samples >= (limits.learning_clipped_samples if learning else limits.clipped_samples)
    if not clipped and memory.unclipped_samples < limits.unclipped_samples:
        return None
    share = np.maximum(reading.clipped_share(len(layout.names)), 0.0)
    samples = memory.clipped_samples if clipped else memory.unclipped_samples
    worst = profile.matrices[np.argsort(-share[profile.matrices], kind="stable")]
    parameters, left_out = blame(layout.names, worst, share, CLIPPED_SHARE if clipped else 0.0)
    falling = "the loss has come down in spite of it" if learning else "the loss has not come down"
    return Finding(
        rule="throttled",
        severity=limits.severity(critical=clipped),
        first_step=memory.began("throttled", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={"samples": float(samples), "clipped_unit_share": profile.typical(share)},
        summary=f"Clipping has scaled down nearly every unit for {samples} samples, and {falling}"
        if clipped
        else f"Clipping has been on for {samples} samples and has not clipped anything",
        cause="The threshold, not the gradient, sets the length of every step."
        if clipped
        else "The threshold lies above every gradient of this run.",
        remedy="Double the threshold, for instance 0.02 instead of 0.01 (the paper's grid ends at 0.16)."
        if clipped
        else "Halve the threshold, or turn clipping off: it costs time and does nothing.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )
