"""Deletes the finer levels of old samples, in bounded transactions, while the coarser levels keep a run's history.

A level is deleted only as far as whole buckets of the next level reach, so the coarsest level of a run always stays. A
run's first and newest samples stay as they were measured: the detectors replay them when a server starts.
"""

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa

from gradwatch_server import steady_clock
from gradwatch_server.store import schema
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.rollups.levels import pruned_to
from gradwatch_server.store.rollups.retention import Retention
from gradwatch_server.store.rollups.series import STATISTIC_NAMES

REPLAYED_FIRST_SAMPLES = 16
"""First samples of a run that are never deleted: its later samples are compared with how it began."""
REPLAYED_LAST_SAMPLES = 112
"""Newest samples of a run that are never deleted: the detectors replay them when a server starts."""
_BUCKETS_AT_ONCE = 8
"""Buckets whose parts are deleted in one transaction: up to 31 samples each."""


class ExpiredLevel(NamedTuple):
    """A level of a run, and the time in Unix seconds before which its rows have expired."""

    run_id: str
    level: int
    before: float


@dataclass
class Downsampled:
    """How many rows were deleted, and of which runs."""

    samples: int = 0
    buckets: int = 0
    run_ids: set[str] = field(default_factory=set)

    def add(self, expired: ExpiredLevel, rows: int) -> None:
        """Count deleted rows."""
        self.run_ids.add(expired.run_id)
        if expired.level:
            self.buckets += rows
        else:
            self.samples += rows


class _Span(NamedTuple):
    """The steps of a bucket, and the time of the newest sample in it."""

    start: int
    end: int
    at: float


async def downsample_expired(engine: sa.Engine, writer: Writer, retention: Retention) -> Downsampled:
    """Delete the rows of all levels that have expired."""
    deleted = Downsampled()
    while levels := await asyncio.to_thread(expired_levels, engine, retention, steady_clock.now()):
        for level in levels:
            work = partial(downsample_chunk, expired=level)
            while rows := await asyncio.wrap_future(writer.submit(work, level.run_id)):
                deleted.add(level, rows)
    return deleted


def expired_levels(engine: sa.Engine, retention: Retention, now: float) -> list[ExpiredLevel]:
    """Return the levels that hold expired rows; a coarser level follows once the finer one is deleted."""
    if not retention.level_days and not retention.project_level_days:
        return []
    with engine.connect() as connection:
        runs = connection.execute(sa.select(*schema.runs.c["id", "project", "coverage"])).all()
        return [
            expired
            for run in runs
            for level, days in enumerate(retention.levels_of(run.project))
            if _expired_spans(connection, expired := ExpiredLevel(run.id, level, now - 86_400 * days), run.coverage)
        ]


def downsample_chunk(connection: sa.Connection, expired: ExpiredLevel) -> int:
    """Delete some expired rows of a level; return how many, 0 if there are none left."""
    table = schema.runs
    mine = table.c.id == expired.run_id
    coverage = connection.execute(sa.select(table.c.coverage).where(mine).with_for_update()).scalar()
    if coverage is None or not (spans := _expired_spans(connection, expired, coverage)):
        return 0
    _set_times(connection, expired, spans)
    count = _delete_level(connection, expired, spans[-1].end)
    pruned = list(coverage.get("pruned", []))
    pruned[expired.level : expired.level + 1] = [spans[-1].end]
    connection.execute(sa.update(table).where(mine).values(coverage=coverage | {"pruned": pruned}))
    return count


def _expired_spans(connection: sa.Connection, expired: ExpiredLevel, coverage: dict[str, Any]) -> list[_Span]:
    """Return the next buckets of the level above whose parts have all expired."""
    gone = pruned_to(coverage.get("pruned", []), expired.level)
    limit = _last_deletable(connection, expired, coverage)
    if limit <= gone or expired.level >= len(coverage.get("samples", [])):
        return []
    # 1. The buckets of the level above that lie wholly within what may be deleted.
    table = schema.samples
    mine = table.c.run == expired.run_id
    above = sa.select(*table.c["step", "last_step"]).where(
        mine, table.c.level == expired.level + 1, table.c.step.between(gone + 1, limit)
    )
    buckets = connection.execute(above.order_by(table.c.step).limit(_BUCKETS_AT_ONCE)).all()
    whole = [bucket for bucket in buckets if bucket.last_step <= limit]
    if not whole:
        return []
    # 2. The times of their parts: a bucket expires with the newest of them.
    within = table.c.step.between(whole[0].step, whole[-1].last_step)
    times = sa.select(*table.c["step", "at"]).where(mine, table.c.level == expired.level, within)
    parts = connection.execute(times).all()
    spans = []
    for start, end in whole:
        newest = max((part.at for part in parts if start <= part.step <= end), default=0.0)
        if newest >= expired.before:
            break
        spans.append(_Span(start, end, newest))
    return spans


def _last_deletable(connection: sa.Connection, expired: ExpiredLevel, coverage: dict[str, Any]) -> int:
    """Return the last step that may be deleted of a level.

    The newest samples stay, and a bucket stays until the rows that it was made of are deleted.
    """
    if expired.level:
        return pruned_to(coverage.get("pruned", []), expired.level - 1)
    table = schema.samples
    newest = sa.select(table.c.step).where(table.c.run == expired.run_id, table.c.level == 0)
    kept = newest.order_by(table.c.step.desc()).offset(REPLAYED_LAST_SAMPLES - 1).limit(1)
    first = connection.execute(kept).scalar()
    return -1 if first is None else int(first) - 1


def _set_times(connection: sa.Connection, expired: ExpiredLevel, spans: list[_Span]) -> None:
    """Give buckets of the level above the time of their newest sample, before that sample is deleted."""
    table = schema.samples
    mine = (table.c.run == expired.run_id, table.c.level == expired.level + 1, table.c.step == sa.bindparam("start"))
    rows = [{"start": span.start, "newest": span.at} for span in spans]
    connection.execute(sa.update(table).where(*mine).values(at=sa.bindparam("newest")), rows)


def _delete_level(connection: sa.Connection, expired: ExpiredLevel, end: int) -> int:
    """Delete the rows of a level up to a step, except for the first samples of the run; return how many."""
    samples, rollups = schema.samples, schema.rollups
    mine = (samples.c.run == expired.run_id, samples.c.level == expired.level)
    if expired.level:
        theirs = (rollups.c.run == expired.run_id, rollups.c.level == expired.level, rollups.c.step <= end)
        connection.execute(sa.delete(rollups).where(*theirs, rollups.c.statistic.in_(STATISTIC_NAMES)))
        return connection.execute(sa.delete(samples).where(*mine, samples.c.step <= end)).rowcount
    first = sa.select(samples.c.step).where(*mine).order_by(samples.c.step).limit(REPLAYED_FIRST_SAMPLES)
    kept = connection.execute(first).scalars().all()[-1]
    return connection.execute(sa.delete(samples).where(*mine, samples.c.step > kept, samples.c.step <= end)).rowcount
