"""What the page, Grafana and scripts read: bounded work whatever the range, and no spike or NaN is lost on the way."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch.wire import HISTOGRAM_EDGES, HISTOGRAMS, LARGEST_STEP
from gradwatch_server.store import schema
from gradwatch_server.store.rollups.buckets import Buckets
from gradwatch_server.store.rollups.levels import pruned_to
from gradwatch_server.store.rollups.series import STATISTIC_NAMES, SampleLane, ScalarLane, ratio
from gradwatch_server.store.runs import unknown_run

__all__ = [
    "STATISTIC_NAMES",
    "Buckets",
    "has_scalar",
    "ratio",
    "read_histograms",
    "read_latest",
    "read_scalar",
    "read_statistic",
]

_AT_ONCE = 500
"""Steps that one statement asks for by name."""
_LOOKED_THROUGH = 8_192
"""Samples among which histograms are looked for where not every one carries them."""
_MOST_CELLS = 2_000_000
"""Of one answer, points x parameters: a map of more parameters has fewer points."""
_NARROW = 2_000
"""Columns up to which what is left over at the ends of a range is read two levels further down: more rows, of at most
15 buckets of samples, or 63 samples, at either end, and half as many statements."""


class _Lane(Protocol):
    fan_outs: tuple[int, int]

    def load(self, level: int, first: int, last: int) -> Buckets: ...

    def counts(self, levels: Sequence[int], first: int, last: int, most: int) -> Sequence[int]: ...


class _FadedLane:
    """A lane whose finer levels are gone for old steps: there the finest level that is left stands for them.

    Every level reads as if it were whole: in the order of the steps, and each sample in exactly one bucket.
    """

    fan_outs = SampleLane.fan_outs

    def __init__(self, lane: SampleLane, pruned: Sequence[int]) -> None:
        self._lane = lane
        self._pruned = pruned

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level that begin in a range, coarser ones where it is gone."""
        gone = pruned_to(self._pruned, level)
        if first > gone:
            return self._lane.load(level, first, last)
        older = self.load(level + 1, first, min(last, gone))
        return older if last <= gone else Buckets.concatenated([older, self._lane.load(level, gone + 1, last)])

    def counts(self, levels: Sequence[int], first: int, last: int, most: int) -> Sequence[int]:
        """Return how many buckets ``load`` returns of these levels, finest first, each counted to about ``most``."""
        found: list[int] = []
        for level in reversed(levels):
            found.insert(0, self._count(level, first, last, most))
            if found[0] >= most:
                break
        return [most] * (len(levels) - len(found)) + found  # a finer level has no fewer

    def _count(self, level: int, first: int, last: int, most: int) -> int:
        gone = pruned_to(self._pruned, level)
        left = 0 if last <= gone else self._lane.counts([level], max(first, gone + 1), last, most)[0]
        if first > gone or left >= most:
            return left
        return left + self._count(level + 1, first, min(last, gone), most)

    def widened(self, first: int, last: int) -> tuple[int, int]:
        """Return a range that no bucket reaches out of where nothing finer is left of it."""
        return self._bucket(first)[0], self._bucket(last)[1]

    def _bucket(self, step: int) -> tuple[int, int]:
        """Return the ends of the finest bucket that is left around a step; twice the step where there is none."""
        level = 0
        while step <= pruned_to(self._pruned, level):
            level += 1
        if not level:
            return step, step
        start = self._lane.around(level, step)[0]
        found = self._lane.load(level, start, start)
        inside = len(found) > 0 and start <= step <= found.last_steps[0]
        return (start, int(found.last_steps[0])) if inside else (step, step)


def read_statistic(
    connection: sa.Connection,
    run_id: str,
    statistic: str,
    from_step: int | None,
    to_step: int | None,
    columns: Sequence[int],
    points: int,
    *,
    means: bool = True,
) -> Buckets:
    """Return a statistic of these parameters over a range, in at most ``points`` buckets.

    At least a third of ``points`` comes back where that many samples of the run lie in the range; of thousands of
    parameters, as many as make two million cells. Samples in which the statistic was not measured are left out; a
    parameter that the run gained later is missing before. Without ``means`` they are not read, and have no columns.

    Where the finer levels are gone, what is left of them takes their place: fewer and larger buckets, of which one at
    either end may reach out of the range.

    Raises:
        Refused: 404 for a run that is not known.
    """
    run = _run(connection, run_id)
    points = max(1, min(points, _MOST_CELLS // max(1, len(columns))))
    lane = SampleLane(connection, run_id, [statistic], run.parameter_count, list(columns), means=means)
    levels = len(run.coverage.get("samples", []))
    pruned = run.coverage.get("pruned", [])
    if (from_step or 0) > pruned_to(pruned, 0):
        return _read(lane, levels, from_step, to_step, points)
    faded = _FadedLane(lane, pruned)
    first, last = faded.widened(from_step or 0, LARGEST_STEP if to_step is None else to_step)
    return _read(faded, levels, first or None, last, points)


def has_scalar(connection: sa.Connection, run_id: str, name: str) -> bool:
    """Return whether a run has a scalar of this name; raises as ``read_statistic`` does."""
    return name in _run(connection, run_id).coverage.get("scalars", {})


def read_scalar(
    connection: sa.Connection, run_id: str, name: str, from_step: int | None, to_step: int | None, points: int
) -> Buckets:
    """Return a scalar of the run over a range, in at most ``points`` buckets of one column, float64.

    Raises:
        Refused: 404 for a run that is not known.
    """
    run = _run(connection, run_id)
    lane = ScalarLane(connection, run_id, name)
    return _read(lane, len(run.coverage.get("scalars", {}).get(name, [])), from_step, to_step, points)


def read_histograms(
    connection: sa.Connection, run_id: str, from_step: int | None, to_step: int | None, points: int
) -> tuple[list[int], NDArray[np.float64]]:
    """Return histograms of units' ratios at up to ``points`` samples spread over what is left of a range.

    Of each part of the range it is the last sample that carries them, looked for among the newest ones of the part.

    Returns:
        Their steps, and the counts, shape (steps, thirds, bins).
    """
    first = max(from_step or 0, pruned_to(_run(connection, run_id).coverage.get("pruned", []), 0) + 1)
    spread = read_statistic(connection, run_id, "grad_norm", first or None, to_step, [], points)
    found = _histograms_of(connection, run_id, spread.last_steps.tolist())
    parts = zip(spread.first_steps.tolist(), spread.last_steps.tolist(), strict=True)
    without = [part for part in parts if part[1] not in found]
    found |= _histograms_of(connection, run_id, _last_carrying(connection, run_id, without))
    bins = HISTOGRAM_EDGES.size + 1
    steps = [step for step in sorted(found) if all(len(found[step].get(name, ())) == bins for name in HISTOGRAMS)]
    counts = [[found[step][name] for name in HISTOGRAMS] for step in steps]
    return steps, np.array(counts, np.float64).reshape(len(steps), len(HISTOGRAMS), bins)


def _histograms_of(connection: sa.Connection, run_id: str, steps: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    """Return the histograms of those of these samples that carry them."""
    table = schema.samples
    found: dict[int, dict[str, list[float]]] = {}
    for begin in range(0, len(steps), _AT_ONCE):
        wanted = table.c.step.in_(steps[begin : begin + _AT_ONCE])
        rows = sa.select(*table.c["step", "histograms"]).where(table.c.run == run_id, table.c.level == 0, wanted)
        found |= {step: histograms for step, histograms in connection.execute(rows) if histograms}
    return found


def _last_carrying(connection: sa.Connection, run_id: str, parts: Sequence[tuple[int, int]]) -> list[int]:
    """Return the last sample that carries histograms of each part, given by its ends, where one of the newest does."""
    most = max(1, _LOOKED_THROUGH // max(1, len(parts)))
    steps: list[int] = []
    for begin in range(0, len(parts), _AT_ONCE):
        ends = sa.values(sa.column("first", sa.BigInteger), sa.column("last", sa.BigInteger))
        part = ends.data(parts[begin : begin + _AT_ONCE]).cte("part")
        table = schema.samples
        mine = table.c.run == run_id, table.c.level == 0, table.c.step.between(part.c.first, part.c.last)
        newest = sa.select(table.c.step, sa.cast(table.c.histograms, sa.Text).label("told")).where(*mine)
        few = newest.order_by(table.c.step.desc()).limit(most).correlate(part).subquery()
        last = sa.select(sa.func.max(few.c.step)).where(few.c.told != "null").scalar_subquery()
        steps += [step for step in connection.scalars(sa.select(last).select_from(part)) if step is not None]
    return steps


def read_latest(connection: sa.Connection, run_id: str) -> sa.Row[Any] | None:
    """Return the newest sample of a run as a row of ``samples``; none where there is none."""
    table = schema.samples
    newest = sa.select(table).where(table.c.run == run_id, table.c.level == 0).order_by(table.c.step.desc()).limit(1)
    return connection.execute(newest).one_or_none()


_run_of = sa.select(*schema.runs.c["parameter_count", "coverage"]).where(schema.runs.c.id == sa.bindparam("of_run"))


def _run(connection: sa.Connection, run_id: str) -> sa.Row[Any]:
    found = connection.execute(_run_of, {"of_run": run_id}).one_or_none()
    if found is None:
        raise unknown_run(run_id)
    return found


def _read(lane: _Lane, levels: int, from_step: int | None, to_step: int | None, points: int) -> Buckets:
    last = LARGEST_STEP if to_step is None else to_step
    third = -(-points // 3)
    fits = _fitting(lane.fan_outs, levels, last - (from_step or 0) + 1, third)
    counts = lane.counts(range(1, fits + 1), from_step or 0, last, third) if fits else []
    coarsest = max((level for level, count in enumerate(counts, 1) if count >= third), default=0)
    return _exactly(lane, coarsest, from_step, last).thinned(points)


def _fitting(fan_outs: tuple[int, int], levels: int, steps: int, buckets: int) -> int:
    """Return the coarsest level of which as many buckets may begin within so many steps, each full of samples."""
    fits, size = 0, fan_outs[0]
    while fits < levels and size * (buckets - 1) < steps:
        fits, size = fits + 1, size * fan_outs[1]
    return fits


def _exactly(lane: _Lane, level: int, first: int | None, last: int) -> Buckets:
    """Return the buckets of a level that lie within a range, and one more for what they leave over at either end."""
    found = lane.load(level, first or 0, last)
    found = found.head(int(np.searchsorted(found.last_steps, last, "right")))
    if level == 0:
        return found
    if not len(found):
        return _exactly(lane, level - 1, first, last)
    begin, end = int(found.first_steps[0]), int(found.last_steps[-1])
    finer = max(0, level - (2 if found.low.shape[1] <= _NARROW else 1))
    parts = [found.measured()]  # its ends are those of all: nothing finer is looked through where nothing was measured
    if first is not None and first < begin:
        parts.insert(0, _exactly(lane, finer, first, begin - 1).thinned(1))
    if end < last:
        parts.append(_exactly(lane, finer, end + 1, last).thinned(1))
    return Buckets.concatenated(parts)
