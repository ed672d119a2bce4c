"""Temporary."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Blame(NamedTuple):
    name: str
    value: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    rule: str
    severity: str
    holds: bool
    first_step: int
    parameters: list[Blame]
    left_out: int
    evidence: dict[str, float]
    summary: str
    cause: str
    remedy: str
    hold_samples: int
    clear_samples: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    step: int
    at: float
    statistics: Any
    scalars: Any
    events: Any = ()


class Layout:
    @classmethod
    def of(cls, parameters: Any) -> "Layout":
        return cls()


class Memory:
    pass


class Thresholds:
    @classmethod
    def from_table(cls, table: Any) -> "Thresholds":
        return cls()


def examine(layout: Layout, memory: Memory, reading: Reading, thresholds: Thresholds) -> tuple[Memory, list[Finding]]:
    return memory, []
