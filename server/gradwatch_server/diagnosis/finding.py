"""What a rule says of one sample."""

from dataclasses import dataclass, field
from typing import NamedTuple

from gradwatch_server.diagnosis.sample import Floats, Indices

MOST_BLAMED = 20


class Blame(NamedTuple):
    """A parameter that is to blame, with the value found and the limit that it broke."""

    name: str
    value: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A rule that holds at a sample: what, where, since when, why, and what to do."""

    rule: str
    severity: str
    """``warning`` or ``critical``."""
    first_step: int
    """The step at which it began."""
    parameters: list[Blame]
    """Worst first, at most 20."""
    left_out: int = 0
    """How many more there are."""
    evidence: dict[str, float] = field(default_factory=dict)
    summary: str
    cause: str
    remedy: str
    hold_samples: int
    """Samples in a row that it has to hold before it fires."""
    clear_samples: int
    """Samples in a row without it that resolve it."""


def blame(names: list[str], chosen: Indices, values: Floats, limit: float) -> tuple[list[Blame], int]:
    """Return the first 20 of the chosen parameters, which stand worst first, and how many are left out."""
    listed = [Blame(names[index], float(values[index]), limit) for index in chosen[:MOST_BLAMED]]
    return listed, max(0, len(chosen) - MOST_BLAMED)
