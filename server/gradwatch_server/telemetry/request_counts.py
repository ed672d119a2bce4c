"""Requests that were answered, counted by what they asked for and what came of them."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Kind(NamedTuple):
    """What is counted together: bounded, whatever clients send."""

    method: str
    route: str
    status: int


@dataclass
class Tally:
    """How many, and how long they took until their answer began."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class Requests:
    """The counts of this process; only the event loop adds to them."""

    tallies: dict[Kind, Tally] = field(default_factory=dict)

    def add(self, method: str, route: str, status: int, started: float) -> None:
        """Count a request that began at ``started`` (`time.perf_counter`).

        Args:
            method: as sent; an unknown one counts as ``other``.
            route: the template of the path, not the path.
            status: of the answer.
            started: when the request arrived.
        """
        kind = Kind(method if method in _METHODS else "other", route, status)
        tally = self.tallies.setdefault(kind, Tally())
        tally.count += 1
        tally.seconds += time.perf_counter() - started
