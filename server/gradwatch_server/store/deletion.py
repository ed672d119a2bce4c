"""Deletes runs in bounded transactions, so that others write in between, and resolves their alerts in the last one.

A server that ends in the middle leaves the rest to the next one. Notifications that are not delivered by then outlive
the run, as alerts without a run, until they are delivered or have been dead for long; the notifier removes them.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa

from gradwatch_server import steady_clock
from gradwatch_server.store import schema
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.rollups.retention import Retention

Remaining = Literal["unknown", "some", "nothing"]
ResolveAlerts: TypeAlias = Callable[[sa.Connection, sa.Row[Any]], None]
"""Resolves the open alerts of a run that is being deleted, before its row is removed."""

_CHUNK_SECONDS = 0.04
"""About how long one transaction removes rows: as long as the writer's other commits."""
_VALUES_AT_ONCE = 2**18
_ROWS_AT_ONCE = 4_096
_ORDER_COLUMNS = {"trails": [schema.trails.c.first_step], "events": [schema.events.c.step]}
"""Columns that order a table's rows within a run, if not the rest of its primary key. PostgreSQL estimates an equality
on all but the last of these columns and a range of the last one well enough to use the index.
"""


async def delete_run(
    writer: Writer, run_id: str, resolve_alerts: ResolveAlerts, *, retention: Retention | None = None
) -> bool:
    """Delete a run; return False if there is no such run or, where ``retention`` is given, it has not expired."""
    work = partial(delete_chunk, run_id=run_id, resolve_alerts=resolve_alerts, retention=retention)
    begun = False
    while (remaining := await asyncio.wrap_future(writer.submit(work, run_id))) == "some":
        begun = True
    return begun or remaining == "nothing"


async def delete_expired_runs(
    engine: sa.Engine, writer: Writer, retention: Retention, resolve_alerts: ResolveAlerts
) -> int:
    """Delete the runs that have expired; return how many."""
    run_ids = await asyncio.to_thread(retention.expired_runs, engine, steady_clock.now())
    return sum([await delete_run(writer, run_id, resolve_alerts, retention=retention) for run_id in run_ids])


def delete_chunk(
    connection: sa.Connection,
    run_id: str,
    resolve_alerts: ResolveAlerts,
    *,
    retention: Retention | None = None,
    seconds: float = _CHUNK_SECONDS,
) -> Remaining:
    """Delete some rows of a run; if they are the last ones, resolve its alerts and delete the run itself.

    Args:
        connection: a transaction that writes.
        run_id: the run.
        resolve_alerts: called in the last transaction, before the run's row is removed.
        retention: if given, a run that has not expired is left alone: it may have reported in the meantime.
        seconds: about how long this may take.

    Returns:
        What remains: some of the run, nothing, or unknown if there is no such run or it has not expired.
    """
    run = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id).with_for_update()).one_or_none()
    if run is None or (retention is not None and not retention.is_expired(run, steady_clock.now())):
        return "unknown"
    if not _delete_rows(connection, run, time.monotonic() + seconds):
        if retention is None and run.deleted_at is None:  # the next server goes on with it if this one ends
            begun = sa.update(schema.runs).where(schema.runs.c.id == run_id)
            connection.execute(begun.values(deleted_at=steady_clock.now()))
        return "some"
    resolve_alerts(connection, run)
    alerts, deliveries = schema.alerts, schema.deliveries
    due = sa.exists().where(deliveries.c.alert == alerts.c.id, deliveries.c.state == "due")
    connection.execute(sa.update(alerts).where(alerts.c.run == run_id, due).values(run=None))
    connection.execute(sa.delete(schema.runs).where(schema.runs.c.id == run_id))
    return "nothing"


def _delete_rows(connection: sa.Connection, run: sa.Row[Any], until: float) -> bool:
    """Delete rows of the large tables until a time, by the monotonic clock; return whether none are left."""
    vectors = max(16, _VALUES_AT_ONCE // max(1, run.parameter_count))
    most_of = {schema.rollups: vectors, schema.samples: vectors}
    most_of |= dict.fromkeys((schema.scalars, schema.trails, schema.batches, schema.events), _ROWS_AT_ONCE)
    for table, most in most_of.items():
        while _delete_first_rows(connection, table, run.id, most):
            if time.monotonic() >= until:
                return False
    return True


def _delete_first_rows(connection: sa.Connection, table: sa.Table, run_id: str, most: int) -> bool:
    """Delete about ``most`` rows of a run that follow one another in an index; return whether there were any."""
    *before, place = _ORDER_COLUMNS.get(table.name) or [each for each in table.primary_key if each.name != "run"]
    mine = table.c.run == run_id
    first = connection.execute(sa.select(*before, place).where(mine).order_by(*before, place).limit(1)).one_or_none()
    if first is None:
        return False
    mine = sa.and_(mine, *(column == value for column, value in zip(before, first, strict=False)))
    last = connection.execute(sa.select(place).where(mine).order_by(place).offset(most - 1).limit(1)).scalar()
    connection.execute(sa.delete(table).where(mine if last is None else mine & (place <= last)))
    return True
