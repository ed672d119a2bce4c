"""Outbox: the deliveries in the database, which servers claim with a lease and whose every attempt they record.

Deliveries to the same receiver are made in order for each fingerprint, that is for each rule of a run: it is what
receivers identify, so that ``resolved`` of one alert never overtakes ``firing`` of the next one.
"""

import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch_server.notify.http_client import DeliveryResult
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert

_LONGEST_WAIT_SECONDS = 86_400.0
_UNKNOWN_RECEIVER_SECONDS = 3_600.0
"""How long a delivery to an unknown receiver stays due: another server, or a reload, may know the receiver."""
_REPLAYABLE_SECONDS = 7 * 86_400.0
"""How long the dead deliveries of a deleted run can be sent again."""


class DeliverySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of ``[delivery]``: how transitions of alerts are delivered to receivers."""

    retry_seconds: Sequence[float] = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
    """Waiting time before each further attempt (the first is made at once); after the last attempt it is dead."""
    jitter_ratio: float = 0.1
    """Each waiting time is lengthened by a random share of itself, at most this one."""
    timeout_seconds: float = 10.0
    """Longest time that one attempt may take, from name resolution to the response."""
    lease_seconds: float = 60.0
    """Time after which another server takes over the deliveries that a dead server had claimed."""
    at_once: int = 32
    """Most deliveries under way to one receiver at the same time; by mail or Apprise at most 2."""
    circuit_failures: int = 5
    """Failures in a row after which the circuit breaker of a receiver opens: nothing is sent for a while."""
    circuit_seconds: float = 15.0
    """How long it stays open at first; the time doubles with each failed probe, up to 5 minutes."""

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
class ClaimedDelivery:
    """A due delivery whose lease this server holds."""

    id: str
    alert: str
    receiver: str
    created_at: float
    payload: str
    fingerprint: str
    sequence: int
    """Order within the fingerprint."""
    leased_until: float
    """End of the lease, Unix seconds. It identifies the claim: another claim has another time."""
    lease_ends: float
    """End of the lease by this process's monotonic clock: nothing is sent after it."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of a delivery, and its result."""

    delivery: ClaimedDelivery
    result: DeliveryResult
    at: float
    """Unix seconds."""
    seconds: float
    """How long it took."""


def enqueue(
    connection: sa.Connection, transition: Mapping[str, Any], fingerprint: str, receivers: Sequence[str], now: float
) -> None:
    """Write one due delivery of a transition per receiver, behind those of the same fingerprint.

    Earlier ones that wait for their next attempt are tried now, and as often as new ones: the new one waits for them.
    """
    if not receivers:
        return
    table = schema.deliveries
    mine = table.c.fingerprint == fingerprint
    last = connection.execute(sa.select(sa.func.coalesce(sa.func.max(table.c.sequence), 0)).where(mine)).scalar_one()
    waiting = sa.update(table).where(
        mine, table.c.receiver.in_(receivers), table.c.state == "due", table.c.attempts > 0
    )
    connection.execute(waiting.values(due_at=now, attempts_before=table.c.attempts))
    row = {"alert": transition["alert"], "transition": transition["id"], "number": transition["number"]}
    row |= {"fingerprint": fingerprint, "sequence": last + 1, "state": "due", "attempts": 0}
    row |= {"due_at": now, "leased_until": 0.0, "created_at": now}
    rows = [row | {"id": f"msg_{secrets.token_hex(12)}", "receiver": receiver} for receiver in receivers]
    connection.execute(sa.insert(table), rows)


def claim(
    connection: sa.Connection, receiver: str, now: float, most: int, lease_seconds: float
) -> list[ClaimedDelivery]:
    """Claim up to ``most`` due deliveries of a receiver; the claims of a dead server end with their leases.

    A delivery waits until the earlier ones of the same fingerprint and receiver are delivered or dead.
    """
    table = schema.deliveries
    lease_ends = time.monotonic() + lease_seconds
    disabled = sa.exists().where(schema.disabled_receivers.c.name == receiver)
    columns = table.c["id", "alert", "receiver", "created_at", "fingerprint", "sequence"]
    rows = connection.execute(
        sa.select(*columns, schema.transitions.c.payload)
        .join(schema.transitions, schema.transitions.c.id == table.c.transition)
        .where(table.c.receiver == receiver, table.c.state == "due", table.c.due_at <= now)
        .where(table.c.leased_until <= now, ~_has_earlier_due(), ~disabled)
        .order_by(table.c.due_at)
        .limit(most)
        .with_for_update(skip_locked=True, of=table)
    ).mappings()
    until = now + lease_seconds
    claimed = [ClaimedDelivery(**row, leased_until=until, lease_ends=lease_ends) for row in rows]
    if claimed:
        mine = table.c.id.in_([each.id for each in claimed])
        connection.execute(sa.update(table).where(mine).values(leased_until=until))
    return claimed


def _has_earlier_due() -> sa.Exists:
    """Match the deliveries for which an earlier one of the same fingerprint and receiver is still due."""
    table, earlier = schema.deliveries, schema.deliveries.alias("earlier")
    return (
        sa.select(earlier.c.id)
        .where(
            earlier.c.fingerprint == table.c.fingerprint,
            earlier.c.receiver == table.c.receiver,
            earlier.c.sequence < table.c.sequence,
            earlier.c.state.not_in(("delivered", "dead")),  # "due" would tempt PostgreSQL to the index by due_at
        )
        .exists()
    )


def record(connection: sa.Connection, attempts: Sequence[Attempt], settings: DeliverySettings) -> list[str]:
    """Record attempts and when the next ones are due; return the state of each attempt's delivery.

    If another server has claimed a delivery meanwhile, or a replay has made it due once more, then only the attempt is
    recorded, and the new claim decides what follows. As the attempt may have arrived after later deliveries, the last
    one of its fingerprint is sent again.
    """
    table = schema.deliveries
    ids = [attempt.delivery.id for attempt in attempts]
    rows = connection.execute(
        sa.select(*table.c["id", "state", "attempts", "attempts_before"])
        .add_columns(*table.c["due_at", "leased_until", "error", "delivered_at"])
        .where(table.c.id.in_(ids))
        .order_by(table.c.id)
        .with_for_update()
    ).mappings()
    deliveries = {row["id"]: dict(row) for row in rows}
    attempt_rows, overtaken = [], []
    for attempt in attempts:
        if (delivery := deliveries.get(attempt.delivery.id)) is not None:
            if delivery["leased_until"] != attempt.delivery.leased_until:
                overtaken.append(attempt)
            delivery |= _changes(delivery, attempt, settings)
            attempt_rows.append(_attempt_row(delivery["attempts"], attempt))
    if attempt_rows:
        connection.execute(sa.insert(schema.attempts), attempt_rows)
        update = sa.update(table).where(table.c.id == sa.bindparam("of"))
        connection.execute(update, [row | {"of": row["id"]} for row in deliveries.values()])
    for attempt in overtaken:
        sent = attempt.delivery
        repeat_last(connection, sent.receiver, sent.fingerprint, sent.sequence, attempt.at + attempt.seconds)
    for attempt in attempts:
        if attempt.result.verdict == "gone":
            disable(connection, attempt.delivery.receiver, "it answered 410 Gone", attempt.at + attempt.seconds)
    return [deliveries[each]["state"] if each in deliveries else "deleted" for each in ids]


def repeat_last(connection: sa.Connection, receiver: str, fingerprint: str, sequence: int, now: float) -> None:
    """Send the last delivery of a fingerprint again, if it comes after the one of this sequence number.

    To be called after something was sent that may have arrived too late: the receiver is to end with the last word.
    """
    table = schema.deliveries
    mine = (table.c.receiver == receiver, table.c.fingerprint == fingerprint, table.c.sequence > sequence)
    sent = (*mine, (table.c.state == "delivered") | (table.c.leased_until > 0))
    chosen = sa.select(table.c.id).where(*sent).order_by(table.c.sequence.desc()).limit(1).with_for_update()
    last = connection.execute(chosen).scalar()
    if last is not None:
        again = {"state": "due", "due_at": now, "leased_until": 0.0, "delivered_at": None}
        again |= {"attempts_before": table.c.attempts}
        connection.execute(sa.update(table).where(table.c.id == last).values(again))


def _changes(before: Mapping[str, Any], attempt: Attempt, settings: DeliverySettings) -> dict[str, Any]:
    """Return the columns of a delivery that an attempt changes."""
    number, ended = before["attempts"] + 1, attempt.at + attempt.seconds
    if before["leased_until"] != attempt.delivery.leased_until:
        return {"attempts": number}
    state, due_at = _next(number - before["attempts_before"], attempt.result, ended, settings)
    return {
        "state": state,
        "attempts": number,
        "due_at": due_at,
        "leased_until": 0.0,
        "error": attempt.result.error,
        "delivered_at": ended if state == "delivered" else None,
    }


def _attempt_row(number: int, attempt: Attempt) -> dict[str, Any]:
    result = attempt.result
    row = {"delivery": attempt.delivery.id, "number": number, "at": attempt.at, "seconds": attempt.seconds}
    return row | {"status": result.status, "error": result.error}


def _next(number: int, result: DeliveryResult, now: float, settings: DeliverySettings) -> tuple[str, float]:
    """Return the state of a delivery after an attempt and the time at which it is due.

    Args:
        number: how many attempts were made since the delivery was written, or since it was replayed.
    """
    if result.verdict == "delivered":
        return "delivered", now
    if result.verdict != "failed" or number > len(settings.retry_seconds):
        return "dead", now
    jitter = random.uniform(1.0, 1.0 + settings.jitter_ratio)  # noqa: S311  # spreads retries, hides nothing
    wait = max(settings.retry_seconds[number - 1] * jitter, result.retry_after_seconds or 0.0)
    longest = max(_LONGEST_WAIT_SECONDS, *settings.retry_seconds) * (1.0 + settings.jitter_ratio)
    return "due", now + min(wait, longest)


def disable(connection: sa.Connection, receiver: str, reason: str, now: float) -> None:
    """Disable a receiver: nothing is sent to it until somebody enables it again."""
    statement = upsert(connection.dialect.name, schema.disabled_receivers).values(name=receiver, at=now, reason=reason)
    connection.execute(statement.on_conflict_do_nothing())


def enable(connection: sa.Connection, receiver: str) -> bool:
    """Enable a disabled receiver again; return False if it was not disabled."""
    table = schema.disabled_receivers
    return connection.execute(sa.delete(table).where(table.c.name == receiver)).rowcount > 0


def give_up(connection: sa.Connection, receivers: Sequence[str], now: float) -> int:
    """Mark deliveries as dead that are due to disabled receivers, or for an hour to unknown ones; return how many.

    Args:
        receivers: the names of the configured receivers.
    """
    table = schema.deliveries
    disabled = table.c.receiver.in_(sa.select(schema.disabled_receivers.c.name))
    unknown = table.c.receiver.not_in(receivers) & (table.c.due_at <= now - _UNKNOWN_RECEIVER_SECONDS)
    error = sa.case((disabled, "the receiver is disabled"), else_="the receiver is not configured")
    statement = sa.update(table).where(table.c.state == "due", disabled | unknown)
    return connection.execute(statement.values(state="dead", error=error)).rowcount


def delete_orphaned_alerts(connection: sa.Connection, now: float) -> None:
    """Delete the alerts of deleted runs that have no due delivery, and no dead one of the last week to replay."""
    alerts, table = schema.alerts, schema.deliveries
    kept = (table.c.state == "due") | ((table.c.state == "dead") & (table.c.due_at > now - _REPLAYABLE_SECONDS))
    needed = sa.exists().where(table.c.alert == alerts.c.id, kept)
    connection.execute(sa.delete(alerts).where(alerts.c.run.is_(None), ~needed))


def replay(connection: sa.Connection, chosen: sa.ColumnElement[bool], now: float) -> int:
    """Make deliveries due again, with their ids and recorded attempts; return how many.

    The later deliveries of the same fingerprint and receiver become due again as well, even those delivered already, so
    that the receiver ends with the latest state. A later one that is under way is sent once more, because its
    attempt may arrive before the replayed ones.

    Args:
        chosen: a condition on ``deliveries``.
    """
    table = schema.deliveries
    first = (
        sa.select(*table.c["fingerprint", "receiver"], sa.func.min(table.c.sequence).label("sequence"))
        .where(chosen, table.c.state != "due")
        .group_by(*table.c["fingerprint", "receiver"])
        .subquery()
    )
    same = (table.c.fingerprint == first.c.fingerprint) & (table.c.receiver == first.c.receiver)
    rows = connection.execute(
        sa.select(*table.c["id", "state"])
        .join(first, same & (table.c.sequence >= first.c.sequence))
        .order_by(table.c.id)
        .with_for_update(of=table)
    ).all()
    replayed = [row.id for row in rows if row.state != "due"]
    values = {"state": "due", "due_at": now, "leased_until": 0.0, "delivered_at": None}
    values |= {"attempts_before": table.c.attempts}
    update = sa.update(table).where(table.c.id == sa.bindparam("of"))
    if replayed:
        connection.execute(update.values(values), [{"of": each} for each in replayed])
        connection.execute(update.values(leased_until=0.0), [{"of": row.id} for row in rows])
    return len(replayed)
