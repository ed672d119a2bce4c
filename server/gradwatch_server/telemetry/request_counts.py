"""Counts the HTTP requests of this process by method, route and status, and the time until each response began."""

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestKind(NamedTuple):
    """Requests that are counted together. There is a bounded number of kinds, whatever clients send."""

    method: str
    route: str
    status: int


BUCKETS_SECONDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0)
"""Upper bounds of the buckets of the histogram; what took longer is beyond the last."""


@dataclass
class Tally:
    """The requests of one kind: how many fell into each bucket, and the total time until their responses began."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_SECONDS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a request whose response began after this time."""
        self.buckets[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self.seconds += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (upper bound, requests up to it) of each bucket, as Prometheus counts them."""
        bounds = [*map(str, BUCKETS_SECONDS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.buckets)), strict=True))


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
        self.tallies.setdefault(kind, Tally()).add(time.perf_counter() - started)
