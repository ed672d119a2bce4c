"""Stores the content of a batch: samples, trails, events and roll-ups, and removes rows that a new attempt replaces."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch import wire
from gradwatch.wire import LARGEST_STEP, STATISTICS, Trail
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.prepared import Prepared
from gradwatch_server.store.rollups.levels import Levels, pruned_to
from gradwatch_server.store.rollups.series import (
    TRAIL_STEPS,
    SampleSeries,
    ScalarSeries,
    decode_trails,
    readable_statistics,
)
from gradwatch_server.store.runs import insert_events

_ATTEMPTS_KEPT = 100
"""Attempts whose first steps are kept apart; all older ones count as one."""


def stored_attempt(attempts: Mapping[str, int], number: int) -> int:
    """Return the number by the server's clock for the number that an agent gave its attempt."""
    return attempts.get(str(number), number)


def insert_batch(
    connection: sa.Connection, run: sa.Row[Any], batch: wire.Batch, scalars: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    """Store the content of a batch; return the new values of the run's row.

    An attempt wins from its first step on: rows that older attempts have stored from there on are removed, and samples
    that they still send are left out.

    Args:
        connection: a transaction that writes.
        run: the run's row, locked.
        batch: fits the run.
        scalars: the scalars that ``scalars_by_step`` returns.
    """
    coverage = msgspec.json.decode(msgspec.json.encode(run.coverage))
    # 1. Leave out what a later attempt has replaced already.
    samples, trail = batch.samples, _whole_trail(batch)
    first_steps = {int(attempt): step for attempt, step in run.first_steps.items()}
    end = min((step for attempt, step in first_steps.items() if attempt > batch.attempt), default=LARGEST_STEP)
    if end < LARGEST_STEP:
        samples = [sample for sample in samples if sample.step < end]
        trail = _trail_between(trail, 0, end - 1)
    # 2. Remove what this attempt replaces.
    first = min([sample.step for sample in samples] + [min(scalar.steps) for scalar in trail.values()], default=end)
    if first < first_steps.get(batch.attempt, end):
        _supersede(connection, run, batch.attempt, first, first_steps, coverage)
        first_steps = _relevant_first_steps(first_steps | {batch.attempt: first})
    # 3. Insert rows.
    if samples:
        _insert_samples(connection, run, batch, samples, scalars)
    if trail:
        coverage["batches"] = coverage.get("batches", 0) + 1
        _insert_trail(connection, run.id, batch, trail, coverage["batches"])
    if batch.events:
        insert_events(connection, run.id, batch.events)
    # 4. Roll up.
    measured = {name for sample in samples for name in sample.statistics}
    statistics = [name for name in STATISTICS if name in measured or name in run.statistics]
    if measured:
        _roll_up_samples(connection, run, samples, statistics, coverage)
    _roll_up_scalars(connection, run.id, trail, coverage)
    stored_steps = {str(attempt): step for attempt, step in first_steps.items()}
    return {
        "first_steps": stored_steps,
        "statistics": statistics,
        "coverage": coverage,
        "arrivals": run.arrivals + len(samples),
        "sample_count": run.sample_count + len(samples),
    }


def _roll_up_samples(
    connection: sa.Connection,
    run: sa.Row[Any],
    samples: Sequence[wire.Sample],
    statistics: Sequence[str],
    coverage: dict[str, Any],
) -> None:
    series = SampleSeries(connection, run.id, readable_statistics(statistics), run.parameter_count)
    written = {sample.step: sample.statistics for sample in sorted(samples, key=lambda sample: sample.step)}
    levels = Levels(series, coverage.setdefault("samples", []), coverage.get("pruned"))
    levels.add(written, partial(series.of_samples, written))


def _roll_up_scalars(
    connection: sa.Connection, run_id: str, trail: Mapping[str, Trail], coverage: dict[str, Any]
) -> None:
    covered = coverage.setdefault("scalars", {}) if trail else {}
    for name, scalar in trail.items():
        Levels(ScalarSeries(connection, run_id, name), covered.setdefault(name, [])).add(scalar.steps)


def _relevant_first_steps(first_steps: Mapping[int, int]) -> dict[int, int]:
    """Return attempt -> first step, without attempts before whose first step a later attempt begins.

    Of many attempts the oldest count as one, which begins where the first of them does: what they still send is left
    out from there on, rather than mixed.
    """
    kept: dict[int, int] = {}
    least = LARGEST_STEP
    for attempt, step in sorted(first_steps.items(), reverse=True):
        if step < least:
            kept[attempt] = least = step
    newest = sorted(kept)[-_ATTEMPTS_KEPT:]
    return {attempt: kept[attempt] for attempt in newest} | {newest[0]: least}


def _supersede(
    connection: sa.Connection,
    run: sa.Row[Any],
    attempt: int,
    first: int,
    first_steps: Mapping[int, int],
    coverage: dict[str, Any],
) -> None:
    """Remove the rows that older attempts stored from the first step of this one on."""
    table = schema.samples
    stretch = (table.c.step.between(first, first_steps.get(attempt, LARGEST_STEP)), table.c.attempt < attempt)
    gone = connection.execute(sa.delete(table).where(table.c.run == run.id, table.c.level == 0, *stretch)).rowcount
    is_new, pruned = all(known < attempt for known in first_steps), pruned_to(coverage.get("pruned", []), 0)
    if gone or (is_new and first <= pruned):
        series = SampleSeries(connection, run.id, readable_statistics(run.statistics), run.parameter_count)
        levels = Levels(series, coverage.get("samples", []), coverage.get("pruned"))
        # If this attempt or a later one has stored later steps, their pruned buckets could not be gathered again.
        levels.cut(first if is_new else max(first, pruned + 1))
    if _cut_trails(connection, run.id, attempt, first):
        for name, covered in coverage.get("scalars", {}).items():
            Levels(ScalarSeries(connection, run.id, name), covered).cut(first)


def _cut_trails(connection: sa.Connection, run_id: str, attempt: int, first: int) -> int:
    """Remove the trails of older attempts from a step on; return how many rows were changed."""
    table = schema.trails
    older = sa.and_(table.c.run == run_id, table.c.attempt < attempt)
    reaching = connection.execute(
        sa.select(table).where(older, table.c.first_step > first - TRAIL_STEPS, table.c.first_step < first)
    ).all()
    for row in reaching:
        kept = _trail_between(decode_trails.decode(row.scalars), 0, first - 1)
        key = (table.c.run == run_id, table.c.first_step == row.first_step, table.c.rank == row.rank)
        mine = sa.and_(*key, table.c.batch == row.batch)
        connection.execute(sa.update(table).where(mine).values(scalars=msgspec.msgpack.encode(kept)))
    gone = connection.execute(sa.delete(table).where(older, table.c.first_step >= first)).rowcount
    return len(reaching) + gone


def _insert_samples(
    connection: sa.Connection,
    run: sa.Row[Any],
    batch: wire.Batch,
    samples: list[wire.Sample],
    scalars: Mapping[int, Mapping[str, float]],
) -> None:
    """Store samples, numbered in the order in which they commit: the run's row is locked, so no number is late."""
    rows = [
        {
            "run": run.id,
            "level": 0,
            "step": sample.step,
            "attempt": batch.attempt,
            "at": sample.at,
            "scalars": serialised(scalars[sample.step]),
            "histograms": sample.histograms or None,
            **{name: sample.statistics.get(name) for name in STATISTICS},
            "arrival": arrival,
        }
        for arrival, sample in enumerate(samples, run.arrivals + 1)
    ]
    _insert_sample_rows.execute(connection, *rows)


def _upsert_samples(engine: str) -> sa.Insert:
    """Return the insert of samples: a step that is sent again is replaced, unless a later attempt stored it."""
    table = schema.samples
    insert = upsert(engine, table)
    replaced = {column.name: insert.excluded[column.name] for column in table.c if not column.primary_key}
    return insert.on_conflict_do_update(
        index_elements=["run", "level", "step"], set_=replaced, where=table.c.attempt <= insert.excluded.attempt
    )


_SAMPLE_COLUMNS = ("run", "level", "step", "attempt", "at", "scalars", "histograms", *STATISTICS, "arrival")
_insert_sample_rows = Prepared(_upsert_samples, _SAMPLE_COLUMNS)


def _insert_trail(
    connection: sa.Connection, run_id: str, batch: wire.Batch, trail: dict[str, Trail], arrival: int
) -> None:
    """Store a trail in rows that each lie within one stretch of ``TRAIL_STEPS`` steps."""
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
    _insert_trail_rows.execute(connection, *rows)


def _stretches(trail: Mapping[str, Trail]) -> dict[int, dict[str, Trail]]:
    """Return stretch -> the part of a trail in it."""
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


_insert_trail_rows = Prepared(lambda _: sa.insert(schema.trails), schema.trails.c.keys())


def _whole_trail(batch: wire.Batch) -> dict[str, Trail]:
    """Return the scalars of every step, those of the samples among them, which win over the trail's."""
    found: defaultdict[str, dict[int, wire.Number]] = defaultdict(dict)
    for sample in batch.samples:
        for name, value in sample.scalars.items():
            found[name][sample.step] = value
    for name, trail in batch.trail.items():
        if name in found or len(set(trail.steps)) < len(trail.steps):
            found[name] = dict(zip(trail.steps, trail.values, strict=True)) | found[name]
    made = {name: Trail(steps=list(values), values=list(values.values())) for name, values in found.items()}
    return {name: trail for name, trail in (batch.trail | made).items() if trail.steps}


def _trail_between(trail: Mapping[str, Trail], first: int, last: int) -> dict[str, Trail]:
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
    """Return step -> scalars of the steps at which samples were taken; those that a sample carries itself win."""
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
