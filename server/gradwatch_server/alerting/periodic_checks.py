"""The clock behind the rule ``stalled``: runs that have stopped reporting send nothing that could be diagnosed."""

import asyncio
from functools import partial
from typing import Any

import sqlalchemy as sa

from gradwatch_server.alerting import run_alerts
from gradwatch_server.alerting.ticker import Clock
from gradwatch_server.diagnosis import Finding
from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.group_commit import Writer

_ASLEEP_SECONDS = 10.0
"""After a longer time without a look this server was down itself: asleep, stopped, or without its database."""


class Stalls(Clock):
    """Looks for runs that have stopped reporting, or have come back without a sample.

    The time during which this server could not have heard of a run does not count as silence.
    """

    def __init__(
        self, engine: sa.Engine, writer: Writer, configuration: Configuration, public_url: str, now: float
    ) -> None:
        super().__init__(engine, writer, configuration, public_url)
        self._awake_since = self._looked_at = now

    async def look(self, now: float) -> None:
        """Advance the alerts of the runs that are, or no longer are, silent for too long."""
        if now - self._looked_at > _ASLEEP_SECONDS:
            self._awake_since = now
        for run_id in await asyncio.to_thread(self._changed, now):
            await asyncio.wrap_future(self._writer.submit(partial(self._enter, run_id=run_id, now=now), run_id))
        self._looked_at = now

    def _changed(self, now: float) -> list[str]:
        """Return the runs whose alert is to be advanced."""
        with self._engine.connect() as connection:
            rows = connection.execute(_open_runs()).all()
        return [row.id for row in rows if self._is_due(row, self._finding(row, now))]

    def _finding(self, row: sa.Row[Any], now: float) -> Finding | None:
        limits = self._configuration.thresholds(row.project).stalled
        heard_at = max(row.last_seen_at, self._awake_since)
        return stalled.find(heard_at, row.usual_interval_seconds, now, row.last_step or 0, limits)

    @staticmethod
    def _is_due(row: sa.Row[Any], finding: Finding | None) -> bool:
        """Return whether there is anything to write; a firing alert stays until the run is heard of again."""
        if finding is not None:
            return bool(row.alert_state != "firing")
        return row.alert_state == "pending" or bool(row.alert_state == "firing" and row.last_seen_at > row.fired_at)

    def _enter(self, connection: sa.Connection, *, run_id: str, now: float) -> None:
        """Advance the alert of one run, if what waited for the writer before this has not changed the matter."""
        runs = schema.runs
        run = connection.execute(sa.select(runs).where(runs.c.id == run_id).with_for_update()).one_or_none()
        row = connection.execute(_open_runs().where(runs.c.id == run_id)).one_or_none()
        if run is None or row is None:
            return
        finding = self._finding(row, now)
        if self._is_due(row, finding):
            book = run_alerts.Book(connection, run, self._configuration, self._public_url)
            book.enter_silence(finding, run.last_step or 0, now)
            book.save()


def _open_runs() -> sa.Select[Any]:
    """Select the runs that have not finished, each with its open alert of this rule."""
    runs, alerts = schema.runs, schema.alerts
    mine = (alerts.c.run == runs.c.id) & (alerts.c.rule == stalled.RULE) & (alerts.c.state != "resolved")
    columns = runs.c["id", "project", "last_seen_at", "usual_interval_seconds", "last_step"]
    return (
        sa.select(*columns, alerts.c.state.label("alert_state"), alerts.c.fired_at)
        .outerjoin(alerts, mine)
        .where(runs.c.finished_at.is_(None))
    )
