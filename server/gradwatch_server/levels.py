"""Roll-up levels, kept as samples arrive: each level gathers neighbours of the level below, and nothing is rescanned.

Level 0 is what was measured. A bucket of a level is written once, when it is full; what comes after the last full
bucket waits on the level below. A late or repeated step mends the buckets that it falls into, and their parents.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from gradwatch_server.buckets import Buckets, even_starts

LAST_STEP = 2**53


class Lane(Protocol):
    """The rows of one track of samples: level 0 and the levels above it; ranges are of first steps, ends included."""

    fan_outs: tuple[int, int]
    """Samples in a bucket of level 1, and buckets of a level in one of the next."""

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level."""

    def insert(self, level: int, buckets: Buckets) -> None:
        """Add buckets to a level."""

    def delete(self, level: int, first: int, last: int) -> None:
        """Remove buckets of a level above 0."""

    def end(self, level: int) -> int:
        """Return the last step that the buckets of a level reach; -1 where there is none."""

    def around(self, level: int, step: int) -> tuple[int, int]:
        """Return the first step of the bucket that ``step`` falls into, and the last one before the next bucket."""


class Levels:
    """The levels of one lane.

    ``coverage`` holds ``[to, waiting]`` for each level from 1 on: up to which step it covers the level below, and an
    upper bound of how many buckets of that level lie beyond. It is changed in place.
    """

    def __init__(self, lane: Lane, coverage: list[list[int]]) -> None:
        self._lane = lane
        self._coverage = coverage

    def add(self, steps: Iterable[int], written: Buckets | None = None) -> None:
        """Take in samples that were written at these steps, new ones or in place of others.

        Args:
            steps: in any order.
            written: the samples, by ascending steps, where they are at hand: they need not be read again.
        """
        level, changed = 1, sorted(set(steps))
        while changed:
            if len(self._coverage) < level:
                self._coverage.append([-1, 0])
            to = self._coverage[level - 1][0]
            late = [step for step in changed if step <= to]
            self._coverage[level - 1][1] += len(changed) - len(late)
            changed = self._mend(level, late) + self._close(level, written)
            level, written = level + 1, None

    def cut(self, step: int) -> None:
        """Drop every bucket that reaches ``step``: some samples from there on have been removed."""
        for level, covered in enumerate(self._coverage, 1):
            if step > covered[0]:
                return
            step = min(step, self._lane.around(level, step)[0])
            self._lane.delete(level, step, LAST_STEP)
            covered[:] = [self._lane.end(level), self._fan_out(level)]

    def _fan_out(self, level: int) -> int:
        return self._lane.fan_outs[0 if level == 1 else 1]

    def _close(self, level: int, written: Buckets | None) -> list[int]:
        """Write the buckets that are full, of ``written`` where nothing else waits; return their first steps."""
        covered, fan_out = self._coverage[level - 1], self._fan_out(level)
        if covered[1] < fan_out:
            return []
        waiting = None if written is None else written.after(covered[0])
        if waiting is None or len(waiting) != covered[1]:
            waiting = self._lane.load(level - 1, covered[0] + 1, LAST_STEP)
        full = len(waiting) // fan_out
        covered[1] = len(waiting) - full * fan_out
        if not full:
            return []
        buckets = waiting.head(full * fan_out).gathered(np.arange(full) * fan_out)
        self._lane.insert(level, buckets)
        covered[0] = int(buckets.last_steps[-1])
        steps: list[int] = buckets.first_steps.tolist()
        return steps

    def _mend(self, level: int, late: list[int]) -> list[int]:
        """Gather anew the buckets that these steps fall into, splitting those that have grown; return first steps."""
        rewritten: list[int] = []
        end = -1
        for step in late:
            if step <= end:
                continue
            start, end = self._lane.around(level, step)
            end = min(end, self._coverage[level - 1][0])
            children = self._lane.load(level - 1, min(start, step), end)
            buckets = children.gathered(even_starts(len(children), self._fan_out(level)))
            self._lane.delete(level, start, end)
            self._lane.insert(level, buckets)
            rewritten += buckets.first_steps.tolist()
        return rewritten
