"""Diagnoses a run from its samples: vanishing, exploding, non-finite and dead gradients, and clipping that decides all.

It is pure: the run's parameters, its history and a sample go in, the new history and the findings come out. No limit is
an absolute gradient norm, which means nothing across widths, learning rates and loss scales; each is a ratio, a growth
or a slope over depth. docs/diagnosis.md explains the rules and their limits.
"""

import numpy as np

from gradwatch_server.diagnosis.finding import Blame, Finding
from gradwatch_server.diagnosis.history import History
from gradwatch_server.diagnosis.rule import Observation
from gradwatch_server.diagnosis.rules import RULES, SAMPLE_RULES, Thresholds, exploding
from gradwatch_server.diagnosis.sample import RunParameters, Sample

__all__ = [
    "RULES",
    "SAMPLE_RULES",
    "Blame",
    "Finding",
    "History",
    "Observation",
    "RunParameters",
    "Sample",
    "Thresholds",
    "diagnose",
]


def diagnose(
    parameters: RunParameters, history: History, sample: Sample, thresholds: Thresholds
) -> tuple[History, list[Finding]]:
    """Diagnose one sample of a run.

    Args:
        parameters: the run's parameters.
        history: the history of the run's earlier samples.
        sample: the sample; steps ascend within an attempt.
        thresholds: the limits in force.

    Returns:
        The history with this sample in it, and one finding for each rule that holds at the sample.
    """
    with np.errstate(all="ignore"):
        observation = Observation.of(parameters, history, sample)
        found = ((rule, rule.find(observation, thresholds[rule])) for rule in SAMPLE_RULES)
        symptoms = {rule: symptom for rule, symptom in found if symptom is not None}
        reports = (rule.report(symptom, thresholds[rule], history.since) for rule, symptom in symptoms.items())
        findings = [finding for finding in reports if finding is not None]
        rules = [finding.rule for finding in findings]
        # A sign of an explosion counts for the history even where the rule is not enabled.
        suspect = exploding.RULE in symptoms
        after = history.after(sample, observation.profile, observation.quiet_times, rules, suspect=suspect)
        return after, findings
