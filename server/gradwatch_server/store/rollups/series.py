"""The rows behind the levels: samples and their roll-ups, scalars of every step and theirs.

The time of a bucket of samples is 0 until the level below it fades; from then on it is that of its newest sample.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch.statistics import UNIT_EPS
from gradwatch.wire import LARGEST_STEP, MISSING, STATISTICS, Statistic, Trail, Vector, deserialise
from gradwatch_server.store import schema
from gradwatch_server.store.rollups.buckets import UNMEASURED, Buckets, Floats
from gradwatch_server.store.rollups.readahead import reading_ahead
from gradwatch_server.store.vectors import Gathered, Rows, gathered, raw, read, stretches

STATISTIC_NAMES = (*STATISTICS, "ratio")
TRAIL_STEPS = 4_096
"""A row of a trail stays within one such stretch of steps, so that a range of steps is a range of keys."""

_PLANES = ("low", "high", "mean", "last", "finite", "nonfinite")
_COUNTS = ("finite", "nonfinite")
_decode_trails = msgspec.msgpack.Decoder(dict[str, Trail])


def ratio(grad_norm: NDArray[np.float32], weight_norm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``grad_norm / (weight_norm + eps)``; missing where the gradient is missing."""
    with np.errstate(invalid="ignore", over="ignore"):
        divided = weight_norm + np.float32(UNIT_EPS)
        np.divide(grad_norm, divided, out=divided)
    missing = grad_norm == MISSING
    missing |= weight_norm == MISSING
    if missing.any():
        divided[missing] = MISSING
    return divided


def measured(statistics: Sequence[str]) -> list[str]:
    """Return what can be read of a run that measures these: the ratio where both of its parts are there."""
    both = "grad_norm" in statistics and "weight_norm" in statistics
    return [*statistics, "ratio"] if both else list(statistics)


class SampleLane:
    """The statistics of a run's parameters, side by side: buckets have statistics x parameters columns."""

    fan_outs = (16, 4)

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
        """Read only some of the parameters, in this order, where ``columns`` names them; the means where asked for."""
        self._connection = connection
        self._run = run_id
        self._mine = {"of_run": run_id}
        self._read = _PLANES if means else tuple(name for name in _PLANES if name != "mean")
        self._names = list(names)
        self._only = columns[0] if columns is not None and len(columns) == 1 else None
        self._width = parameter_count if self._only is None else 1
        whole = columns is None or self._only is not None or list(columns) == list(range(parameter_count))
        self._columns = None if whole else columns
        self._read_width = parameter_count if columns is None else len(columns)

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level; at level 0 those samples in which any of the statistics was measured.

        Above it, where only one is read, a bucket in which it was not measured is marked as ``UNMEASURED``.
        """
        return self._samples(first, last) if level == 0 else self._rollups(level, first, last)

    def _samples(self, first: int, last: int) -> Buckets:
        stored = tuple(name for name in STATISTICS if name in self._needed())
        most = stretches(last - first, self._width)
        statement = _samples_of(self._connection.dialect.name, stored, self._only, most > 1)
        within = {"level": 0, "first": first, "last": last, "stretches": most}
        found = read(self._connection, statement, self._mine | within)
        if not found:
            return self._nothing()
        steps, columns = found[""]
        return self._measured(dict(zip(stored, columns, strict=True)), steps)

    def of_samples(self, samples: Mapping[int, Mapping[Statistic, Vector]]) -> Buckets:
        """Return the buckets of level 0 that these statistics make, by their steps in ascending order."""
        stored = [name for name in STATISTICS if name in self._needed()]
        columns: dict[str, Rows] = {name: [statistics.get(name) for statistics in samples.values()] for name in stored}
        return self._measured(columns, np.array(list(samples), np.int64))

    def _measured(self, columns: dict[str, Rows], steps: NDArray[np.int64]) -> Buckets:
        if not all(isinstance(vectors, np.ndarray) for vectors in columns.values()):
            enough = all if len(self._names) == 1 else any
            rows = zip(*columns.values(), strict=True)
            kept = [place for place, row in enumerate(rows) if enough(vector is not None for vector in row)]
            columns = {name: [vectors[place] for place in kept] for name, vectors in columns.items()}
            steps = steps[kept]
        planes: dict[str, Floats] = {
            name: self._chosen(_stacked(vectors, self._width)) for name, vectors in columns.items()
        }
        if "ratio" in self._names:
            planes["ratio"] = ratio(planes["grad_norm"], planes["weight_norm"])
        mine = [planes[name] for name in self._names]
        values = mine[0] if len(mine) == 1 else np.concatenate(mine, axis=1)
        return Buckets.of_samples(steps, values, means="mean" in self._read)

    def _chosen(self, rows: NDArray[Any]) -> NDArray[Any]:
        return rows if self._columns is None else rows[:, self._columns]

    def _needed(self) -> set[str]:
        parts = {"grad_norm", "weight_norm"} if "ratio" in self._names else set()
        return parts | set(self._names)

    def _rollups(self, level: int, first: int, last: int) -> Buckets:
        steps, last_steps = self._spans(level, first, last)
        if not len(steps):
            return self._nothing()
        most = stretches(len(steps), self._width)
        engine, several = self._connection.dialect.name, len(self._names) > 1
        statement = _rollups_of(engine, self._read, self._only, most > 1, several)
        level_of = self._mine | {"level": level, "names": self._names}
        with reading_ahead(self._connection, _touching, level_of, steps):
            within = {"first": int(steps[0]), "last": int(steps[-1]), "stretches": most}
            found = read(self._connection, statement, level_of | within)
        nothing = Gathered(np.empty(0, np.int64), [[] for _ in self._read])
        parts = [self._planes(steps, found.get(name, nothing)) for name in self._names]
        planes = [np.concatenate(plane, axis=1) if len(plane) > 1 else plane[0] for plane in zip(*parts, strict=True)]
        return Buckets(steps, last_steps, *planes)

    def _planes(self, steps: NDArray[np.int64], found: Gathered) -> list[NDArray[Any]]:
        """Return low, high, mean, last and both counts of one statistic, each of shape (steps, parameters)."""
        columns = dict(zip(self._read, found.columns, strict=True))
        known = [0 if vector is None else len(vector) for vector in columns["last"]]
        planes: dict[str, NDArray[Any]] = {}
        for name, vectors in columns.items():
            if name not in _COUNTS:
                planes[name] = self._chosen(_stacked(vectors, self._width))
                continue
            counts = vectors
            if self._only is not None:
                counts = [one if one is None or len(one) == 1 else one[self._only :][:1] for one in counts]
            planes[name] = self._chosen(_counts(counts, known, self._width))
        if len(found.steps) != len(steps):
            at = np.searchsorted(steps, found.steps)
            for name, part in planes.items():
                shape = len(steps), self._read_width
                whole = np.zeros(shape, np.int64) if name in _COUNTS else np.full(shape, MISSING, np.float32)
                if name == "nonfinite" and len(self._names) == 1:
                    whole[:] = UNMEASURED
                whole[at] = part
                planes[name] = whole
        return [planes[name] if name in planes else np.empty((len(steps), 0), np.float32) for name in _PLANES]

    def _nothing(self) -> Buckets:
        values = np.empty((0, len(self._names) * self._read_width), np.float32)
        return Buckets.of_samples(np.empty(0, np.int64), values, means="mean" in self._read)

    def _spans(self, level: int, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first and the last steps of the buckets of a level that begin in a range."""
        rows = self._connection.execute(_spans, self._mine | {"level": level, "first": first, "last": last}).all()
        return np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], np.int64)

    def counts(self, levels: Sequence[int], first: int, last: int, most: int) -> Sequence[int]:
        """Return how many buckets of each of these levels begin in a range, counting no further than ``most``."""
        within = {"first": first, "last": last, "most": most}
        return tuple(self._connection.execute(_counting(schema.samples, tuple(levels)), self._mine | within).one())

    def insert(self, level: int, buckets: Buckets) -> None:
        """Add buckets to a level."""
        starts, ends = buckets.first_steps.tolist(), buckets.last_steps.tolist()
        spans = [
            {"run": self._run, "level": level, "step": start, "last_step": end, "attempt": 0, "at": 0.0}
            for start, end in zip(starts, ends, strict=True)
        ]
        self._connection.execute(_insert_spans, spans)
        self._insert_rollups(level, buckets)

    def _insert_rollups(self, level: int, buckets: Buckets) -> None:
        starts = buckets.first_steps.tolist()
        rows = [
            {"run": self._run, "statistic": name, "level": level, "step": start}
            | {plane: _packed(_part(getattr(buckets, plane)[row], place, self._width)) for plane in _PLANES}
            for place, name in enumerate(self._names)
            for row, start in enumerate(starts)
        ]
        self._connection.execute(_insert_rollups, rows)

    def delete(self, level: int, first: int, last: int) -> None:
        """Remove buckets of a level above 0."""
        for table in (schema.samples, schema.rollups):
            within = (table.c.run == self._run, table.c.level == level, table.c.step.between(first, last))
            named = (table.c.statistic.in_(STATISTIC_NAMES),) if table is schema.rollups else ()
            self._connection.execute(sa.delete(table).where(*within, *named))

    def replace(self, level: int, first: int, bucket: Buckets) -> None:
        """Put one bucket in the place of the one that begins at ``first``; its time stays."""
        spans, rollups = schema.samples, schema.rollups
        steps = {"step": int(bucket.first_steps[0]), "last_step": int(bucket.last_steps[0])}
        mine = (spans.c.run == self._run, spans.c.level == level, spans.c.step == first)
        self._connection.execute(sa.update(spans).where(*mine).values(steps))
        theirs = (rollups.c.run == self._run, rollups.c.level == level, rollups.c.step == first)
        self._connection.execute(sa.delete(rollups).where(*theirs, rollups.c.statistic.in_(STATISTIC_NAMES)))
        self._insert_rollups(level, bucket)

    def end(self, level: int) -> int:
        """Return the last step that the buckets of a level reach; -1 where there is none."""
        return _end(self._connection, schema.samples, self._mine, level)

    def around(self, level: int, step: int) -> tuple[int, int]:
        """Return the first step of the bucket that ``step`` falls into, and the last one before the next bucket."""
        return _around(self._connection, schema.samples, self._mine, level, step)


class ScalarLane:
    """One scalar of the run, such as the loss, at every step: buckets have one column, of float64."""

    fan_outs = (64, 4)

    def __init__(self, connection: sa.Connection, run_id: str, name: str) -> None:
        self._connection = connection
        self._run = run_id
        self._name = name
        self._mine = {"of_run": run_id, "of_name": name}

    def load(self, level: int, first: int, last: int) -> Buckets:
        """Return the buckets of a level; of a step that was sent more than once the newest value."""
        return self._trail(first, last) if level == 0 else self._rollups(level, first, last)

    def _trail(self, first: int, last: int) -> Buckets:
        found: dict[int, float] = {}
        for trails in load_trails(self._connection, self._run, first, last):
            trail = trails.get(self._name)
            if trail is not None:
                found |= {
                    step: deserialise(value)
                    for step, value in zip(trail.steps, trail.values, strict=True)
                    if first <= step <= last
                }
        steps = np.array(sorted(found), np.int64)
        values = np.array([found[step] for step in steps.tolist()], np.float64)
        return Buckets.of_samples(steps, values[:, None], missing=None)

    def _rollups(self, level: int, first: int, last: int) -> Buckets:
        within = {"level": level, "first": first, "last": last}
        rows = self._connection.execute(_scalars_of, self._mine | within).all()
        columns = list(zip(*rows, strict=True)) or [()] * 8
        steps, last_steps = np.array(columns[0], np.int64), np.array(columns[1], np.int64)
        floats: list[NDArray[Any]] = [np.array(column, np.float64)[:, None] for column in columns[2:6]]
        counts = [np.array(column, np.int64)[:, None] for column in columns[6:]]
        return Buckets(steps, last_steps, *floats, *counts)

    def counts(self, levels: Sequence[int], first: int, last: int, most: int) -> Sequence[int]:
        """Return how many buckets of each of these levels begin in a range, counting no further than ``most``."""
        within = {"first": first, "last": last, "most": most}
        return tuple(self._connection.execute(_counting(schema.scalars, tuple(levels)), self._mine | within).one())

    def insert(self, level: int, buckets: Buckets) -> None:
        """Add buckets to a level."""
        planes = {name: getattr(buckets, name)[:, 0].tolist() for name in _PLANES}
        steps = {"step": buckets.first_steps.tolist(), "last_step": buckets.last_steps.tolist()}
        listed = steps | planes
        rows = [
            {"run": self._run, "name": self._name, "level": level}
            | {name: _nan_as_none(column[row]) for name, column in listed.items()}
            for row in range(len(buckets))
        ]
        self._connection.execute(_insert_scalars, rows)

    def delete(self, level: int, first: int, last: int) -> None:
        """Remove buckets of a level above 0."""
        within = {"level": level, "first": first, "last": last}
        self._connection.execute(_delete_scalars, self._mine | within)

    def replace(self, level: int, first: int, bucket: Buckets) -> None:
        """Put one bucket in the place of the one that begins at ``first``."""
        self.delete(level, first, first)
        self.insert(level, bucket)

    def end(self, level: int) -> int:
        """Return the last step that the buckets of a level reach; -1 where there is none."""
        return _end(self._connection, schema.scalars, self._mine, level)

    def around(self, level: int, step: int) -> tuple[int, int]:
        """Return the first step of the bucket that ``step`` falls into, and the last one before the next bucket."""
        return _around(self._connection, schema.scalars, self._mine, level, step)


_level: sa.ColumnElement[int] = sa.bindparam("level")


def _own(table: sa.Table, level: sa.ColumnElement[int] = _level) -> list[sa.ColumnElement[bool]]:
    """Return what chooses the rows of one level of a lane."""
    keys = [name for name in ("run", "name") if name in table.c]
    chosen = [table.c[name] == sa.bindparam(f"of_{name}") for name in keys]
    return [*chosen, table.c.level == level]


def _within(table: sa.Table, level: sa.ColumnElement[int] = _level) -> list[sa.ColumnElement[bool]]:
    """Return what chooses those of them that begin in a range."""
    return [*_own(table, level), table.c.step.between(sa.bindparam("first"), sa.bindparam("last"))]


def _vector(table: sa.Table, name: str, engine: str, only: int | None) -> sa.ColumnElement[Any]:
    """Return a column of vectors; where one parameter is read, the database cuts it out: none where it is later."""
    if only is None:
        return raw(table.c[name], engine)
    column = f"{table.name}.{name}"
    cut = f"{column}[{only + 1}:{only + 1}]" if engine == "postgresql" else f"substr({column}, {4 * only + 1}, 4)"
    return raw(sa.literal_column(cut), engine)


# A statement is made once: to put one together takes SQLAlchemy as long as PostgreSQL takes for a small one.
@functools.lru_cache(256)
def _samples_of(engine: str, names: Sequence[str], only: int | None, divided: bool) -> sa.Select[Any]:
    table = schema.samples
    vectors = [_vector(table, name, engine, only) for name in names]
    one = sa.literal_column("''", sa.Text).label("statistic")
    chosen = sa.select(one, table.c.step, *vectors).where(*_within(table)).order_by(table.c.step)
    ends = sa.select(sa.func.min(table.c.step), sa.func.max(table.c.step) + 1).where(*_within(table))
    return gathered(chosen, engine, divided=ends if divided else None, several=False)


@functools.lru_cache(256)
def _rollups_of(engine: str, planes: Sequence[str], only: int | None, divided: bool, several: bool) -> sa.Select[Any]:
    table = schema.rollups
    vectors = [_vector(table, name, engine, None if name in _COUNTS else only) for name in planes]
    chosen = sa.select(table.c.statistic, table.c.step, *vectors).where(*_within(table), _named)
    first, last = (sa.bindparam(name, type_=sa.BigInteger) for name in ("first", "last"))
    ends: list[sa.ColumnElement[Any]] = [first.label("begin"), (last + 1).label("end")]
    ordered = chosen.order_by(table.c.statistic, table.c.step)
    return gathered(ordered, engine, divided=sa.select(*ends) if divided else None, several=several)


_named = schema.rollups.c.statistic.in_(sa.bindparam("names", expanding=True))
_touching = sa.select(sa.func.max(schema.rollups.c.nonfinite)).where(*_within(schema.rollups), _named)
"""The last column: all before it are read, too."""


@functools.lru_cache(64)
def _counting(table: sa.Table, levels: Sequence[int]) -> sa.Select[Any]:
    """Return what counts the buckets of several levels, a column each, in one go."""

    def counted(level: int) -> sa.ScalarSelect[int]:
        mine = _within(table, sa.literal_column(str(level), sa.SmallInteger))
        few = sa.select(table.c.step).where(*mine).limit(sa.bindparam("most")).subquery()
        return sa.select(sa.func.count()).select_from(few).scalar_subquery()

    columns: list[sa.ColumnElement[Any]] = [counted(level).label(f"level_{level}") for level in levels]
    return sa.select(*columns)


@functools.cache
def _newest(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table.c.last_step).where(*_own(table)).order_by(table.c.step.desc()).limit(1)


@functools.cache
def _neighbours(table: sa.Table) -> tuple[sa.Select[Any], sa.Select[Any], sa.Select[Any]]:
    at: sa.BindParameter[int] = sa.bindparam("at")
    return (
        sa.select(sa.func.max(table.c.step)).where(*_own(table), table.c.step <= at),
        sa.select(sa.func.min(table.c.step)).where(*_own(table)),
        sa.select(sa.func.min(table.c.step)).where(*_own(table), table.c.step > at),
    )


_spans = (
    sa.select(*schema.samples.c["step", "last_step"])
    .where(*_within(schema.samples), schema.samples.c.level > sa.literal_column("0"))  # as the index of SQLite says
    .order_by(schema.samples.c.step)
)
_scalars_of = (
    sa.select(*schema.scalars.c["step", "last_step", *_PLANES])
    .where(*_within(schema.scalars))
    .order_by(schema.scalars.c.step)
)
_delete_scalars = sa.delete(schema.scalars).where(*_within(schema.scalars))
_insert_spans = sa.insert(schema.samples)
_insert_rollups = sa.insert(schema.rollups)
_insert_scalars = sa.insert(schema.scalars)


def load_trails(connection: sa.Connection, run_id: str, first: int, last: int) -> list[dict[str, Trail]]:
    """Return the trails that may hold steps of a range, the newest last."""
    table = schema.trails
    rows = connection.execute(
        sa.select(table.c.scalars)
        .where(table.c.run == run_id, table.c.first_step > first - TRAIL_STEPS, table.c.first_step <= last)
        .order_by(table.c.attempt, table.c.arrival, table.c.first_step)
    )
    return [_decode_trails.decode(blob) for (blob,) in rows]


def _end(connection: sa.Connection, table: sa.Table, mine: Mapping[str, str], level: int) -> int:
    found = connection.execute(_newest(table), {**mine, "level": level}).scalar()
    return -1 if found is None else int(found)


def _around(
    connection: sa.Connection, table: sa.Table, mine: Mapping[str, str], level: int, step: int
) -> tuple[int, int]:
    before, first, after = _neighbours(table)
    own = {**mine, "level": level}
    start = connection.execute(before, own | {"at": step}).scalar()
    if start is None:
        start = connection.execute(first, own).scalar_one()
    if start is None:
        return LARGEST_STEP, LARGEST_STEP
    following = connection.execute(after, own | {"at": max(step, start)}).scalar()
    return start, LARGEST_STEP if following is None else following - 1


def _stacked(vectors: Rows, width: int) -> NDArray[Any]:
    """Return the vectors as rows; missing where there is none, or where it is from before the run gained parameters."""
    if isinstance(vectors, np.ndarray) and vectors.shape[1] == width:
        return vectors
    known = [vector for vector in vectors if vector is not None and len(vector) == width]
    if known and len(known) == len(vectors):
        return np.concatenate(known).reshape(len(known), width)
    rows = np.full((len(vectors), width), MISSING, np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        if vector is not None:
            row[: len(vector)] = vector
    return rows


def _counts(vectors: Rows, known: Sequence[int], width: int) -> NDArray[Any]:
    """Return stored counts as rows; one number stands for all parameters that the run had then, ``known`` of them."""
    if isinstance(vectors, np.ndarray) and vectors.shape[1] == 1 and min(known) == width:
        return np.repeat(vectors.astype(np.int64), width, axis=1)
    rows = np.zeros((len(vectors), width), np.int64)
    for row, vector, count in zip(rows, vectors, known, strict=True):
        row[:count] = vector
    return rows


def _part(row: NDArray[Any], place: int, width: int) -> NDArray[Any]:
    """Return the columns of one statistic among several, side by side."""
    return row[place * width : (place + 1) * width]


def _packed(vector: Floats | NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the vector as it is stored: counts that agree become one number."""
    if vector.dtype == np.int64 and len(vector) and (vector == vector[0]).all():
        vector = vector[:1]
    return vector.astype(np.float32, copy=False)


def _nan_as_none(value: float) -> float | None:
    return None if value != value else value
