"""Queries of runs: lists, one run with its state, the events of its agent."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import orjson
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.errors import Refused
from gradwatch_server.store import schema
from gradwatch_server.store.database import batched
from gradwatch_server.store.parameters import load_parameters_of_runs

RunState = Literal["running", "stalled", "finished"]

MOST_LISTED_SCALARS = 16_384
"""Characters of a run's latest scalars, as JSON, up to which a list tells them."""
MOST_MESSAGE_CHARACTERS = 4_096
"""Longer messages are cut, and say so."""
MOST_KINDS = 100
"""Different kinds of events in one run; all others are stored as ``OTHER_KIND``."""
MOST_RESUMABLE = 20
"""Runs of a job that are told to an agent which looks for one to go on with."""
MOST_EVENTS = 10_000
"""Events that are kept of one run, the newest."""
OTHER_KIND = "other"
RUN_ENDED = "the run has ended"
"""First words of the resolution of an alert that fired until its run ended."""


_runs, _alerts = schema.runs, schema.alerts
_text = sa.cast(_runs.c.scalars, sa.Text)
_listed = sa.select(
    *_runs.c[
        "id", "project", "name", "status", "exit_code", "last_step", "sample_count", "started_at", "last_seen_at",
        "finished_at", "dropped", "parameter_count",
    ],
    sa.case((sa.func.length(_text) <= MOST_LISTED_SCALARS, _text), else_="{}").label("scalars"),
)  # fmt: skip
"""What a list tells of each run: columns of bounded size. Attributes may have a megabyte."""
_stalls = sa.exists().where(
    _alerts.c.run == _runs.c.id,
    _alerts.c.rule == stalled.RULE.name,
    _alerts.c.state == "firing",
    _alerts.c.fired_step.is_not(None),
)
_conditions: dict[RunState, sa.ColumnElement[bool]] = {
    "finished": _runs.c.finished_at.is_not(None),
    "stalled": _runs.c.finished_at.is_(None) & _stalls,
    "running": _runs.c.finished_at.is_(None) & ~_stalls,
}


def select_runs(project: str | None, state: RunState | None) -> sa.Select[Any]:
    """Return the query of the runs of a project and state, or all, unordered; ``describe_runs`` reads its rows."""
    query = _listed
    if project is not None:
        query = query.where(_runs.c.project == project)
    return query if state is None else query.where(_conditions[state])


def describe_runs(connection: sa.Connection, rows: Sequence[sa.RowMapping]) -> list[dict[str, Any]]:
    """Return the documents of a page of runs."""
    firing = _firing(connection, [row["id"] for row in rows])
    return [_run_document(row, _scalars(row["scalars"]), firing.get(row["id"], [])) for row in rows]


def load_active(connection: sa.Connection, since: float, most: int) -> list[dict[str, Any]]:
    """Return the unfinished runs that have reported since a time; the one that reported last comes first.

    Args:
        connection: a connection that reads.
        since: Unix seconds.
        most: most runs; the others are left out.
    """
    active = _listed.where(_runs.c.finished_at.is_(None), _runs.c.last_seen_at >= since)
    rows = connection.execute(active.order_by(_runs.c.last_seen_at.desc(), _runs.c.id).limit(most)).mappings().all()
    return describe_runs(connection, rows)


def count_active(connection: sa.Connection, since: float) -> int:
    """Return the number of unfinished runs that have reported since a time."""
    active = (_runs.c.finished_at.is_(None), _runs.c.last_seen_at >= since)
    return int(connection.execute(sa.select(sa.func.count()).select_from(_runs).where(*active)).scalar_one())


def load_run(connection: sa.Connection, run_id: str) -> dict[str, Any]:
    """Return one run.

    Raises:
        Refused: 404, it does not exist.
    """
    row = connection.execute(sa.select(_runs).where(_runs.c.id == run_id)).mappings().one_or_none()
    if row is None:
        raise unknown_run(run_id)
    run = _run_document(row, row["scalars"], _firing(connection, [run_id]).get(run_id, []))
    return run | {"attributes": row["attributes"]}


def sum_up_projects(connection: sa.Connection) -> Sequence[sa.Row[Any]]:
    """Return of each project its name, runs, unfinished runs, samples, values and when it was last heard of.

    Values are what its samples measured, whether or not their levels have been deleted since. The largest comes first.
    """
    length = sa.func.jsonb_array_length if connection.dialect.name == "postgresql" else sa.func.json_array_length
    values = sa.func.sum(_runs.c.sample_count * _runs.c.parameter_count * length(_runs.c.statistics))
    return connection.execute(
        sa.select(
            _runs.c.project,
            sa.func.count().label("runs"),
            sa.func.count().filter(_runs.c.finished_at.is_(None)).label("unfinished"),
            sa.func.sum(_runs.c.sample_count).label("samples"),
            values.label("measured"),
            sa.func.max(_runs.c.last_seen_at).label("last_seen_at"),
        )
        .group_by(_runs.c.project)
        .order_by(values.desc(), _runs.c.project)
    ).all()


def load_resumable(
    connection: sa.Connection, project: str, job: str | None, run_id: str | None, now: float
) -> list[dict[str, Any]]:
    """Return the runs that did not end by themselves and whose job or id is given, the last started first.

    Args:
        connection: a connection that reads.
        project: the project of the runs.
        job: hexadecimal digits with which the ids of a job's runs begin.
        run_id: the id of one run.
        now: Unix seconds.
    """
    named = _runs.c.id == run_id
    if job is not None:
        named |= _runs.c.id.between(f"run-{job}{'0' * (16 - len(job))}", f"run-{job}{'f' * (16 - len(job))}")
    unfinished = _runs.c.status.is_(None) | (_runs.c.status != "completed")
    query = sa.select(_runs).where(named, _runs.c.project == project, unfinished, _runs.c.deleted_at.is_(None))
    rows = connection.execute(query.order_by(_runs.c.started_at.desc(), _runs.c.id).limit(MOST_RESUMABLE)).all()
    listed = load_parameters_of_runs(connection, [row.id for row in rows])
    samples = schema.samples
    newest = sa.select(sa.func.max(samples.c.step)).where(samples.c.run == sa.bindparam("of_run"), samples.c.level == 0)
    return [
        {
            "id": row.id,
            "attempt": row.attempt,
            "status": row.status,
            "last_step": connection.scalar(newest, {"of_run": row.id}) if row.last_step is None else row.last_step,
            "silent_seconds": max(0.0, now - row.last_seen_at),
            "attributes": row.attributes,
            "parameters": wire.checksum_of_parameters((each.name, each.shape) for each in listed[row.id]),
        }
        for row in rows
    ]


_events = schema.events
_stored_kinds = sa.select(_events.c.kind).where(_events.c.run == sa.bindparam("of_run")).distinct()
_insert_events = sa.insert(_events)
_oldest_kept = (
    sa.select(_events.c.id)
    .where(_events.c.run == sa.bindparam("of_run"))
    .order_by(_events.c.id.desc())
    .offset(MOST_EVENTS - 1)
    .limit(1)
)
_delete_older = sa.delete(_events).where(_events.c.run == sa.bindparam("of_run"), _events.c.id < sa.bindparam("oldest"))


def insert_events(connection: sa.Connection, run_id: str, events: Sequence[wire.Event]) -> None:
    """Store the events of a batch, and delete the oldest ones of the run beyond ``MOST_EVENTS``."""
    kinds = set(connection.execute(_stored_kinds, {"of_run": run_id}).scalars())
    rows = []
    for event in events[-MOST_EVENTS:]:
        known = event.kind in kinds or len(kinds) < MOST_KINDS
        kind = event.kind if known else OTHER_KIND
        kinds.add(kind)
        rows.append({"run": run_id, **msgspec.structs.asdict(event), "kind": kind, "message": cut(event.message)})
    connection.execute(_insert_events, rows)
    oldest = connection.execute(_oldest_kept, {"of_run": run_id}).scalar()
    if oldest is not None:
        connection.execute(_delete_older, {"of_run": run_id, "oldest": oldest})


def cut(message: str) -> str:
    """Return a message of at most ``MOST_MESSAGE_CHARACTERS``; one that was cut says how long it was."""
    if len(message) <= MOST_MESSAGE_CHARACTERS:
        return message
    mark = f"... (cut: {len(message):,} characters)"
    return message[: MOST_MESSAGE_CHARACTERS - len(mark)] + mark


def load_events(connection: sa.Connection, run_id: str) -> list[dict[str, Any]]:
    """Return the last event of each kind that the agent of a run has sent, the newest first."""
    of_kinds = (
        sa.select(sa.func.count().label("count"), sa.func.max(_events.c.id).label("id"))
        .where(_events.c.run == run_id)
        .group_by(_events.c.kind)
        .subquery()
    )
    query = (
        sa.select(*_events.c["kind", "step", "at", "message", "parameter"], of_kinds.c.count)
        .join(of_kinds, of_kinds.c.id == _events.c.id)
        .order_by(_events.c.id.desc())
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


def _firing(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, list[tuple[str, str, bool]]]:
    """Return run -> (severity, rule, fires now) of the alerts of some runs.

    Alerts that fired until the run ended are among them: they say how it ended.
    """
    table = schema.alerts
    until_end = sa.and_(
        table.c.state == "resolved", table.c.resolution.startswith(RUN_ENDED), table.c.rule != stalled.RULE.name
    )
    query = sa.select(*table.c["run", "severity", "rule", "state"]).where(
        sa.or_(table.c.state == "firing", until_end), table.c.fired_step.is_not(None)
    )
    firing: dict[str, list[tuple[str, str, bool]]] = {}
    for some in batched(run_ids):
        for row in connection.execute(query.where(table.c.run.in_(some))):
            firing.setdefault(row.run, []).append((row.severity, row.rule, row.state == "firing"))
    return firing


def _state(row: Mapping[Any, Any], firing: list[tuple[str, str, bool]]) -> RunState:
    """Return the state of a run, which is stalled as long as the alert of that rule fires."""
    if row["finished_at"] is not None:
        return "finished"
    return "stalled" if any(rule == stalled.RULE.name and now for _, rule, now in firing) else "running"


def _scalars(text: str) -> dict[str, Any]:
    """Return the latest scalars from their JSON."""
    numbers: dict[str, Any] = orjson.loads(text)
    return {name: number if isinstance(number, str) else float(number) for name, number in numbers.items()}


def _run_document(
    row: Mapping[Any, Any], scalars: dict[str, Any], firing: list[tuple[str, str, bool]]
) -> dict[str, Any]:
    severity, rule, _ = min(firing, default=(None, None, False))  # "critical" sorts before "warning"
    return {
        "id": row["id"],
        "project": row["project"],
        "name": row["name"],
        "state": _state(row, firing),
        "status": row["status"],
        "exit_code": row["exit_code"],
        "last_step": row["last_step"],
        "sample_count": row["sample_count"],
        "parameter_count": row["parameter_count"],
        "started_at": row["started_at"],
        "last_seen_at": row["last_seen_at"],
        "finished_at": row["finished_at"],
        "firing": sum(now for _, _, now in firing),
        "worst_rule": rule,
        "worst_severity": severity,
        "scalars": scalars,
        "dropped": row["dropped"],
    }
