"""What is wrong with a run, pure: arrays and the step come in, findings go out.

Every signal is free of scale: a ratio, a growth, a slope over depth. An absolute gradient norm means nothing across
widths, learning rates and loss scales. docs/diagnosis.md says what each threshold means and why it has its default.
"""

import numpy as np

from gradwatch_server.diagnosis.finding import Blame, Finding
from gradwatch_server.diagnosis.history import History, quiet_times
from gradwatch_server.diagnosis.rules import dead, exploding, nonfinite, throttled, vanishing
from gradwatch_server.diagnosis.sample import RunParameters, Sample
from gradwatch_server.diagnosis.thresholds import Thresholds

__all__ = [
    "RULES",
    "Blame",
    "Finding",
    "History",
    "RunParameters",
    "Sample",
    "Thresholds",
    "diagnose",
]

RULES = ("nonfinite", "exploding", "vanishing", "dead", "throttled")
"""The rules that blame parameters."""


def diagnose(
    layout: RunParameters, memory: History, reading: Sample, thresholds: Thresholds
) -> tuple[History, list[Finding]]:
    """Look at one sample of a run.

    Args:
        layout: the run's parameters.
        memory: what is remembered of the run's earlier samples.
        reading: the sample; steps ascend within an attempt.
        thresholds: the limits in force.

    Returns:
        The memory with this sample in it, and one finding for each rule that holds now.
    """
    with np.errstate(all="ignore"):
        profile = reading.profile(layout, memory.first_weights)
        quiet = quiet_times(memory, layout, reading, profile)
        explosion = exploding.sign(layout, memory, reading, profile, thresholds.exploding)
        rules = (
            nonfinite.find(layout, memory, reading, profile, thresholds.nonfinite),
            exploding.find(layout, memory, reading, profile, thresholds.exploding, explosion),
            vanishing.find(layout, memory, reading, profile, thresholds.vanishing),
            dead.find(layout, memory, reading, profile, thresholds.dead, quiet),
            throttled.find(layout, memory, reading, profile, thresholds.throttled),
        )
        findings = [finding for finding in rules if finding is not None]
        return memory.after(layout, reading, profile, findings, quiet, suspect=explosion is not None), findings
