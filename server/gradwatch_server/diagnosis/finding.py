"""The symptom that a rule of the diagnosis sees in a sample, and the finding that alerts are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_BLAMED = 20


class Blame(NamedTuple):
    """A parameter that is to blame, with the value found and the limit that it broke."""

    name: str
    value: float
    limit: float


class Blamed(NamedTuple):
    """The parameters that are to blame."""

    parameters: Sequence[Blame] = ()
    """Worst first, at most 20."""
    left_out: int = 0
    """How many more there are."""


NOBODY = Blamed()


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """The symptom that a rule sees in one sample, before the limits that all rules have in common apply."""

    summary: str
    cause: str
    remedy: str
    first_step: int
    """The step at which it began, as far as this sample tells."""
    blamed: Blamed = NOBODY
    evidence: Mapping[str, float] = field(default_factory=dict)
    critical: bool = False
    hold_samples: int | None = None
    """Samples in a row that it has to hold before it fires; None: as many as the rule's limits say."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A rule that holds at a sample: what is wrong, where, since when, why, and what to do about it."""

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
