"""What fades: the finer levels of old samples, a little at a time, while the coarser ones keep a run's history.

A level goes only as far as whole buckets of the next one reach, so the coarsest level of a run never goes. A run's
first and newest samples stay as they were measured: the diagnosis goes on from them when a server starts.
"""

from typing import Any, NamedTuple

import sqlalchemy as sa

from gradwatch_server.store import schema
from gradwatch_server.store.retention import Retention
from gradwatch_server.store.rollups.levels import pruned_to
from gradwatch_server.store.rollups.series import STATISTIC_NAMES

REPLAYED_FIRST_SAMPLES = 16
"""First samples of a run that are never removed: its later samples are compared with how it began."""
REPLAYED_LAST_SAMPLES = 112
"""Newest samples of a run that are never removed: the diagnosis replays them when a server starts."""
_BUCKETS_AT_ONCE = 8
"""Buckets whose parts go in one transaction: of samples up to 31 each."""


class Piece(NamedTuple):
    """A level of a run that has something to lose: what was measured before a time."""

    run_id: str
    level: int
    before: float


class Faded(NamedTuple):
    """What went: samples as they were measured, and buckets of them."""

    samples: int = 0
    buckets: int = 0

    def __bool__(self) -> bool:
        return bool(self.samples or self.buckets)


class _Span(NamedTuple):
    start: int
    end: int
    at: float
    """Time of the newest sample in it."""


def overdue(connection: sa.Connection, retention: Retention, now: float) -> list[Piece]:
    """Return the levels of which something is over its time; a coarser one only once the finer one has gone."""
    if not retention.level_days and not retention.project_level_days:
        return []
    runs = connection.execute(sa.select(*schema.runs.c["id", "project", "coverage"])).all()
    pieces = [
        Piece(run.id, level, now - 86_400 * days)
        for run in runs
        for level, days in enumerate(retention.levels_of(run.project))
    ]
    coverage = {run.id: run.coverage for run in runs}
    return [piece for piece in pieces if _due(connection, piece, coverage[piece.run_id])]


def fade(connection: sa.Connection, piece: Piece) -> Faded:
    """Remove a little of what is over its time; return what went, nothing where nothing is left to do."""
    table = schema.runs
    mine = table.c.id == piece.run_id
    coverage = connection.execute(sa.select(table.c.coverage).where(mine).with_for_update()).scalar()
    if coverage is None or not (spans := _due(connection, piece, coverage)):
        return Faded()
    _stamp(connection, piece, spans)
    count = _remove(connection, piece, spans[-1].end)
    pruned = list(coverage.get("pruned", []))
    pruned[piece.level : piece.level + 1] = [spans[-1].end]
    connection.execute(sa.update(table).where(mine).values(coverage=coverage | {"pruned": pruned}))
    return Faded(buckets=count) if piece.level else Faded(samples=count)


def _due(connection: sa.Connection, piece: Piece, coverage: dict[str, Any]) -> list[_Span]:
    """Return the next buckets of the level above whose parts are over their time."""
    gone = pruned_to(coverage.get("pruned", []), piece.level)
    limit = _limit(connection, piece, coverage)
    if limit <= gone or piece.level >= len(coverage.get("samples", [])):
        return []
    table = schema.samples
    above = connection.execute(
        sa.select(*table.c["step", "last_step"])
        .where(table.c.run == piece.run_id, table.c.level == piece.level + 1, table.c.step.between(gone + 1, limit))
        .order_by(table.c.step)
        .limit(_BUCKETS_AT_ONCE)
    ).all()
    whole = [row for row in above if row.last_step <= limit]
    if not whole:
        return []
    within = table.c.step.between(whole[0].step, whole[-1].last_step)
    parts = connection.execute(
        sa.select(*table.c["step", "at"]).where(table.c.run == piece.run_id, table.c.level == piece.level, within)
    ).all()
    spans = []
    for start, end in whole:
        newest = max((part.at for part in parts if start <= part.step <= end), default=0.0)
        if newest >= piece.before:
            break
        spans.append(_Span(start, end, newest))
    return spans


def _limit(connection: sa.Connection, piece: Piece, coverage: dict[str, Any]) -> int:
    """Return the last step that may go: no newest sample, and no bucket before the ones that it was gathered from."""
    if piece.level:
        return pruned_to(coverage.get("pruned", []), piece.level - 1)
    table = schema.samples
    newest = sa.select(table.c.step).where(table.c.run == piece.run_id, table.c.level == 0)
    kept = newest.order_by(table.c.step.desc()).offset(REPLAYED_LAST_SAMPLES - 1).limit(1)
    first = connection.execute(kept).scalar()
    return -1 if first is None else int(first) - 1


def _stamp(connection: sa.Connection, piece: Piece, spans: list[_Span]) -> None:
    """Give buckets the time of their newest sample, before that sample goes."""
    table = schema.samples
    mine = (table.c.run == piece.run_id, table.c.level == piece.level + 1, table.c.step == sa.bindparam("start"))
    rows = [{"start": span.start, "newest": span.at} for span in spans]
    connection.execute(sa.update(table).where(*mine).values(at=sa.bindparam("newest")), rows)


def _remove(connection: sa.Connection, piece: Piece, end: int) -> int:
    """Remove the rows of a level up to a step, the first samples of a run excepted; return how many went."""
    samples, rollups = schema.samples, schema.rollups
    mine = (samples.c.run == piece.run_id, samples.c.level == piece.level)
    if piece.level:
        theirs = (rollups.c.run == piece.run_id, rollups.c.level == piece.level, rollups.c.step <= end)
        connection.execute(sa.delete(rollups).where(*theirs, rollups.c.statistic.in_(STATISTIC_NAMES)))
        return connection.execute(sa.delete(samples).where(*mine, samples.c.step <= end)).rowcount
    first = sa.select(samples.c.step).where(*mine).order_by(samples.c.step).limit(REPLAYED_FIRST_SAMPLES)
    kept = connection.execute(first).scalars().all()[-1]
    return connection.execute(sa.delete(samples).where(*mine, samples.c.step > kept, samples.c.step <= end)).rowcount
