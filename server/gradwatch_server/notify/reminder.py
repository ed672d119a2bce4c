"""Reminder: sends the delivered notifications to an Alertmanager again, which keeps alerts in memory only.

Without it, an Alertmanager takes an alert for resolved after a while, and forgets all alerts when it restarts.
"""

import asyncio
import logging
import time

import sqlalchemy as sa

from gradwatch_server.notify.http_client import AddressGuard, HttpClient
from gradwatch_server.notify.outbox import DeliverySettings
from gradwatch_server.notify.receivers import Alertmanager, Notification
from gradwatch_server.store import schema

_RESOLVED_SECONDS = 300.0
_ALERTS_AT_ONCE = 500

log = logging.getLogger(__name__)


async def remind(engine: sa.Engine, receiver: Alertmanager, settings: DeliverySettings) -> None:
    """Every ``receiver.resend_seconds``, send the receiver's firing and just resolved alerts again, until cancelled."""
    async with HttpClient(AddressGuard(receiver.allow_networks), settings.timeout_seconds, 1) as client:
        while True:
            await asyncio.sleep(receiver.resend_seconds)
            try:
                await _remind_once(engine, receiver, client)
            except Exception:
                log.exception("reminding receiver %s failed; trying again at the next interval", receiver.name)


async def _remind_once(engine: sa.Engine, receiver: Alertmanager, client: HttpClient) -> None:
    after = ""
    while page := await asyncio.to_thread(_delivered, engine, receiver.name, time.time(), after):
        result = await client.post(receiver.batch_request(page, time.time()))
        if result.verdict != "delivered":
            log.warning("receiver %s was not reminded: %s", receiver.name, result.error)
            return
        after = page[-1].id


def _delivered(engine: sa.Engine, receiver: str, now: float, after: str) -> list[Notification]:
    """Return the last delivered notification of each alert that fires or was resolved within the last 5 minutes.

    Args:
        after: the id after which the page of at most 500 notifications begins.
    """
    table, transitions, alerts = schema.deliveries, schema.transitions, schema.alerts
    later, same_alert = schema.deliveries.alias("later"), schema.alerts.alias("same_alert")
    superseded = sa.exists().where(
        later.c.alert == table.c.alert,
        later.c.receiver == receiver,
        later.c.number > table.c.number,
        later.c.state == "delivered",
    )
    # To an Alertmanager an alert that fires anew is the same alert, because its labels are the same.
    fires_anew = sa.exists().where(
        same_alert.c.run == alerts.c.run, same_alert.c.rule == alerts.c.rule, same_alert.c.state == "firing"
    )
    firing = (alerts.c.state == "firing") & (transitions.c.state == "firing")
    just_resolved = (transitions.c.state == "resolved") & (table.c.delivered_at >= now - _RESOLVED_SECONDS)
    disabled = sa.exists().where(schema.disabled_receivers.c.name == receiver)
    query = (
        sa.select(table.c.id, transitions.c.payload, table.c.created_at)
        .join(transitions, transitions.c.id == table.c.transition)
        .join(alerts, alerts.c.id == table.c.alert)
        .where(table.c.receiver == receiver, table.c.state == "delivered", ~superseded)
        .where(firing | (just_resolved & ~fires_anew), table.c.id > after, ~disabled)
        .order_by(table.c.id)
        .limit(_ALERTS_AT_ONCE)
    )
    with engine.connect() as connection:
        return [Notification(row.id, row.payload, row.created_at) for row in connection.execute(query)]
