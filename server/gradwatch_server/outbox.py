"""Deliveries as rows: claimed with a lease, recorded with every attempt, in order for each alert and receiver."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from gradwatch_server import schema
from gradwatch_server.webhook import Answer

LEASE_SECONDS = 60.0
RETRY_SECONDS: Sequence[float] = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Waiting time before each further attempt, about 3 days in all; 10% of jitter on top."""
_PERMANENT = range(400, 500)
_TEMPORARY = (408, 425, 429)


@dataclass(frozen=True)
class Due:
    """A delivery that this server holds the lease of."""

    id: str
    receiver: str
    attempts: int
    payload: str


def claim(connection: sa.Connection, now: float, most: int) -> list[Due]:
    """Take up to ``most`` due deliveries; a dead server's claims come back when their lease ends.

    A delivery waits until those before it of the same alert and receiver are delivered or dead: a resolved alert never
    overtakes its firing.
    """
    table, earlier = schema.deliveries, schema.deliveries.alias("earlier")
    blocked = (
        sa.select(earlier.c.id)
        .where(
            earlier.c.alert == table.c.alert,
            earlier.c.receiver == table.c.receiver,
            earlier.c.number < table.c.number,
            earlier.c.state == "due",
        )
        .exists()
    )
    rows = connection.execute(
        sa.select(*table.c["id", "receiver", "attempts"], schema.transitions.c.payload)
        .join(schema.transitions, schema.transitions.c.id == table.c.transition)
        .where(table.c.state == "due", table.c.due_at <= now, table.c.leased_until <= now, ~blocked)
        .order_by(table.c.created_at, table.c.id)
        .limit(most)
        .with_for_update(skip_locked=True, of=table)
    ).all()
    if rows:
        claimed = sa.update(table).where(table.c.id.in_([row.id for row in rows]))
        connection.execute(claimed.values(leased_until=now + LEASE_SECONDS))
    return [Due(row.id, row.receiver, row.attempts, row.payload) for row in rows]


def record(connection: sa.Connection, due: Due, answer: Answer, started: float, now: float) -> str:
    """Write down what came of an attempt and when the next one is due; return the delivery's state."""
    number = due.attempts + 1
    connection.execute(
        sa.insert(schema.attempts).values(
            delivery=due.id,
            number=number,
            at=started,
            seconds=now - started,
            status=answer.status,
            error=answer.error,
        )
    )
    state, due_at = _next(number, answer, now)
    connection.execute(
        sa.update(schema.deliveries)
        .where(schema.deliveries.c.id == due.id)
        .values(
            state=state,
            attempts=number,
            due_at=due_at,
            leased_until=0.0,
            delivered_at=now if state == "delivered" else None,
        )
    )
    return state


def _next(number: int, answer: Answer, now: float) -> tuple[str, float]:
    if answer.delivered:
        return "delivered", now
    permanent = answer.status in _PERMANENT and answer.status not in _TEMPORARY
    if permanent or number > len(RETRY_SECONDS):
        return "dead", now
    wait = RETRY_SECONDS[number - 1] * random.uniform(1.0, 1.1)  # noqa: S311  # spreads retries, hides nothing
    return "due", now + max(wait, answer.retry_after_seconds or 0.0)
