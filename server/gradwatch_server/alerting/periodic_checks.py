"""Periodic checks of alerts, every second, for what changes without a sample: stalled runs, and silences that end."""

import asyncio
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import sqlalchemy as sa

from gradwatch_server import steady_clock
from gradwatch_server.alerting import silences
from gradwatch_server.alerting.run_alerts import RunAlerts
from gradwatch_server.diagnosis import Finding
from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.errors import Refused
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.group_commit import Writer

_INTERVAL_SECONDS = 1.0
_ASLEEP_SECONDS = 10.0
"""A longer time between two checks means that this server itself was suspended, or without its database."""


class PeriodicCheck(ABC):
    """Checks once a second for runs with something to write, and has the writer write it.

    It searches in a read transaction, and changes each run that it finds in a transaction of its own.
    """

    def __init__(self, engine: sa.Engine, writer: Writer, configuration: Configuration, public_url: str) -> None:
        self._engine = engine
        self._writer = writer
        self._configuration = configuration
        self._public_url = public_url

    def configure(self, configuration: Configuration, public_url: str) -> None:
        """Use these thresholds, receivers, routes and links from the next check on."""
        self._configuration = configuration
        self._public_url = public_url

    async def run(self) -> None:
        """Check for as long as the server runs."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            with suppress(Refused, sa.exc.SQLAlchemyError):  # the queue is full, or the database out of reach
                await self.check(steady_clock.now())

    async def check(self, now: float) -> None:
        """Change the alerts that are due to change at ``now``, Unix seconds."""
        for run_id in await asyncio.to_thread(self._due, now):
            await asyncio.wrap_future(self._writer.submit(partial(self._change, run_id=run_id, now=now), run_id))

    @abstractmethod
    def _due(self, now: float) -> list[str]:
        """Return the ids of the runs whose alerts are to be changed."""

    @abstractmethod
    def _change(self, connection: sa.Connection, *, run_id: str, now: float) -> None:
        """Change the alerts of one run, unless other writers have changed what ``_due`` found."""

    def _load_alerts(self, connection: sa.Connection, run: sa.Row[Any]) -> RunAlerts:
        return RunAlerts(connection, run, self._configuration, self._public_url)


class StallCheck(PeriodicCheck):
    """Fires the alert ``stalled`` for runs that have stopped reporting, and resolves it when they report again.

    The time during which this server was down is not counted: no run could report then.
    """

    def __init__(
        self, engine: sa.Engine, writer: Writer, configuration: Configuration, public_url: str, now: float
    ) -> None:
        super().__init__(engine, writer, configuration, public_url)
        self._awake_since = self._checked_at = now

    async def check(self, now: float) -> None:
        """Advance the alert of every run that has stalled, or no longer does."""
        if now - self._checked_at > _ASLEEP_SECONDS:
            self._awake_since = now
        await super().check(now)
        self._checked_at = now

    def _due(self, now: float) -> list[str]:
        with self._engine.connect() as connection:
            rows = connection.execute(_open_runs()).all()
        return [row.id for row in rows if self._is_due(row, self._find(row, now))]

    def _change(self, connection: sa.Connection, *, run_id: str, now: float) -> None:
        run = _lock_run(connection, run_id)
        row = connection.execute(_open_runs().where(schema.runs.c.id == run_id)).one_or_none()
        if run is None or row is None:
            return
        finding = self._find(row, now)
        if self._is_due(row, finding):
            alerts = self._load_alerts(connection, run)
            alerts.advance_stalled(finding, run.last_step or 0, now)
            alerts.save()

    def _find(self, row: sa.Row[Any], now: float) -> Finding | None:
        silence = stalled.Silence(
            last_seen_at=max(row.last_seen_at, self._awake_since),
            now=now,
            usual_interval_seconds=row.usual_interval_seconds,
            last_step=row.last_step or 0,
        )
        return stalled.RULE.judge(silence, self._configuration.thresholds[row.project][stalled.RULE])

    @staticmethod
    def _is_due(row: sa.Row[Any], finding: Finding | None) -> bool:
        """Return whether the finding changes the run's alert; a firing alert stays until the run reports again."""
        if finding is not None:
            return bool(row.alert_state != "firing")
        return row.alert_state == "pending" or bool(row.alert_state == "firing" and row.last_seen_at > row.fired_at)


class UnmuteCheck(PeriodicCheck):
    """Notifies of firing alerts whose silence, inhibition or acknowledgement has ended."""

    def _due(self, now: float) -> list[str]:  # noqa: ARG002  # people choose when a silence ends, by their clocks
        alerts, runs = schema.alerts, schema.runs
        query: sa.Select[Any] = (
            sa.select(*alerts.c["run", "rule", "acknowledged_by"], runs.c.project)
            .join(runs, runs.c.id == alerts.c.run)
            .where(alerts.c.state == "firing", alerts.c.muted.is_not(None))
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
            if not rows:
                return []
            active, inhibiting = silences.load(connection, time.time()), _inhibiting_rules(connection)
        return sorted({row.run for row in rows if not _is_muted(row, active, inhibiting.get(row.run, []))})

    def _change(self, connection: sa.Connection, *, run_id: str, now: float) -> None:
        run = _lock_run(connection, run_id)
        if run is None:
            return
        alerts = self._load_alerts(connection, run)
        alerts.notify_unmuted(run.last_step or 0, now)
        alerts.save()


def _lock_run(connection: sa.Connection, run_id: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id).with_for_update()).one_or_none()


def _open_runs() -> sa.Select[Any]:
    """Select the runs that have not finished, each with its open alert for stalling, if any."""
    runs, alerts = schema.runs, schema.alerts
    its_alert = (alerts.c.run == runs.c.id) & (alerts.c.rule == stalled.RULE.name) & (alerts.c.state != "resolved")
    columns = runs.c["id", "project", "last_seen_at", "usual_interval_seconds", "last_step"]
    return (
        sa.select(*columns, alerts.c.state.label("alert_state"), alerts.c.fired_at)
        .outerjoin(alerts, its_alert)
        .where(runs.c.finished_at.is_(None))
    )


def _inhibiting_rules(connection: sa.Connection) -> dict[str, list[str]]:
    """Return, for each run, the firing rules that inhibit others."""
    table, found = schema.alerts, dict[str, list[str]]()
    inhibiting = table.c.rule.in_(set(chain(*silences.INHIBITED_BY.values())))
    for row in connection.execute(sa.select(table.c.run, table.c.rule).where(table.c.state == "firing", inhibiting)):
        found.setdefault(row.run, []).append(row.rule)
    return found


def _is_muted(row: sa.Row[Any], active: list[silences.Silence], firing: list[str]) -> bool:
    return silences.mute_reason(active, firing, row.project, row.run, row.rule, row.acknowledged_by) is not None
