"""Programs of kinds that the first sets lack, each module one kind; half of them are only ever reported."""

from benchmarks.zoo.case import Case
from benchmarks.zoo.programs import (
    curricula,
    faults,
    generative,
    late,
    parameters,
    reinforcement,
    silent_parts,
    slow,
    unmoved,
)

CASES: tuple[Case, ...] = (
    *reinforcement.CASES.cases,
    *generative.CASES.cases,
    *curricula.CASES.cases,
    *late.CASES.cases,
    *parameters.CASES.cases,
    *silent_parts.CASES.cases,
    *faults.CASES.cases,
)
SILENT_SETS: tuple[tuple[Case, ...], ...] = (tuple(unmoved.CASES.cases), tuple(slow.CASES.cases))
"""Silent errors: each set is drawn apart from the others, whose halves were drawn before."""
