"""The half of the zoo to develop rules on, and the half that is only ever reported.

The zoo is divided by program, not by seed. The half that is reported, with its labels, stands in ``reported.txt``: it
was drawn once, by ``draw``, before any rule was changed for it, and a program that is added later is drawn anew, beside
it. docs/diagnosis.md says when the reported half was looked at.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from benchmarks.zoo import dead, exploding, healthy, nonfinite, programs, second, third, throttled, vanishing
from benchmarks.zoo.case import Case

SEED = 20_261_130
REPORTED_FILE = Path(__file__).with_name("reported.txt")

FIRST_SETS: tuple[Case, ...] = (
    *healthy.CASES,
    *vanishing.CASES,
    *dead.CASES,
    *exploding.CASES,
    *nonfinite.CASES,
    *second.CASES,
    *third.CASES,
    *throttled.CASES,
)
"""The rules' limits were set on these: in the reported half they are no proof, and are counted apart."""
CASES: tuple[Case, ...] = (*FIRST_SETS, *programs.CASES, *chain(*programs.SILENT_SETS))


def label(case: Case) -> str:
    """Return the label of a case: its rule, ``healthy``, or which rule a healthy one resembles."""
    return case.rule or (f"healthy-like-{case.looks_like}" if case.looks_like else "healthy")


def draw(cases: Sequence[Case], seed: int) -> list[Case]:
    """Draw half of the cases, of each label half and of the odd ones every other time."""
    chance, odd = random.Random(seed), False
    drawn: list[Case] = []
    for name in sorted({label(case) for case in cases}):
        members = sorted((case for case in cases if label(case) == name), key=lambda case: case.name)
        count = len(members) // 2
        if len(members) % 2:
            odd = not odd
            count += odd
        drawn += chance.sample(members, count)
    return sorted(drawn, key=lambda case: case.name)


def draw_report() -> list[Case]:
    """Draw the reported half, from the first sets, the newer programs and those with silent errors apart."""
    sets = (FIRST_SETS, programs.CASES, *programs.SILENT_SETS)
    return sorted((case for cases in sets for case in draw(cases, SEED)), key=lambda case: case.name)


def thirty(half: Sequence[Case]) -> tuple[Case, ...]:
    """Draw 30 cases of a half, always the same, 15 of them sick: as many as slow steps leave time for."""
    chance, members = random.Random(SEED), sorted(half, key=lambda case: case.name)
    sick, well = ([case for case in members if bool(case.rule) is sick] for sick in (True, False))
    return (*chance.sample(sick, 15), *chance.sample(well, 15))


def table(cases: Iterable[Case]) -> str:
    """Return the text of ``reported.txt``: a line for each case with its name and its label."""
    return "".join(f"{case.name} {label(case)}\n" for case in cases)


def reported() -> tuple[Case, ...]:
    """Return the half that is only reported."""
    names = {line.split()[0] for line in REPORTED_FILE.read_text().splitlines()}
    return tuple(case for case in CASES if case.name in names)


def development() -> tuple[Case, ...]:
    """Return the half to develop on, which other documents call the zoo."""
    names = {case.name for case in reported()}
    return tuple(case for case in CASES if case.name not in names)
