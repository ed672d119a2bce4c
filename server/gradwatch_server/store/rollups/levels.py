"""Roll-up levels, kept as samples arrive: each level gathers neighbours of the level below, and nothing is rescanned.

Level 0 holds the samples as they were measured. A bucket of a level is written once, when it is full; what comes after
the last full bucket waits on the level below. If a sample comes late, or again, the buckets that it falls into and
their parents are gathered anew.

In time the finer levels of old steps are deleted (``downsampling.py``). A sample that comes late for such a step is
added to the finest bucket that is left: there is nothing to gather that bucket from anew. A sample that is sent again
counts once more there.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gradwatch.wire import LARGEST_STEP
from gradwatch_server.store.rollups.buckets import Buckets, even_starts

_MOST_LATE = 256
"""Late samples whose buckets are gathered at once."""
_MOST_VALUES = 4_000_000
"""Values that are read for them at once, about."""
_SPARSE = 16
"""Buckets of a range for each late sample in it above which each bucket is read by itself."""


class Series(Protocol):
    """The stored rows of one series: its samples at level 0, and buckets at the levels above.

    Ranges are of first steps, ends included.
    """

    fan_outs: tuple[int, int]
    """Samples in a bucket of level 1, and buckets of a level in one bucket of the next."""

    @property
    def width(self) -> int:
        """Return the number of values in a plane of one bucket."""

    def counts(self, levels: Sequence[int], first: int, last: int, most: int) -> Sequence[int]:
        """Return how many buckets of each of these levels begin in a range, counting no further than ``most``."""

    def starts(self, level: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the first steps of the buckets of a level that begin in a range, ascending."""

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level."""

    def insert(self, level: int, buckets: Buckets) -> None:
        """Add buckets to a level."""

    def delete(self, level: int, first: int, last: int) -> None:
        """Delete buckets of a level above 0."""

    def replace(self, level: int, first: int, bucket: Buckets) -> None:
        """Put one bucket in the place of the one that begins at ``first``."""

    def end(self, level: int) -> int:
        """Return the last step that the buckets of a level reach; -1 if there is no bucket."""

    def around(self, level: int, step: int) -> tuple[int, int]:
        """Return the first step of the bucket that ``step`` falls into, and the last one before the next bucket.

        For a step before the first bucket it is that bucket; both are ``LARGEST_STEP`` if there is no bucket.
        """


def pruned_to(pruned: Sequence[int], level: int) -> int:
    """Return the step up to which the rows of a level are deleted; -1 if none are."""
    return pruned[level] if level < len(pruned) else -1


class Levels:
    """The levels of one series.

    ``coverage`` holds ``[to, waiting]`` for each level from 1 on: ``to`` is the step up to which the level covers the
    level below, and ``waiting`` is an upper bound of the number of buckets of the level below that lie beyond this
    step. ``pruned`` holds for each level from 0 on the step up to which its rows are deleted. This step is never beyond
    what the level above covers, nor beyond the same step of the level below. Both lists are changed in place.
    """

    def __init__(self, series: Series, coverage: list[list[int]], pruned: list[int] | None = None) -> None:
        self._series = series
        self._coverage = coverage
        self._pruned = [] if pruned is None else pruned

    def add(self, steps: Iterable[int], written: Callable[[], Buckets] | None = None) -> None:
        """Take in samples that were written at these steps, new ones or in place of others.

        Args:
            steps: in any order.
            written: returns the samples by ascending steps, if they are at hand: they need not be read again.
        """
        level, changed = 1, sorted(set(steps))
        orphans: list[int] = []
        while changed or orphans:
            if len(self._coverage) < level:
                self._coverage.append([-1, 0])
            # 1. Late samples fall into buckets that exist; the others wait for the next bucket.
            to = self._coverage[level - 1][0]
            late = [step for step in changed if step <= to]
            self._coverage[level - 1][1] += len(changed) - len(late)
            # 2. Orphans join a bucket; buckets of other late samples are gathered anew; full buckets are written.
            if level == 1:
                orphans = [step for step in late if self._is_orphan(step)]
                late = sorted(set(late) - set(orphans))
            joined, orphans = self._join(level, orphans)
            changed = joined + self._regather(level, late) + self._close(level, written)
            # 3. The next level takes in the buckets that are new or changed.
            level, written = level + 1, None

    def cut(self, step: int) -> None:
        """Drop every bucket that reaches ``step``: some samples from there on have been removed.

        What the dropped buckets held of earlier steps is gathered anew from the levels below. Where those are deleted,
        it is lost with the one bucket that the cut went through.
        """
        dropped = 0
        for level, covered in enumerate(self._coverage, 1):
            if step > covered[0]:
                break
            step = min(step, self._series.around(level, step)[0])
            self._series.delete(level, step, LARGEST_STEP)
            dropped = level
        for level in range(dropped, 0, -1):
            above = self._coverage[level][0] if level < len(self._coverage) else -1
            end = max(self._series.end(level), above)
            self._coverage[level - 1][:] = [end, self._fan_out(level)]
            if level <= len(self._pruned):
                self._pruned[level - 1] = min(self._pruned[level - 1], end)

    def _fan_out(self, level: int) -> int:
        return self._series.fan_outs[0 if level == 1 else 1]

    def _close(self, level: int, written: Callable[[], Buckets] | None) -> list[int]:
        """Write the buckets that are full, of ``written`` if nothing else waits; return their first steps."""
        covered, fan_out = self._coverage[level - 1], self._fan_out(level)
        if covered[1] < fan_out:
            return []
        waiting = None if written is None else written().after(covered[0])
        if waiting is None or len(waiting) != covered[1]:
            waiting = self._series.load(level - 1, covered[0] + 1, LARGEST_STEP)
        full = len(waiting) // fan_out
        covered[1] = len(waiting) - full * fan_out
        if not full:
            return []
        buckets = waiting.head(full * fan_out).gathered(np.arange(full) * fan_out)
        self._series.insert(level, buckets)
        covered[0] = int(buckets.last_steps[-1])
        steps: list[int] = buckets.first_steps.tolist()
        return steps

    def _is_orphan(self, step: int) -> bool:
        """Return whether the samples of the bucket that ``step`` falls into are deleted."""
        gone = pruned_to(self._pruned, 0)
        if gone < 0 or step <= gone:
            return gone >= 0
        start = self._series.around(1, step)[0]
        return start <= gone or start > step

    def _join(self, level: int, orphans: list[int]) -> tuple[list[int], list[int]]:
        """Add samples to the buckets that they fall into.

        Returns:
            The first steps of these buckets, and the samples whose bucket is deleted from this level too.
        """
        joined: set[int] = set()
        left = []
        for step in orphans:
            start = self._series.around(level, step)[0]
            if start > step and pruned_to(self._pruned, level) >= 0:
                left.append(step)
                continue
            late = self._series.load(0, step, step)
            if not len(late):  # none of the statistics of this series was measured
                continue
            bucket = self._series.load(level, start, start).joined_by(late)
            self._series.replace(level, start, bucket)
            end = int(bucket.last_steps[0])
            self._pruned[:level] = [max(gone, end) for gone in self._pruned[:level]]
            joined.discard(start)
            joined.add(int(bucket.first_steps[0]))
        return sorted(joined), left

    def _regather(self, level: int, late: list[int]) -> list[int]:
        """Gather the buckets that these steps fall into anew, splitting those that have grown; return first steps."""
        rewritten: list[int] = []
        at_once = max(1, min(_MOST_LATE, _MOST_VALUES // (self._series.width * self._fan_out(level) * _SPARSE)))
        while late:
            some, late = late[:at_once], late[at_once:]
            found = self._series.counts([level], some[0], some[-1], _SPARSE * len(some))[0]
            if found >= _SPARSE * len(some):  # far apart: what lies between them is not worth reading
                some, late = some[:1], [*some[1:], *late]
            start, end = self._series.around(level, some[0])
            end = min(end if len(some) == 1 else self._series.around(level, some[-1])[1], self._coverage[level - 1][0])
            rewritten += self._regather_range(level, some, start, end)
            late = late[bisect_right(late, end) :]
        return rewritten

    def _regather_range(self, level: int, late: list[int], start: int, end: int) -> list[int]:
        """Gather those buckets of a range anew that steps fall into; return their first steps.

        Args:
            level: the level of the buckets.
            late: the steps, ascending.
            start: first step of the bucket that the first of them falls into.
            end: last step before the bucket after the one that the last of them falls into.
        """
        starts = self._series.starts(level, start, end)
        children = self._series.load(level - 1, min(start, late[0]), end)
        # 1. Which buckets are gathered anew, and where the children of each begin.
        touched: NDArray[np.intp] = np.unique(np.maximum(np.searchsorted(starts, late, "right") - 1, 0))
        first_children = np.searchsorted(children.first_steps, starts)
        first_children[0] = 0
        ends = np.append(first_children[1:], len(children))
        # 2. All are gathered, the others as they are; only these are written.
        begins, mine, chosen = [], [], set(touched.tolist())
        for place, (first, last) in enumerate(zip(first_children.tolist(), ends.tolist(), strict=True)):
            split = even_starts(last - first, self._fan_out(level)) if place in chosen else np.zeros(1, np.intp)
            begins.append(first + split)
            mine += [place in chosen] * len(split)
        buckets = children.gathered(np.concatenate(begins)).chosen(np.array(mine))
        # 3. Neighbours are deleted together.
        for run in np.split(touched, np.flatnonzero(np.diff(touched) > 1) + 1):
            following = int(starts[run[-1] + 1]) - 1 if run[-1] + 1 < len(starts) else end
            self._series.delete(level, int(starts[run[0]]), following)
        self._series.insert(level, buckets)
        steps: list[int] = buckets.first_steps.tolist()
        return steps
