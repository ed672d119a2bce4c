"""Queries of series, maps and histograms: bounded work whatever the range, and no spike or NaN is lost on the way."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch.wire import HISTOGRAM_EDGES, HISTOGRAMS, LARGEST_STEP
from gradwatch_server.store import schema
from gradwatch_server.store.rollups.buckets import Buckets
from gradwatch_server.store.rollups.levels import pruned_to
from gradwatch_server.store.rollups.series import STATISTIC_NAMES, SampleSeries, ScalarSeries
from gradwatch_server.store.runs import unknown_run

__all__ = [
    "STATISTIC_NAMES",
    "Buckets",
    "has_scalar",
    "read_histograms",
    "read_latest",
    "read_scalar",
    "read_statistic",
]

_STEPS_AT_ONCE = 500
"""Steps, or parts of a range, in one statement."""
_SEARCHED_SAMPLES = 8_192
"""Samples that are searched for histograms, which not every sample carries."""
_MOST_CELLS = 2_000_000
"""Largest answer, points x parameters: a map of more parameters has fewer points."""
_NARROW_COLUMNS = 2_000
"""Up to so many columns, what a level leaves over at the ends of a range is read two levels further down: more rows (at
most 15 buckets of samples, or 63 samples, at either end), and half as many statements."""


class _Readable(Protocol):
    """A series as ``_read`` reads it."""

    fan_outs: tuple[int, int]

    def load(self, level: int, first: int, last: int) -> Buckets: ...

    def counts(self, levels: Sequence[int], first: int, last: int, most: int) -> Sequence[int]: ...


class _DownsampledSeries:
    """A series whose finer levels are deleted for old steps: the finest level that is left stands for them there.

    Every level reads as if it were whole: by ascending steps, and each sample in exactly one bucket.
    """

    fan_outs = SampleSeries.fan_outs

    def __init__(self, series: SampleSeries, pruned: Sequence[int]) -> None:
        self._series = series
        self._pruned = pruned

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level that begin in a range, or coarser ones where it is deleted."""
        gone = pruned_to(self._pruned, level)
        if first > gone:
            return self._series.load(level, first, last)
        older = self.load(level + 1, first, min(last, gone))
        return older if last <= gone else Buckets.concatenated([older, self._series.load(level, gone + 1, last)])

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
        left = 0 if last <= gone else self._series.counts([level], max(first, gone + 1), last, most)[0]
        if first > gone or left >= most:
            return left
        return left + self._count(level + 1, first, min(last, gone), most)

    def widened(self, first: int, last: int) -> tuple[int, int]:
        """Return the range, widened to whole buckets where the samples at its ends are deleted."""
        return self._bucket(first)[0], self._bucket(last)[1]

    def _bucket(self, step: int) -> tuple[int, int]:
        """Return (first, last) step of the finest stored bucket that contains ``step``, or (step, step)."""
        level = 0
        while step <= pruned_to(self._pruned, level):
            level += 1
        if not level:
            return step, step
        start = self._series.around(level, step)[0]
        found = self._series.load(level, start, start)
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

    At least a third of ``points`` buckets come back if so many samples of the run lie in the range; of thousands of
    parameters, as many as make two million cells. Samples in which the statistic was not measured are left out. A
    parameter that the run gained later is missing before that. Without ``means`` these are not read, and have no
    columns.

    Where the finer levels are deleted, the coarser ones take their place: fewer and larger buckets, of which the first
    and the last may reach out of the range.

    Raises:
        Refused: 404 for a run that is not known.
    """
    run = _run(connection, run_id)
    points = max(1, min(points, _MOST_CELLS // max(1, len(columns))))
    series = SampleSeries(connection, run_id, [statistic], run.parameter_count, list(columns), means=means)
    levels = len(run.coverage.get("samples", []))
    pruned = run.coverage.get("pruned", [])
    if (from_step or 0) > pruned_to(pruned, 0):
        return _read(series, levels, from_step, to_step, points)
    downsampled = _DownsampledSeries(series, pruned)
    first, last = downsampled.widened(from_step or 0, LARGEST_STEP if to_step is None else to_step)
    return _read(downsampled, levels, first or None, last, points)


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
    series = ScalarSeries(connection, run_id, name)
    return _read(series, len(run.coverage.get("scalars", {}).get(name, [])), from_step, to_step, points)


def read_histograms(
    connection: sa.Connection, run_id: str, from_step: int | None, to_step: int | None, points: int
) -> tuple[list[int], NDArray[np.float64]]:
    """Return histograms of units' ratios at up to ``points`` samples spread over a range, as far as it is stored.

    The range is divided into parts. The last sample that carries histograms is taken of each part, searched for among
    its newest samples.

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
    """Return step -> histograms of the samples at these steps that carry them."""
    table = schema.samples
    found: dict[int, dict[str, list[float]]] = {}
    for begin in range(0, len(steps), _STEPS_AT_ONCE):
        wanted = table.c.step.in_(steps[begin : begin + _STEPS_AT_ONCE])
        rows = sa.select(*table.c["step", "histograms"]).where(table.c.run == run_id, table.c.level == 0, wanted)
        found |= {step: histograms for step, histograms in connection.execute(rows) if histograms}
    return found


def _last_carrying(connection: sa.Connection, run_id: str, parts: Sequence[tuple[int, int]]) -> list[int]:
    """Return the step of the last sample with histograms in each part (first, last), if one of the newest has them."""
    most = max(1, _SEARCHED_SAMPLES // max(1, len(parts)))
    steps: list[int] = []
    for begin in range(0, len(parts), _STEPS_AT_ONCE):
        ends = sa.values(sa.column("first", sa.BigInteger), sa.column("last", sa.BigInteger))
        part = ends.data(parts[begin : begin + _STEPS_AT_ONCE]).cte("part")
        table = schema.samples
        mine = table.c.run == run_id, table.c.level == 0, table.c.step.between(part.c.first, part.c.last)
        newest = sa.select(table.c.step, sa.cast(table.c.histograms, sa.Text).label("text")).where(*mine)
        few = newest.order_by(table.c.step.desc()).limit(most).correlate(part).subquery()
        last = sa.select(sa.func.max(few.c.step)).where(few.c.text != "null").scalar_subquery()
        steps += [step for step in connection.scalars(sa.select(last).select_from(part)) if step is not None]
    return steps


def read_latest(connection: sa.Connection, run_id: str) -> sa.Row[Any] | None:
    """Return the newest sample of a run as a row of ``samples``; None if there is no sample."""
    table = schema.samples
    newest = sa.select(table).where(table.c.run == run_id, table.c.level == 0).order_by(table.c.step.desc()).limit(1)
    return connection.execute(newest).one_or_none()


_run_of = sa.select(*schema.runs.c["parameter_count", "coverage"]).where(schema.runs.c.id == sa.bindparam("of_run"))


def _run(connection: sa.Connection, run_id: str) -> sa.Row[Any]:
    found = connection.execute(_run_of, {"of_run": run_id}).one_or_none()
    if found is None:
        raise unknown_run(run_id)
    return found


def _read(series: _Readable, levels: int, from_step: int | None, to_step: int | None, points: int) -> Buckets:
    last = LARGEST_STEP if to_step is None else to_step
    third = -(-points // 3)
    fits = _fitting(series.fan_outs, levels, last - (from_step or 0) + 1, third)
    counts = series.counts(range(1, fits + 1), from_step or 0, last, third) if fits else []
    coarsest = max((level for level, count in enumerate(counts, 1) if count >= third), default=0)
    return _exactly(series, coarsest, from_step, last).thinned(points)


def _fitting(fan_outs: tuple[int, int], levels: int, steps: int, buckets: int) -> int:
    """Return the coarsest level that can have ``buckets`` buckets in ``steps`` steps with a sample at each step."""
    fits, size = 0, fan_outs[0]
    while fits < levels and size * (buckets - 1) < steps:
        fits, size = fits + 1, size * fan_outs[1]
    return fits


def _exactly(series: _Readable, level: int, first: int | None, last: int) -> Buckets:
    """Return the buckets of a level that lie within a range, and one more at either end for what these leave over."""
    found = series.load(level, first or 0, last)
    found = found.head(int(np.searchsorted(found.last_steps, last, "right")))
    if level == 0:
        return found
    if not len(found):
        return _exactly(series, level - 1, first, last)
    begin, end = int(found.first_steps[0]), int(found.last_steps[-1])
    finer = max(0, level - (2 if found.low.shape[1] <= _NARROW_COLUMNS else 1))
    parts = [found.measured()]  # begin and end are of all buckets: no finer level is read where nothing was measured
    if first is not None and first < begin:
        parts.insert(0, _exactly(series, finer, first, begin - 1).thinned(1))
    if end < last:
        parts.append(_exactly(series, finer, end + 1, last).thinned(1))
    return Buckets.concatenated(parts)
