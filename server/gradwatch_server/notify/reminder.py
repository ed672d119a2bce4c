"""Reminder: sends the delivered notifications to an Alertmanager again, which keeps alerts in memory only.

Without it, an Alertmanager takes an alert for resolved after a while, and forgets all alerts when it restarts.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from gradwatch_server import steady_clock
from gradwatch_server.notify import outbox
from gradwatch_server.notify.http_client import AddressGuard, HttpClient
from gradwatch_server.notify.outbox import DeliverySettings
from gradwatch_server.notify.receivers import Alertmanager, Notification
from gradwatch_server.store import schema
from gradwatch_server.store.group_commit import Writer

_RESOLVED_SECONDS = 300.0
_ALERTS_AT_ONCE = 500

log = logging.getLogger(__name__)


async def remind(engine: sa.Engine, writer: Writer, receiver: Alertmanager, settings: DeliverySettings) -> None:
    """Every ``receiver.resend_seconds``, send the receiver's firing and just resolved alerts again, until cancelled."""
    async with HttpClient(AddressGuard(receiver.allow_networks), settings.timeout_seconds, 1) as client:
        while True:
            await asyncio.sleep(receiver.resend_seconds)
            try:
                await _remind_once(engine, writer, receiver, client)
            except Exception:
                log.exception("reminding receiver %s failed; trying again at the next interval", receiver.name)


async def _remind_once(engine: sa.Engine, writer: Writer, receiver: Alertmanager, client: HttpClient) -> None:
    after = ""
    while page := await asyncio.to_thread(_delivered, engine, receiver.name, steady_clock.now(), after):
        notifications = [Notification(row.id, row.payload, row.created_at) for row in page]
        result = await client.post(receiver.batch_request(notifications, time.time()))
        await asyncio.wrap_future(writer.submit(partial(_repeat_newer, receiver=receiver.name, reminded=page)))
        if result.verdict != "delivered":
            log.warning("receiver %s was not reminded: %s", receiver.name, result.error)
            return
        after = page[-1].id


def _repeat_newer(connection: sa.Connection, receiver: str, reminded: Sequence[sa.Row[Any]]) -> None:
    """Send again what was delivered while the reminder was under way, which may have arrived after it."""
    for row in reminded:
        outbox.repeat_last(connection, receiver, row.fingerprint, row.sequence, steady_clock.now())


def _delivered(engine: sa.Engine, receiver: str, now: float, after: str) -> Sequence[sa.Row[Any]]:
    """Return the last notification of each fingerprint, if the alert fires or was resolved within the last 5 minutes.

    Args:
        after: the id after which the page of at most 500 notifications begins.
    """
    table, transitions, alerts = schema.deliveries, schema.transitions, schema.alerts
    later = schema.deliveries.alias("later")
    # An alert that fires anew may be under way: a reminder that the last one was resolved must not arrive after it.
    anew = (later.c.state == "due") & (transitions.c.state == "resolved")
    superseded = sa.exists().where(
        later.c.fingerprint == table.c.fingerprint,
        later.c.receiver == receiver,
        later.c.sequence > table.c.sequence,
        (later.c.state == "delivered") | anew,
    )
    firing = (alerts.c.state == "firing") & (transitions.c.state == "firing")
    just_resolved = (transitions.c.state == "resolved") & (table.c.delivered_at >= now - _RESOLVED_SECONDS)
    disabled = sa.exists().where(schema.disabled_receivers.c.name == receiver)
    query: sa.Select[Any] = (
        sa.select(*table.c["id", "created_at", "fingerprint", "sequence"], transitions.c.payload)
        .join(transitions, transitions.c.id == table.c.transition)
        .join(alerts, alerts.c.id == table.c.alert)
        .where(table.c.receiver == receiver, table.c.state == "delivered", ~superseded)
        .where(firing | just_resolved, table.c.id > after, ~disabled)
        .order_by(table.c.id)
        .limit(_ALERTS_AT_ONCE)
    )
    with engine.connect() as connection:
        return connection.execute(query).all()
