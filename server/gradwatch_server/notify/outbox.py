"""Deliveries as rows: claimed with a lease, recorded with every attempt, in order for each alert and receiver."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch_server.notify.delivery_result import Answer
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert

_LONGEST_WAIT_SECONDS = 86_400.0
_UNKNOWN_SECONDS = 3_600.0
"""How long what nobody takes stays due: another server, or this one's next configuration, may know the receiver."""

_DEAD_SECONDS = 7 * 86_400.0


class Delivery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How transitions of alerts are delivered."""

    retry_seconds: Sequence[float] = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
    """Waiting time before each further attempt (the first is made at once); after the last the delivery is dead."""
    jitter_ratio: float = 0.1
    """Each waiting time is lengthened by a random share of itself, at most this one."""
    timeout_seconds: float = 10.0
    """Longest time that one attempt may take, from name resolution to the answer."""
    lease_seconds: float = 60.0
    """After this time another server takes over the deliveries that a dead one had claimed."""
    at_once: int = 32
    """Most deliveries that are under way to one receiver; to one by mail or Apprise 2."""
    circuit_failures: int = 5
    """Failures in a row after which a receiver is left alone for a while."""
    circuit_seconds: float = 15.0
    """The first such while; it doubles with each failed probe, up to 5 minutes."""

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "lease_seconds", "at_once", "circuit_failures", "circuit_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"delivery.{name} is {getattr(self, name)}: it must be more than 0")
        if self.lease_seconds <= self.timeout_seconds:
            raise ValueError(
                f"delivery.lease_seconds ({self.lease_seconds:g}) must be more than delivery.timeout_seconds "
                f"({self.timeout_seconds:g}): or two servers send the same delivery"
            )
        if any(seconds < 0 for seconds in self.retry_seconds) or self.jitter_ratio < 0:
            raise ValueError("delivery.retry_seconds and delivery.jitter_ratio are not negative")


@dataclass(frozen=True)
class Due:
    """A delivery that this server holds the lease of."""

    id: str
    alert: str
    receiver: str
    created_at: float
    payload: str
    leased_until: float
    """Names this claim: another one has another time."""


@dataclass(frozen=True)
class Attempt:
    """One try of a delivery and what came of it."""

    due: Due
    answer: Answer
    at: float
    seconds: float


def claim(connection: sa.Connection, receiver: str, now: float, most: int, lease_seconds: float) -> list[Due]:
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
            earlier.c.state.not_in(("delivered", "dead")),  # "due" would tempt PostgreSQL to the index by due_at
        )
        .exists()
    )
    off = sa.exists().where(schema.disabled_receivers.c.name == receiver)
    rows = connection.execute(
        sa.select(*table.c["id", "alert", "receiver", "created_at"], schema.transitions.c.payload)
        .join(schema.transitions, schema.transitions.c.id == table.c.transition)
        .where(table.c.receiver == receiver, table.c.state == "due", table.c.due_at <= now)
        .where(table.c.leased_until <= now, ~blocked, ~off)
        .order_by(table.c.due_at)
        .limit(most)
        .with_for_update(skip_locked=True, of=table)
    ).all()
    until = now + lease_seconds
    if rows:
        claimed = sa.update(table).where(table.c.id.in_([row.id for row in rows]))
        connection.execute(claimed.values(leased_until=until))
    return [Due(row.id, row.alert, row.receiver, row.created_at, row.payload, until) for row in rows]


def record(connection: sa.Connection, made: Sequence[Attempt], pace: Delivery) -> list[str]:
    """Write down what came of attempts and when the next ones are due; return the deliveries' states.

    Another server may have taken over meanwhile, or somebody may have had an earlier delivery sent again, after which
    this one is to be sent once more: then the attempt is kept, and what follows is left to the new claim.
    """
    table = schema.deliveries
    ids = [attempt.due.id for attempt in made]
    rows = connection.execute(
        sa.select(*table.c["id", "state", "attempts", "attempts_before"])
        .add_columns(*table.c["due_at", "leased_until", "error", "delivered_at"])
        .where(table.c.id.in_(ids))
        .order_by(table.c.id)
        .with_for_update()
    ).mappings()
    known = {row["id"]: dict(row) for row in rows}
    tries = []
    for attempt in made:
        if attempt.due.id in known:
            known[attempt.due.id] |= _outcome(known[attempt.due.id], attempt, pace)
            tries.append(_try(known[attempt.due.id]["attempts"], attempt))
    if tries:
        connection.execute(sa.insert(schema.attempts), tries)
        changed = sa.update(table).where(table.c.id == sa.bindparam("of"))
        connection.execute(changed, [row | {"of": row["id"]} for row in known.values()])
    for attempt in made:
        if attempt.answer.verdict == "gone":
            disable(connection, attempt.due.receiver, "it answered 410 Gone", attempt.at + attempt.seconds)
    return [known[each]["state"] if each in known else "deleted" for each in ids]


def _outcome(before: Mapping[str, Any], attempt: Attempt, pace: Delivery) -> dict[str, Any]:
    """Return what changes of a delivery."""
    number, ended = before["attempts"] + 1, attempt.at + attempt.seconds
    if before["leased_until"] != attempt.due.leased_until:
        return {"attempts": number}
    state, due_at = _next(number - before["attempts_before"], attempt.answer, ended, pace)
    return {
        "state": state,
        "attempts": number,
        "due_at": due_at,
        "leased_until": 0.0,
        "error": attempt.answer.error,
        "delivered_at": ended if state == "delivered" else None,
    }


def _try(number: int, attempt: Attempt) -> dict[str, Any]:
    answer = attempt.answer
    made = {"delivery": attempt.due.id, "number": number, "at": attempt.at, "seconds": attempt.seconds}
    return made | {"status": answer.status, "error": answer.error}


def _next(number: int, answer: Answer, now: float, pace: Delivery) -> tuple[str, float]:
    """Return the state after an attempt, counted from the first one or since it was sent again, and when it is due."""
    if answer.verdict == "delivered":
        return "delivered", now
    if answer.verdict != "failed" or number > len(pace.retry_seconds):
        return "dead", now
    jitter = random.uniform(1.0, 1.0 + pace.jitter_ratio)  # noqa: S311  # spreads retries, hides nothing
    wait = max(pace.retry_seconds[number - 1] * jitter, answer.retry_after_seconds or 0.0)
    return "due", now + min(wait, max(_LONGEST_WAIT_SECONDS, *pace.retry_seconds) * (1.0 + pace.jitter_ratio))


def disable(connection: sa.Connection, receiver: str, reason: str, now: float) -> None:
    """Send nothing more to a receiver until somebody enables it again."""
    statement = upsert(connection.dialect.name, schema.disabled_receivers).values(name=receiver, at=now, reason=reason)
    connection.execute(statement.on_conflict_do_nothing())


def enable(connection: sa.Connection, receiver: str) -> bool:
    """Send to a disabled receiver again; return False where it was not disabled."""
    table = schema.disabled_receivers
    return connection.execute(sa.delete(table).where(table.c.name == receiver)).rowcount > 0


def bury(connection: sa.Connection, receivers: Sequence[str], now: float) -> int:
    """Give up what is due to receivers that are disabled, or that nobody knows for an hour; return how many."""
    table, disabled = schema.deliveries, schema.disabled_receivers
    off = table.c.receiver.in_(sa.select(disabled.c.name))
    unknown = table.c.receiver.not_in(receivers) & (table.c.due_at <= now - _UNKNOWN_SECONDS)
    error = sa.case((off, "the receiver is disabled"), else_="the receiver is not configured")
    statement = sa.update(table).where(table.c.state == "due", off | unknown)
    return connection.execute(statement.values(state="dead", error=error)).rowcount


def forget(connection: sa.Connection, now: float) -> None:
    """Remove the alerts of deleted runs of which nothing is due any more; what is dead can be sent again for a week."""
    alerts, table = schema.alerts, schema.deliveries
    kept = (table.c.state == "due") | ((table.c.state == "dead") & (table.c.due_at > now - _DEAD_SECONDS))
    needed = sa.exists().where(table.c.alert == alerts.c.id, kept)
    connection.execute(sa.delete(alerts).where(alerts.c.run.is_(None), ~needed))


def replay(connection: sa.Connection, chosen: sa.ColumnElement[bool], now: float) -> int:
    """Make deliveries due again, with the id they had and all attempts before them; return how many.

    Those after them of the same alert and receiver are due again as well, delivered or not: the receiver's last word is
    how the alert stands. One that is under way is sent once more, for it may arrive before what is sent again.
    """
    table = schema.deliveries
    first = (
        sa.select(*table.c["alert", "receiver"], sa.func.min(table.c.number).label("number"))
        .where(chosen, table.c.state != "due")
        .group_by(*table.c["alert", "receiver"])
        .subquery()
    )
    same = (table.c.alert == first.c.alert) & (table.c.receiver == first.c.receiver)
    rows = connection.execute(
        sa.select(*table.c["id", "state"])
        .join(first, same & (table.c.number >= first.c.number))
        .order_by(table.c.id)
        .with_for_update(of=table)
    ).all()
    again = [row.id for row in rows if row.state != "due"]
    fresh = {"state": "due", "due_at": now, "leased_until": 0.0, "delivered_at": None}
    fresh |= {"attempts_before": table.c.attempts}
    update = sa.update(table).where(table.c.id == sa.bindparam("of"))
    if again:
        connection.execute(update.values(fresh), [{"of": each} for each in again])
        connection.execute(update.values(leased_until=0.0), [{"of": row.id} for row in rows])
    return len(again)
