"""Queries that all series have in common: which rows of a level there are, and where they begin."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch.wire import LARGEST_STEP


class LevelRows:
    """Queries that all series have in common: each row is of one level and begins at one step."""

    table: ClassVar[sa.Table]

    def __init__(self, connection: sa.Connection, **keys: str) -> None:
        """Choose the rows whose columns equal ``keys``."""
        self.connection = connection
        self.keys = keys
        self.parameters = {f"of_{name}": value for name, value in keys.items()}

    @property
    def width(self) -> int:
        """Return the number of values in a plane of one bucket."""
        return 1

    def execute(self, statement: sa.Executable, **parameters: object) -> sa.CursorResult[Any]:
        """Execute a statement on the rows of this series."""
        return self.connection.execute(statement, {**self.parameters, **parameters})

    def counts(self, levels: Sequence[int], first: int, last: int, most: int) -> Sequence[int]:
        """Return how many buckets of each of these levels begin in a range, counting no further than ``most``."""
        return tuple(self.execute(_counting(self.table, tuple(levels)), first=first, last=last, most=most).one())

    def starts(self, level: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the first steps of the buckets of a level that begin in a range, ascending."""
        found = self.execute(_starts(self.table), level=level, first=first, last=last).scalars()
        return np.array(list(found), np.int64)

    def end(self, level: int) -> int:
        """Return the last step that the buckets of a level reach; -1 if there is no bucket."""
        found = self.execute(_last_bucket(self.table), level=level).scalar()
        return -1 if found is None else int(found)

    def around(self, level: int, step: int) -> tuple[int, int]:
        """Return the first step of the bucket that ``step`` falls into, and the last one before the next bucket."""
        before, first, after = _neighbours(self.table)
        start = self.execute(before, level=level, at=step).scalar()
        if start is None and (start := self.execute(first, level=level).scalar_one()) is None:
            return LARGEST_STEP, LARGEST_STEP
        following = self.execute(after, level=level, at=max(step, start)).scalar()
        return start, LARGEST_STEP if following is None else following - 1


# Statements are made once: building one takes SQLAlchemy as long as PostgreSQL needs for a small one.
_level: sa.ColumnElement[int] = sa.bindparam("level")


def of_level(table: sa.Table, level: sa.ColumnElement[int] = _level) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that choose the rows of one level of a series."""
    keys = [name for name in ("run", "name") if name in table.c]
    return [*(table.c[name] == sa.bindparam(f"of_{name}") for name in keys), table.c.level == level]


def within(table: sa.Table, level: sa.ColumnElement[int] = _level) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that choose the rows of one level that begin in a range."""
    return [*of_level(table, level), table.c.step.between(sa.bindparam("first"), sa.bindparam("last"))]


@lru_cache(64)
def _counting(table: sa.Table, levels: Sequence[int]) -> sa.Select[Any]:
    """Return the statement that counts the buckets of several levels at once, a column for each level."""

    def counted(level: int) -> sa.ScalarSelect[int]:
        mine = within(table, sa.literal_column(str(level), sa.SmallInteger))
        few = sa.select(table.c.step).where(*mine).limit(sa.bindparam("most")).subquery()
        return sa.select(sa.func.count()).select_from(few).scalar_subquery()

    columns: list[sa.ColumnElement[Any]] = [counted(level).label(f"level_{level}") for level in levels]
    return sa.select(*columns)


@cache
def _starts(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table.c.step).where(*within(table)).order_by(table.c.step)


@cache
def _last_bucket(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table.c.last_step).where(*of_level(table)).order_by(table.c.step.desc()).limit(1)


@cache
def _neighbours(table: sa.Table) -> tuple[sa.Select[Any], sa.Select[Any], sa.Select[Any]]:
    """Return statements for the last bucket that begins up to a step, the first of all, and the first after it."""
    at: sa.BindParameter[int] = sa.bindparam("at")
    return (
        sa.select(sa.func.max(table.c.step)).where(*of_level(table), table.c.step <= at),
        sa.select(sa.func.min(table.c.step)).where(*of_level(table)),
        sa.select(sa.func.min(table.c.step)).where(*of_level(table), table.c.step > at),
    )
