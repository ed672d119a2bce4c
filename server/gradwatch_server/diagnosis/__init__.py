"""Diagnoses a run from its samples: vanishing, exploding, non-finite and dead gradients, and clipping that decides all.

It is pure: the run's parameters, its history and a sample go in, the new history and the findings come out. No limit is
an absolute gradient norm, which means nothing across widths, learning rates and loss scales; each is a ratio, a growth
or a slope over depth. docs/diagnosis.md explains the rules and their limits.
"""

from gradwatch_server.diagnosis.finding import Blame, Finding
from gradwatch_server.diagnosis.history import History
from gradwatch_server.diagnosis.rule import Observation
from gradwatch_server.diagnosis.rules import RULES, SAMPLE_RULES, Thresholds, diagnose
from gradwatch_server.diagnosis.run_parameters import RunParameters
from gradwatch_server.diagnosis.sample import Sample

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
