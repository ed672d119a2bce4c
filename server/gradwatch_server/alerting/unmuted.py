"""The clock behind silences: what fires and was not told is told as soon as the reason is gone, without a sample."""

import asyncio
from functools import partial
from typing import Any

import sqlalchemy as sa

from gradwatch_server.alerting import run_alerts, silences
from gradwatch_server.alerting.ticker import Clock
from gradwatch_server.store import schema


class Untold(Clock):
    """Looks for alerts that no silence, acknowledgement or other rule keeps quiet any more."""

    async def look(self, now: float) -> None:
        """Tell what nothing keeps quiet any more."""
        for run_id in await asyncio.to_thread(self._audible, now):
            await asyncio.wrap_future(self._writer.submit(partial(self._tell, run_id=run_id, now=now), run_id))

    def _audible(self, now: float) -> list[str]:
        """Return the runs with an alert that was not told and that nothing keeps quiet any more."""
        alerts, runs = schema.alerts, schema.runs
        columns = alerts.c["run", "rule", "acknowledged_by"]
        untold: sa.Select[Any] = sa.select(*columns, runs.c.project).join(runs, runs.c.id == alerts.c.run)
        with self._engine.connect() as connection:
            quiet = untold.where(alerts.c.state == "firing", alerts.c.muted.is_not(None))
            rows = connection.execute(quiet).all()
            if not rows:
                return []
            silenced = silences.load(connection, now)
            inhibiting = _inhibiting(connection)
        return sorted({row.run for row in rows if _reason(row, silenced, inhibiting) is None})

    def _tell(self, connection: sa.Connection, *, run_id: str, now: float) -> None:
        runs = schema.runs
        run = connection.execute(sa.select(runs).where(runs.c.id == run_id).with_for_update()).one_or_none()
        if run is None:
            return
        book = run_alerts.Book(connection, run, self._configuration, self._public_url)
        book.unmute(run.last_step or 0, now)
        book.save()


def _inhibiting(connection: sa.Connection) -> dict[str, list[str]]:
    """Return, by run, the rules that fire and inhibit others."""
    table, found = schema.alerts, dict[str, list[str]]()
    fires = sa.select(table.c.run, table.c.rule).where(table.c.state == "firing")
    for row in connection.execute(fires.where(table.c.rule.in_(set(silences.INHIBITS.values())))):
        found.setdefault(row.run, []).append(row.rule)
    return found


def _reason(row: sa.Row[Any], silenced: list[silences.Silence], inhibiting: dict[str, list[str]]) -> str | None:
    firing = inhibiting.get(row.run, [])
    return silences.muted(silenced, firing, row.project, row.run, row.rule, row.acknowledged_by)
