"""How a run goes: its samples a little at a time, between which others write; then the rest at once, and it is told.

A server that ends before that leaves the rest to the next one. Whoever was told of an alert of the run is told that it
is over. What is not delivered by then outlives the run, as alerts without one, until it is delivered or has long been
dead; ``outbox.forget`` removes it.
"""

import time
from typing import Any, Literal

import sqlalchemy as sa

from gradwatch_server import ledger, schema
from gradwatch_server.settings import Configuration

Left = Literal["unknown", "some", "nothing"]

RUN_DELETED = "the run was deleted"
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
    configuration: Configuration,
    public_url: str,
    *,
    overdue: bool = False,
    seconds: float = _PIECE_SECONDS,
) -> Left:
    """Remove a little of a run, or what is left of it where that is little.

    Args:
        connection: a transaction that writes.
        run_id: the run.
        configuration: who is to be told, and how long runs are kept.
        public_url: where people reach the page.
        overdue: leave the run alone if it has been heard of meanwhile, and so is not over its time.
        seconds: about how long this may take.

    Returns:
        What is left: some of it, nothing, or unknown, where there is no such run, or none that is over its time.
    """
    run = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id).with_for_update()).one_or_none()
    if run is None or (overdue and not configuration.retention.is_overdue(run, time.time())):
        return "unknown"
    if not _emptied(connection, run, time.monotonic() + seconds):
        if not overdue and run.deleted_at is None:  # whoever deletes it may be gone before the end
            begun = sa.update(schema.runs).where(schema.runs.c.id == run_id)
            connection.execute(begun.values(deleted_at=time.time()))
        return "some"
    book = ledger.Book(connection, run, configuration, public_url)
    book.close(run.last_step or 0, time.time(), RUN_DELETED)
    book.save()
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
