"""The stored rows of a series: statistics of samples, scalars of every step, and the roll-ups of both.

The time of a bucket of samples is 0 until the rows of the level below it are deleted; from then on it is the time of
its newest sample.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch.wire import MISSING, STATISTICS, Statistic, Trail, Vector, deserialise
from gradwatch_server.store import schema
from gradwatch_server.store.rollups.buckets import COUNT_PLANES, PLANES, UNMEASURED, Buckets, Floats
from gradwatch_server.store.rollups.level_rows import LevelRows, within
from gradwatch_server.store.rollups.readahead import reading_ahead
from gradwatch_server.store.vectors import (
    Rows,
    VectorColumns,
    chunk_count,
    compact_counts,
    ratio,
    read_vectors,
    select_bytes,
    select_vectors,
    stacked,
    stacked_counts,
)

STATISTIC_NAMES = (*STATISTICS, "ratio")
TRAIL_STEPS = 4_096
"""A row of a trail lies within one stretch of so many steps, so that a range of steps is a range of keys."""

decode_trails = msgspec.msgpack.Decoder(dict[str, Trail])


def readable_statistics(measured: Sequence[str]) -> list[str]:
    """Return the measured statistics, and the ratio if both of its parts are among them."""
    both = "grad_norm" in measured and "weight_norm" in measured
    return [*measured, "ratio"] if both else list(measured)


class SampleSeries(LevelRows):
    """Statistics of a run's parameters, side by side: buckets have statistics x parameters columns."""

    fan_outs = (16, 4)
    table = schema.samples

    def __init__(
        self,
        connection: sa.Connection,
        run_id: str,
        names: Sequence[str],
        parameter_count: int,
        columns: Sequence[int] | None = None,
        *,
        means: bool = True,
    ) -> None:
        """Choose the statistics and parameters that are read.

        Args:
            connection: reads or writes the rows.
            run_id: the run.
            names: the statistics.
            parameter_count: number of parameters of the run.
            columns: positions of the parameters, in the order in which they are read; None: all.
            means: whether the means are read.
        """
        super().__init__(connection, run=run_id)
        self._planes = PLANES if means else tuple(name for name in PLANES if name != "mean")
        self._names = list(names)
        self._only = columns[0] if columns is not None and len(columns) == 1 else None
        """The position of the one parameter that is read: the database cuts its values out."""
        self._stored_width = parameter_count if self._only is None else 1
        whole = columns is None or self._only is not None or list(columns) == list(range(parameter_count))
        self._columns = None if whole else columns
        self._width = parameter_count if columns is None else len(columns)

    @property
    def width(self) -> int:
        """Return the number of statistics times parameters."""
        return max(1, len(self._names) * self._width)

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level; of level 0 those samples in which any of the statistics was measured.

        Above level 0, if one statistic is read, a bucket in which it was not measured is marked as ``UNMEASURED``.
        """
        return self._load_samples(first, last) if level == 0 else self._load_rollups(level, first, last)

    def of_samples(self, samples: Mapping[int, Mapping[Statistic, Vector]]) -> Buckets:
        """Return the buckets of level 0 of these statistics by step, the steps ascending."""
        stored = self._stored_names()
        columns: dict[str, Rows] = {name: [statistics.get(name) for statistics in samples.values()] for name in stored}
        return self._buckets(columns, np.array(list(samples), np.int64))

    def insert(self, level: int, buckets: Buckets) -> None:
        """Add buckets to a level."""
        starts, ends = buckets.first_steps.tolist(), buckets.last_steps.tolist()
        spans = [
            self.keys | {"level": level, "step": start, "last_step": end, "attempt": 0, "at": 0.0}
            for start, end in zip(starts, ends, strict=True)
        ]
        self.connection.execute(_insert_spans, spans)
        self._insert_rollups(level, buckets)

    def delete(self, level: int, first: int, last: int) -> None:
        """Delete the buckets of a level above 0 that begin in a range."""
        self.execute(_delete_spans, level=level, first=first, last=last)
        self.execute(_delete_rollups, level=level, first=first, last=last)

    def replace(self, level: int, first: int, bucket: Buckets) -> None:
        """Put one bucket in the place of the one that begins at ``first``; its time stays."""
        steps = {"step": int(bucket.first_steps[0]), "last_step": int(bucket.last_steps[0])}
        span = self.table.c
        mine = (span.run == self.keys["run"], span.level == level, span.step == first)
        self.connection.execute(sa.update(self.table).where(*mine).values(steps))
        self.execute(_delete_rollups, level=level, first=first, last=first)
        self._insert_rollups(level, bucket)

    def _stored_names(self) -> tuple[Statistic, ...]:
        parts = {"grad_norm", "weight_norm"} if "ratio" in self._names else set()
        return tuple(name for name in STATISTICS if name in parts or name in self._names)

    def _load_samples(self, first: int, last: int) -> Buckets:
        stored, most = self._stored_names(), chunk_count(last - first, self._stored_width)
        statement = _select_samples(self.connection.dialect.name, stored, self._only, most > 1)
        within = {"level": 0, "first": first, "last": last, "chunks": most}
        found = read_vectors(self.connection, statement, self.parameters | within)
        if not found:
            return self._no_buckets()
        steps, columns = found[""]
        return self._buckets(dict(zip(stored, columns, strict=True)), steps)

    def _buckets(self, columns: dict[str, Rows], steps: NDArray[np.int64]) -> Buckets:
        """Return the buckets of level 0 of stored vectors, by statistic: a single statistic has to be there."""
        if not all(isinstance(vectors, np.ndarray) for vectors in columns.values()):
            enough = all if len(self._names) == 1 else any
            rows = zip(*columns.values(), strict=True)
            kept = [place for place, row in enumerate(rows) if enough(vector is not None for vector in row)]
            columns = {name: [vectors[place] for place in kept] for name, vectors in columns.items()}
            steps = steps[kept]
        planes: dict[str, Floats] = {
            name: self._chosen(stacked(vectors, self._stored_width)) for name, vectors in columns.items()
        }
        if "ratio" in self._names:
            planes["ratio"] = ratio(planes["grad_norm"], planes["weight_norm"])
        mine = [planes[name] for name in self._names]
        values = mine[0] if len(mine) == 1 else np.concatenate(mine, axis=1)
        return Buckets.of_samples(steps, values, means="mean" in self._planes)

    def _chosen(self, rows: NDArray[Any]) -> NDArray[Any]:
        return rows if self._columns is None else rows[:, self._columns]

    def _no_buckets(self) -> Buckets:
        values = np.empty((0, len(self._names) * self._width), np.float32)
        return Buckets.of_samples(np.empty(0, np.int64), values, means="mean" in self._planes)

    def _load_rollups(self, level: int, first: int, last: int) -> Buckets:
        # 1. The spans of the buckets.
        rows = self.execute(_select_spans, level=level, first=first, last=last).all()
        if not rows:
            return self._no_buckets()
        steps, last_steps = (np.array(column, np.int64) for column in zip(*rows, strict=True))
        # 2. The planes of each statistic.
        most, several = chunk_count(len(steps), self._stored_width), len(self._names) > 1
        statement = _select_rollups(self.connection.dialect.name, self._planes, self._only, most > 1, several)
        level_of = {**self.parameters, "level": level, "names": self._names}
        with reading_ahead(self.connection, _touch_rollups, level_of, steps):
            within = {"first": int(steps[0]), "last": int(steps[-1]), "chunks": most}
            found = read_vectors(self.connection, statement, level_of | within)
        # 3. The planes of all statistics, side by side.
        nothing = VectorColumns(np.empty(0, np.int64), [[] for _ in self._planes])
        parts = [self._unpack_planes(steps, found.get(name, nothing)) for name in self._names]
        planes = [np.concatenate(plane, axis=1) if len(plane) > 1 else plane[0] for plane in zip(*parts, strict=True)]
        return Buckets(steps, last_steps, *planes)

    def _unpack_planes(self, steps: NDArray[np.int64], found: VectorColumns) -> list[NDArray[Any]]:
        """Return low, high, mean, last and both counts of one statistic, each of shape (steps, parameters)."""
        columns = dict(zip(self._planes, found.columns, strict=True))
        lengths = [0 if vector is None else len(vector) for vector in columns["last"]]
        planes: dict[str, NDArray[Any]] = {}
        for name, vectors in columns.items():
            width, counts = self._stored_width, name in COUNT_PLANES
            rows = stacked_counts(vectors, lengths, width, self._only) if counts else stacked(vectors, width)
            planes[name] = self._chosen(rows)
        if len(found.steps) != len(steps):
            at = np.searchsorted(steps, found.steps)
            planes = {name: self._spread(name, part, at, len(steps)) for name, part in planes.items()}
        return [planes[name] if name in planes else np.empty((len(steps), 0), np.float32) for name in PLANES]

    def _spread(self, name: str, part: NDArray[Any], at: NDArray[np.intp], steps: int) -> NDArray[Any]:
        """Return a plane over all steps: in the buckets that are not in ``at``, the statistic was not measured."""
        shape = steps, self._width
        whole = np.zeros(shape, np.int64) if name in COUNT_PLANES else np.full(shape, MISSING, np.float32)
        if name == "nonfinite" and len(self._names) == 1:
            whole[:] = UNMEASURED
        whole[at] = part
        return whole

    def _insert_rollups(self, level: int, buckets: Buckets) -> None:
        starts, width = buckets.first_steps.tolist(), self._stored_width
        rows = [
            {**self.keys, "statistic": name, "level": level, "step": start}
            | {
                plane: compact_counts(getattr(buckets, plane)[row, place * width : (place + 1) * width])
                for plane in PLANES
            }
            for place, name in enumerate(self._names)
            for row, start in enumerate(starts)
        ]
        self.connection.execute(_insert_rollups, rows)


class ScalarSeries(LevelRows):
    """One scalar of the run, such as the loss, at every step: buckets have one column, of float64."""

    fan_outs = (64, 4)
    table = schema.scalars

    def __init__(self, connection: sa.Connection, run_id: str, name: str) -> None:
        super().__init__(connection, run=run_id, name=name)

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level; of a step that was sent more than once, the newest value counts."""
        return self._load_trail(first, last) if level == 0 else self._load_rollups(level, first, last)

    def insert(self, level: int, buckets: Buckets) -> None:
        """Add buckets to a level."""
        planes = {name: getattr(buckets, name)[:, 0].tolist() for name in PLANES}
        columns = {"step": buckets.first_steps.tolist(), "last_step": buckets.last_steps.tolist(), **planes}
        rows = [
            self.keys | {"level": level} | {name: _nan_as_none(column[row]) for name, column in columns.items()}
            for row in range(len(buckets))
        ]
        self.connection.execute(_insert_scalars, rows)

    def delete(self, level: int, first: int, last: int) -> None:
        """Delete the buckets of a level above 0 that begin in a range."""
        self.execute(_delete_scalars, level=level, first=first, last=last)

    def replace(self, level: int, first: int, bucket: Buckets) -> None:
        """Put one bucket in the place of the one that begins at ``first``."""
        self.delete(level, first, first)
        self.insert(level, bucket)

    def _load_trail(self, first: int, last: int) -> Buckets:
        found: dict[int, float] = {}
        for trails in load_trails(self.connection, self.keys["run"], first, last):
            trail = trails.get(self.keys["name"])
            pairs = [] if trail is None else zip(trail.steps, trail.values, strict=True)
            found |= {step: deserialise(value) for step, value in pairs if first <= step <= last}
        steps = np.array(sorted(found), np.int64)
        values = np.array([found[step] for step in steps.tolist()], np.float64)
        return Buckets.of_samples(steps, values[:, None], missing=None)

    def _load_rollups(self, level: int, first: int, last: int) -> Buckets:
        rows = self.execute(_select_scalars, level=level, first=first, last=last).all()
        columns = list(zip(*rows, strict=True)) or [()] * 8
        steps, last_steps = np.array(columns[0], np.int64), np.array(columns[1], np.int64)
        kinds = [np.int64 if name in COUNT_PLANES else np.float64 for name in PLANES]
        planes: list[NDArray[Any]] = [np.array(*pair)[:, None] for pair in zip(columns[2:], kinds, strict=True)]
        return Buckets(steps, last_steps, *planes)


def _nan_as_none(value: float) -> float | None:
    return None if value != value else value


def load_trails(connection: sa.Connection, run_id: str, first: int, last: int) -> list[dict[str, Trail]]:
    """Return the trails that may hold steps of a range, the newest last."""
    table = schema.trails
    rows = connection.execute(
        sa.select(table.c.scalars)
        .where(table.c.run == run_id, table.c.first_step > first - TRAIL_STEPS, table.c.first_step <= last)
        .order_by(table.c.attempt, table.c.arrival, table.c.first_step)
    )
    return [decode_trails.decode(body) for (body,) in rows]


# Statements are made once: building one takes SQLAlchemy as long as PostgreSQL needs for a small one.
_named = schema.rollups.c.statistic.in_(sa.bindparam("names", expanding=True))


@lru_cache(256)
def _select_samples(engine: str, names: Sequence[str], only: int | None, divided: bool) -> sa.Select[Any]:
    table = schema.samples
    vectors = [select_bytes(table, name, engine, only) for name in names]
    one = sa.literal_column("''", sa.Text).label("statistic")
    chosen = sa.select(one, table.c.step, *vectors).where(*within(table)).order_by(table.c.step)
    ends = sa.select(sa.func.min(table.c.step), sa.func.max(table.c.step) + 1).where(*within(table))
    return select_vectors(chosen, engine, divided=ends if divided else None, several=False)


@lru_cache(256)
def _select_rollups(
    engine: str, planes: Sequence[str], only: int | None, divided: bool, several: bool
) -> sa.Select[Any]:
    table = schema.rollups
    vectors = [select_bytes(table, name, engine, None if name in COUNT_PLANES else only) for name in planes]
    chosen = sa.select(table.c.statistic, table.c.step, *vectors).where(*within(table), _named)
    first, last = (sa.bindparam(name, type_=sa.BigInteger) for name in ("first", "last"))
    ends: list[sa.ColumnElement[Any]] = [first.label("begin"), (last + 1).label("end")]
    ordered = chosen.order_by(table.c.statistic, table.c.step)
    return select_vectors(ordered, engine, divided=sa.select(*ends) if divided else None, several=several)


_select_spans = (
    sa.select(*schema.samples.c["step", "last_step"])
    .where(*within(schema.samples), schema.samples.c.level > sa.literal_column("0"))  # as SQLite's index says it
    .order_by(schema.samples.c.step)
)
_select_scalars = (
    sa.select(*schema.scalars.c["step", "last_step", *PLANES])
    .where(*within(schema.scalars))
    .order_by(schema.scalars.c.step)
)
_touch_rollups = sa.select(sa.func.max(schema.rollups.c.nonfinite)).where(*within(schema.rollups), _named)
"""Reads the last column, and thereby all columns before it."""
_insert_spans = sa.insert(schema.samples)
_insert_rollups = sa.insert(schema.rollups)
_insert_scalars = sa.insert(schema.scalars)
_delete_spans = sa.delete(schema.samples).where(*within(schema.samples))
_delete_rollups = sa.delete(schema.rollups).where(
    *within(schema.rollups), schema.rollups.c.statistic.in_(STATISTIC_NAMES)
)
_delete_scalars = sa.delete(schema.scalars).where(*within(schema.scalars))
