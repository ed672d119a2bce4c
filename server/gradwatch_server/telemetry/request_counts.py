"""Counts the HTTP requests of this process by method, route and status, and the time until each response began."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestKind(NamedTuple):
    """Requests that are counted together. There is a bounded number of kinds, whatever clients send."""

    method: str
    route: str
    status: int


@dataclass
class Tally:
    """The number of requests of one kind, and the total time until their responses began."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class RequestCounts:
    """The counts of this process; only the event loop adds to them."""

    tallies: dict[RequestKind, Tally] = field(default_factory=dict)

    def add(self, method: str, route: str, status: int, started: float) -> None:
        """Count a request whose response begins now.

        Args:
            method: the method as sent; an unknown one counts as ``other``.
            route: the template of the path, not the path itself.
            status: the status of the response.
            started: when the request arrived, by ``time.perf_counter``.
        """
        kind = RequestKind(method if method in _METHODS else "other", route, status)
        tally = self.tallies.setdefault(kind, Tally())
        tally.count += 1
        tally.seconds += time.perf_counter() - started
