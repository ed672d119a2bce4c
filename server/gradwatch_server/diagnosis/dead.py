"""Parameters that get nothing while others learn."""

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.memory import Memory
from gradwatch_server.diagnosis.reading import Layout, Profile, Reading
from gradwatch_server.diagnosis.thresholds import Dead


def find(layout: Layout, memory: Memory, reading: Reading, profile: Profile, limits: Dead) -> Finding | None:
    """Look for gradients that have been exactly zero for many samples in a row while others were not."""
    zeros = memory.zeros(profile)
    dead = layout.trainable & profile.present & (layout.elements > 0) & (zeros >= limits.zero_samples)
    alive = profile.finite & (profile.gradient > 0.0)
    if not limits.enabled or not dead.any() or not alive.any():
        return None
    nearest_output_first = np.argsort(-layout.depth, kind="stable")
    chosen = nearest_output_first[dead[nearest_output_first]]
    parameters, left_out = blame(layout.names, chosen, zeros.astype(np.float64), float(limits.zero_samples))
    first = parameters[0].name
    return Finding(
        rule="dead",
        severity="warning",
        first_step=memory.began("dead", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={"dead_parameters": float(dead.sum()), "samples": float(zeros[dead].max())},
        summary=f"{int(dead.sum())} parameters have had a gradient of exactly zero for {limits.zero_samples} samples",
        cause=f"Nothing flows back through {first}: its units never activate, or it is cut off from the loss.",
        remedy="Lower the learning rate or the bias of that layer, use LeakyReLU or GELU instead of ReLU, and look for "
        "an accidental detach() behind it.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )
