"""What a batch leaves on disk: samples, trails and events, the levels above them, and what a new attempt replaces."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch import wire
from gradwatch.wire import LARGEST_STEP, STATISTICS, Trail
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.rollups.levels import Levels, pruned_to
from gradwatch_server.store.rollups.series import TRAIL_STEPS, SampleLane, ScalarLane, measured

_ATTEMPTS_KEPT = 100
"""Whose first steps are remembered apart; those of all before count as one."""

_decode_trails = msgspec.msgpack.Decoder(dict[str, Trail])


def insert_batch(
    connection: sa.Connection, run: sa.Row[Any], batch: wire.Batch, scalars: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    """Store the content of a batch, with its ``scalars_by_step``; return what changes in the run's row.

    An attempt wins from its first step on: what an older one has stored there goes, what it still sends is left out.
    """
    coverage = msgspec.json.decode(msgspec.json.encode(run.coverage))
    samples, trail = batch.samples, _with_samples(batch)
    begun = {int(attempt): step for attempt, step in run.first_steps.items()}
    end = min((step for attempt, step in begun.items() if attempt > batch.attempt), default=LARGEST_STEP)
    if end < LARGEST_STEP:
        samples = [sample for sample in samples if sample.step < end]
        trail = _between(trail, 0, end - 1)
    first = min([sample.step for sample in samples] + [min(scalar.steps) for scalar in trail.values()], default=end)
    if first < begun.get(batch.attempt, end):
        _supersede(connection, run, batch.attempt, first, begun, coverage)
        begun = _limiting(begun | {batch.attempt: first})
    used = {name for sample in samples for name in sample.statistics}
    statistics = [name for name in STATISTICS if name in used or name in run.statistics]
    if samples:
        _put_samples(connection, run.id, batch, samples, scalars)
    if trail:
        coverage["batches"] = coverage.get("batches", 0) + 1
        _put_trail(connection, run.id, batch, trail, coverage["batches"])
    if batch.events:
        rows = [{"run": run.id, **msgspec.structs.asdict(event)} for event in batch.events]
        connection.execute(_insert_events, rows)
    if used:
        lane = SampleLane(connection, run.id, measured(statistics), run.parameter_count)
        written = {sample.step: sample.statistics for sample in sorted(samples, key=lambda sample: sample.step)}
        levels = Levels(lane, coverage.setdefault("samples", []), coverage.get("pruned"))
        levels.add(written, lane.of_samples(written))
    for name, scalar in trail.items():
        levels = Levels(ScalarLane(connection, run.id, name), coverage.setdefault("scalars", {}).setdefault(name, []))
        levels.add(scalar.steps)
    told = {str(attempt): step for attempt, step in begun.items()}
    return {"first_steps": told, "statistics": statistics, "coverage": coverage}


def _limiting(begun: Mapping[int, int]) -> dict[int, int]:
    """Return the first steps of those attempts that no later one begins before, by attempt.

    Of many attempts the oldest count as one, which begins where the first of them does: what they still send is left
    out from there on, rather than mixed.
    """
    kept: dict[int, int] = {}
    least = LARGEST_STEP
    for attempt, step in sorted(begun.items(), reverse=True):
        if step < least:
            kept[attempt] = least = step
    newest = sorted(kept)[-_ATTEMPTS_KEPT:]
    return {attempt: kept[attempt] for attempt in newest} | {newest[0]: least}


def _supersede(
    connection: sa.Connection,
    run: sa.Row[Any],
    attempt: int,
    first: int,
    begun: Mapping[int, int],
    coverage: dict[str, Any],
) -> None:
    """Remove what older attempts stored from the first step of this one on."""
    table = schema.samples
    stretch = (table.c.step.between(first, begun.get(attempt, LARGEST_STEP)), table.c.attempt < attempt)
    gone = connection.execute(sa.delete(table).where(table.c.run == run.id, table.c.level == 0, *stretch)).rowcount
    begins, pruned = all(known < attempt for known in begun), pruned_to(coverage.get("pruned", []), 0)
    if gone or (begins and first <= pruned):
        lane = SampleLane(connection, run.id, measured(run.statistics), run.parameter_count)
        levels = Levels(lane, coverage.get("samples", []), coverage.get("pruned"))
        # Where this attempt or a later one has stored later steps, buckets of theirs could not be gathered again.
        levels.cut(first if begins else max(first, pruned + 1))
    if _cut_trails(connection, run.id, attempt, first):
        for name, covered in coverage.get("scalars", {}).items():
            Levels(ScalarLane(connection, run.id, name), covered).cut(first)


def _cut_trails(connection: sa.Connection, run_id: str, attempt: int, first: int) -> int:
    """Remove what older attempts recorded from a step on; return how many rows that touched."""
    table = schema.trails
    older = sa.and_(table.c.run == run_id, table.c.attempt < attempt)
    reaching = connection.execute(
        sa.select(table).where(older, table.c.first_step > first - TRAIL_STEPS, table.c.first_step < first)
    ).all()
    for row in reaching:
        kept = _between(_decode_trails.decode(row.scalars), 0, first - 1)
        key = (table.c.run == run_id, table.c.first_step == row.first_step, table.c.rank == row.rank)
        mine = sa.and_(*key, table.c.batch == row.batch)
        connection.execute(sa.update(table).where(mine).values(scalars=msgspec.msgpack.encode(kept)))
    gone = connection.execute(sa.delete(table).where(older, table.c.first_step >= first)).rowcount
    return len(reaching) + gone


def _put_samples(
    connection: sa.Connection,
    run_id: str,
    batch: wire.Batch,
    samples: list[wire.Sample],
    scalars: Mapping[int, Mapping[str, float]],
) -> None:
    rows = [
        {
            "run": run_id,
            "level": 0,
            "step": sample.step,
            "attempt": batch.attempt,
            "at": sample.at,
            "scalars": serialised(scalars[sample.step]),
            "histograms": sample.histograms or None,
            **{name: sample.statistics.get(name) for name in STATISTICS},
        }
        for sample in samples
    ]
    connection.execute(_insert_samples(connection.dialect.name), rows)


@cache
def _insert_samples(engine: str) -> sa.Insert:
    """Return the insert by which a step that is sent again replaces what was there, unless that is of a later attempt.

    Built once: for a batch it would take as long as the insert itself.
    """
    table = schema.samples
    insert = upsert(engine, table)
    replaced = {column.name: insert.excluded[column.name] for column in table.c if not column.primary_key}
    return insert.on_conflict_do_update(
        index_elements=["run", "level", "step"], set_=replaced, where=table.c.attempt <= insert.excluded.attempt
    )


def _put_trail(
    connection: sa.Connection, run_id: str, batch: wire.Batch, trail: dict[str, Trail], arrival: int
) -> None:
    """Store the trail in rows that each stay within one stretch of steps."""
    rows = []
    for _, piece in sorted(_stretches(trail).items()):
        first = min(step for scalar in piece.values() for step in scalar.steps)
        rows.append(
            {
                "run": run_id,
                "first_step": first,
                "rank": batch.rank,
                "batch": batch.id,
                "attempt": batch.attempt,
                "arrival": arrival,
                "scalars": msgspec.msgpack.encode(piece),
            }
        )
    connection.execute(_insert_trails, rows)


def _stretches(trail: Mapping[str, Trail]) -> dict[int, dict[str, Trail]]:
    """Return the parts of a trail by stretch of steps."""
    found: defaultdict[int, dict[str, Trail]] = defaultdict(dict)
    for name, scalar in trail.items():
        stretch = min(scalar.steps) // TRAIL_STEPS
        if stretch == max(scalar.steps) // TRAIL_STEPS:
            found[stretch][name] = scalar
            continue
        for step, value in zip(scalar.steps, scalar.values, strict=True):
            part = found[step // TRAIL_STEPS].setdefault(name, Trail(steps=[], values=[]))
            part.steps.append(step)
            part.values.append(value)
    return found


_insert_events = sa.insert(schema.events)
_insert_trails = sa.insert(schema.trails)


def _with_samples(batch: wire.Batch) -> dict[str, Trail]:
    """Return the scalars of every step, what samples carry among them: where a trail tells the same, the sample's."""
    found: defaultdict[str, dict[int, wire.Number]] = defaultdict(dict)
    for sample in batch.samples:
        for name, value in sample.scalars.items():
            found[name][sample.step] = value
    for name, trail in batch.trail.items():
        if name in found or len(set(trail.steps)) < len(trail.steps):
            found[name] = dict(zip(trail.steps, trail.values, strict=True)) | found[name]
    made = {name: Trail(steps=list(values), values=list(values.values())) for name, values in found.items()}
    return {name: trail for name, trail in (batch.trail | made).items() if trail.steps}


def _between(trail: Mapping[str, Trail], first: int, last: int) -> dict[str, Trail]:
    """Return the part of a trail within a range of steps, ends included."""
    kept = {}
    for name, scalar in trail.items():
        if first <= min(scalar.steps) and max(scalar.steps) <= last:
            kept[name] = scalar
            continue
        pairs = [pair for pair in zip(scalar.steps, scalar.values, strict=True) if first <= pair[0] <= last]
        if pairs:
            kept[name] = Trail(steps=[step for step, _ in pairs], values=[value for _, value in pairs])
    return kept


def scalars_by_step(batch: wire.Batch) -> dict[int, dict[str, float]]:
    """Return the scalars of the steps at which samples were taken, in numbers; what a sample carries itself wins."""
    found: dict[int, dict[str, float]] = {sample.step: {} for sample in batch.samples}
    for name, scalar in batch.trail.items():
        for step, value in zip(scalar.steps, scalar.values, strict=True):
            if step in found:
                found[step][name] = wire.deserialise(value)
    for sample in batch.samples:
        found[sample.step] |= {name: wire.deserialise(value) for name, value in sample.scalars.items()}
    return found


def serialised(scalars: Mapping[str, wire.Number]) -> dict[str, wire.Number]:
    """Return scalars as JSON can carry them."""
    return {name: wire.serialise(wire.deserialise(value)) for name, value in scalars.items()}
