"""Reminds an Alertmanager, which keeps alerts in memory only, of what fires and of what has just been resolved."""

import asyncio
import logging
import time

import sqlalchemy as sa

from gradwatch_server.notify.address_guard import Guard
from gradwatch_server.notify.http_client import Postman
from gradwatch_server.notify.outbox import Delivery
from gradwatch_server.notify.receivers import Alertmanager, Message
from gradwatch_server.store import schema

_RESOLVED_SECONDS = 300.0
_ALERTS_AT_ONCE = 500

log = logging.getLogger(__name__)


async def remind(engine: sa.Engine, receiver: Alertmanager, pace: Delivery) -> None:
    """Send again, for as long as it runs, what this Alertmanager has been told."""
    async with Postman(Guard(receiver.allow_networks), pace.timeout_seconds, 1) as postman:
        while True:
            await asyncio.sleep(receiver.resend_seconds)
            try:
                after = ""
                while told := await asyncio.to_thread(_told, engine, receiver.name, time.time(), after):
                    answer = await postman.post(receiver.digest(told, time.time()))
                    if answer.verdict != "delivered":
                        log.warning("receiver %s was not reminded: %s", receiver.name, answer.error)
                        break
                    after = told[-1].id
            except Exception:
                log.exception("receiver %s could not be reminded; the next time comes", receiver.name)


def _told(engine: sa.Engine, receiver: str, now: float, after: str) -> list[Message]:
    """Return the last delivered transitions of alerts that fire, or were resolved within 5 minutes; by id, a page."""
    table, transitions, alerts = schema.deliveries, schema.transitions, schema.alerts
    later = schema.deliveries.alias("later")
    superseded = sa.exists().where(
        later.c.alert == table.c.alert,
        later.c.receiver == receiver,
        later.c.number > table.c.number,
        later.c.state == "delivered",
    )
    off = sa.exists().where(schema.disabled_receivers.c.name == receiver)
    fires = (alerts.c.state == "firing") & (transitions.c.state == "firing")
    anew = schema.alerts.alias("anew")  # to an Alertmanager the same alert, for its labels are the same
    again = sa.exists().where(anew.c.run == alerts.c.run, anew.c.rule == alerts.c.rule, anew.c.state == "firing")
    just_resolved = (transitions.c.state == "resolved") & (table.c.delivered_at >= now - _RESOLVED_SECONDS) & ~again
    query = (
        sa.select(table.c.id, transitions.c.payload, table.c.created_at)
        .join(transitions, transitions.c.id == table.c.transition)
        .join(alerts, alerts.c.id == table.c.alert)
        .where(table.c.receiver == receiver, table.c.state == "delivered", ~superseded, fires | just_resolved)
        .where(table.c.id > after, ~off)
        .order_by(table.c.id)
        .limit(_ALERTS_AT_ONCE)
    )
    with engine.connect() as connection:
        return [Message(row.id, row.payload, row.created_at) for row in connection.execute(query)]
