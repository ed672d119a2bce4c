"""Queries of runs: lists, one run with its state, the events of its agent."""

from collections.abc import Sequence
from typing import Any, Literal

import sqlalchemy as sa

from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.errors import Refused
from gradwatch_server.store import schema

RunState = Literal["running", "stalled", "finished"]

RUN_ENDED = "the run has ended"
"""First words of the resolution of an alert that fired until its run ended."""


def load_runs(connection: sa.Connection, project: str | None, state: RunState | None) -> list[dict[str, Any]]:
    """Return the runs of a project and state, or all; the one that reported last comes first."""
    query = sa.select(schema.runs).order_by(schema.runs.c.last_seen_at.desc(), schema.runs.c.id)
    if project is not None:
        query = query.where(schema.runs.c.project == project)
    rows = connection.execute(query).all()
    firing = _firing(connection)
    runs = [_run_document(row, firing.get(row.id, [])) for row in rows]
    return [run for run in runs if state is None or run["state"] == state]


def load_active(connection: sa.Connection, since: float) -> list[dict[str, Any]]:
    """Return the unfinished runs that have reported since a time; the one that reported last comes first."""
    table = schema.runs
    active = (table.c.finished_at.is_(None), table.c.last_seen_at >= since)
    rows = connection.execute(sa.select(table).where(*active).order_by(table.c.last_seen_at.desc(), table.c.id)).all()
    firing = _firing(connection, sa.select(table.c.id).where(*active))
    return [_run_document(row, firing.get(row.id, [])) for row in rows]


def load_run(connection: sa.Connection, run_id: str) -> dict[str, Any]:
    """Return one run.

    Raises:
        Refused: 404, it does not exist.
    """
    row = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id)).one_or_none()
    if row is None:
        raise unknown_run(run_id)
    return _run_document(row, _firing(connection, [run_id]).get(run_id, []))


def load_events(connection: sa.Connection, run_id: str) -> list[dict[str, Any]]:
    """Return the last event of each kind that the agent of a run has sent, the newest first."""
    table = schema.events
    of_kinds = (
        sa.select(sa.func.count().label("count"), sa.func.max(table.c.id).label("id"))
        .where(table.c.run == run_id)
        .group_by(table.c.kind)
        .subquery()
    )
    query = (
        sa.select(*table.c["kind", "step", "at", "message", "parameter"], of_kinds.c.count)
        .join(of_kinds, of_kinds.c.id == table.c.id)
        .order_by(table.c.id.desc())
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def check_run(connection: sa.Connection, run_id: str) -> None:
    """Check that a run exists.

    Raises:
        Refused: 404, it does not.
    """
    if connection.execute(sa.select(schema.runs.c.id).where(schema.runs.c.id == run_id)).first() is None:
        raise unknown_run(run_id)


def unknown_run(run_id: str) -> Refused:
    """Return the refusal of a request for a run that does not exist: 404."""
    return Refused(404, "Unknown run", f"run {run_id!r} is not known here: GET /api/v1/runs lists those that are")


def _firing(
    connection: sa.Connection, run_ids: Sequence[str] | sa.Select[tuple[str]] | None = None
) -> dict[str, list[tuple[str, str, bool]]]:
    """Return run -> (severity, rule, fires now) of its alerts.

    Alerts that fired until the run ended are among them: they say how it ended.
    """
    table = schema.alerts
    until_end = sa.and_(
        table.c.state == "resolved", table.c.resolution.startswith(RUN_ENDED), table.c.rule != stalled.RULE.name
    )
    query = sa.select(*table.c["run", "severity", "rule", "state"]).where(
        sa.or_(table.c.state == "firing", until_end), table.c.fired_step.is_not(None)
    )
    if run_ids is not None:
        query = query.where(table.c.run.in_(run_ids))
    firing: dict[str, list[tuple[str, str, bool]]] = {}
    for row in connection.execute(query):
        firing.setdefault(row.run, []).append((row.severity, row.rule, row.state == "firing"))
    return firing


def _state(row: sa.Row[Any], firing: list[tuple[str, str, bool]]) -> RunState:
    """Return the state of a run, which is stalled as long as the alert of that rule fires."""
    if row.finished_at is not None:
        return "finished"
    return "stalled" if any(rule == stalled.RULE.name and now for _, rule, now in firing) else "running"


def _run_document(row: sa.Row[Any], firing: list[tuple[str, str, bool]]) -> dict[str, Any]:
    severity, rule, _ = min(firing, default=(None, None, False))  # "critical" sorts before "warning"
    return {
        "id": row.id,
        "project": row.project,
        "name": row.name,
        "state": _state(row, firing),
        "status": row.status,
        "exit_code": row.exit_code,
        "last_step": row.last_step,
        "sample_count": row.sample_count,
        "started_at": row.started_at,
        "last_seen_at": row.last_seen_at,
        "finished_at": row.finished_at,
        "firing": sum(now for _, _, now in firing),
        "worst_rule": rule,
        "worst_severity": severity,
        "scalars": row.scalars,
        "dropped": row.dropped,
        "attributes": row.attributes,
    }
