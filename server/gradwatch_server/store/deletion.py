"""Deletes a run in bounded transactions, so that others write in between, then resolves its alerts.

A server that ends before that leaves the rest to the next one. Notifications that are not delivered by then outlive
the run, as alerts without one, until they are delivered or have long been dead, when ``outbox.delete_orphaned_alerts``
removes them.
"""

import time
from collections.abc import Callable
from typing import Any, Literal

import sqlalchemy as sa

from gradwatch_server.store import schema
from gradwatch_server.store.retention import Retention

Left = Literal["unknown", "some", "nothing"]

_PIECE_SECONDS = 0.04
"""About how long one transaction removes samples: as long as the writer's other commits."""
_VALUES_AT_ONCE = 2**18
_ROWS_AT_ONCE = 4_096
_PLACES = {"trails": [schema.trails.c.first_step], "events": [schema.events.c.step]}
"""Where a table's rows stand within a run; else by the rest of its key. An equality on all but the last of these
columns and a range of that one are what PostgreSQL estimates well enough to use the index.
"""


def delete_some(
    connection: sa.Connection,
    run_id: str,
    resolve_alerts: Callable[[sa.Connection, sa.Row[Any]], None],
    *,
    retention: Retention | None = None,
    seconds: float = _PIECE_SECONDS,
) -> Left:
    """Remove a little of a run, or what is left of it where that is little.

    Args:
        connection: a transaction that writes.
        run_id: the run.
        resolve_alerts: called in the last transaction, before the run's row is removed.
        retention: where given, the run is left alone unless its time is over; it may have been heard of meanwhile.
        seconds: about how long this may take.

    Returns:
        What is left: some of it, nothing, or unknown, where there is no such run, or none that is over its time.
    """
    run = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id).with_for_update()).one_or_none()
    if run is None or (retention is not None and not retention.is_overdue(run, time.time())):
        return "unknown"
    if not _emptied(connection, run, time.monotonic() + seconds):
        if retention is None and run.deleted_at is None:  # whoever deletes it may be gone before the end
            begun = sa.update(schema.runs).where(schema.runs.c.id == run_id)
            connection.execute(begun.values(deleted_at=time.time()))
        return "some"
    resolve_alerts(connection, run)
    alerts, deliveries = schema.alerts, schema.deliveries
    due = sa.exists().where(deliveries.c.alert == alerts.c.id, deliveries.c.state == "due")
    connection.execute(sa.update(alerts).where(alerts.c.run == run_id, due).values(run=None))
    connection.execute(sa.delete(schema.runs).where(schema.runs.c.id == run_id))
    return "nothing"


def _emptied(connection: sa.Connection, run: sa.Row[Any], until: float) -> bool:
    """Remove what there may be much of; return whether that was all."""
    vectors = max(16, _VALUES_AT_ONCE // max(1, run.parameter_count))
    most_of = {schema.rollups: vectors, schema.samples: vectors}
    most_of |= dict.fromkeys((schema.scalars, schema.trails, schema.batches, schema.events), _ROWS_AT_ONCE)
    for table, most in most_of.items():
        while _remove(connection, table, run.id, most):
            if time.monotonic() >= until:
                return False
    return True


def _remove(connection: sa.Connection, table: sa.Table, run_id: str, most: int) -> bool:
    """Remove up to about so many rows that follow one another in an index; return whether there were any."""
    *before, place = _PLACES.get(table.name) or [each for each in table.primary_key if each.name != "run"]
    mine = table.c.run == run_id
    first = connection.execute(sa.select(*before, place).where(mine).order_by(*before, place).limit(1)).one_or_none()
    if first is None:
        return False
    mine = sa.and_(mine, *(column == value for column, value in zip(before, first, strict=False)))
    last = connection.execute(sa.select(place).where(mine).order_by(place).offset(most - 1).limit(1)).scalar()
    connection.execute(sa.delete(table).where(mine if last is None else mine & (place <= last)))
    return True
