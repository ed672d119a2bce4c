"""The alerts of a run, carried from the findings into rows: alerts, transitions and deliveries of one transaction."""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch.wire import deserialise, serialise
from gradwatch_server.alerting import silences
from gradwatch_server.alerting.lifecycle import Alert, Transition, advance, resolve
from gradwatch_server.alerting.routing import choose
from gradwatch_server.diagnosis import Blame, Finding
from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema

RUN_DELETED = "the run was deleted"
_open_alerts = sa.select(schema.alerts).where(
    schema.alerts.c.run == sa.bindparam("of_run"), schema.alerts.c.state != "resolved"
)


class Book:
    """The open alerts of one run within one transaction: enter what each sample shows, then save."""

    def __init__(
        self, connection: sa.Connection, run: sa.Row[Any], configuration: Configuration, public_url: str
    ) -> None:
        self._connection = connection
        self._run = run
        self._configuration = configuration
        self._public_url = public_url
        rows = connection.execute(_open_alerts, {"of_run": run.id}).all()
        self._open: dict[str, tuple[str, Alert]] = {row.rule: (row.id, _from_row(row)) for row in rows}
        self._stored = {alert_id for alert_id, _ in self._open.values()}
        self._closed: list[tuple[str, Alert]] = []
        self._resolved: dict[str, Alert] = {}
        self._told: list[tuple[str, Alert, Transition]] = []
        self._changed: set[str] = set()
        self._muted: dict[str, str | None] = {row.id: row.muted for row in rows}
        self._acknowledged: dict[str, str | None] = {row.id: row.acknowledged_by for row in rows}
        self._silences = silences.load(connection, time.time()) if self._open else None

    def enter(self, findings: Sequence[Finding], step: int, at: float) -> None:
        """Advance every open alert, and those that begin, by one sample."""
        found = {finding.rule: finding for finding in findings}
        rules = (found.keys() | self._open.keys()) - {stalled.RULE}
        for rule in sorted(rules, key=lambda rule: (rule in silences.INHIBITS, rule)):
            self._advance(rule, found.get(rule), step, at)
        self.unmute(step, at)

    def enter_silence(self, finding: Finding | None, step: int, at: float) -> None:
        """Advance the alert for stalling, which goes by the server's clock; no finding: the run is heard of."""
        if finding is not None or stalled.RULE in self._open:
            self._advance(stalled.RULE, finding, step, at)

    def enter_late(self, finding: Finding, step: int, at: float) -> None:
        """Begin an alert that a sample shows which came after later ones; what is open has seen more than it."""
        if finding.rule not in self._open:
            self._advance(finding.rule, finding, step, at)

    def refine(self, rule: str, refined: Callable[[Finding], Finding]) -> None:
        """Change what the open alert of a rule says; what this transaction is about to tell says it too."""
        if rule not in self._open:
            return
        alert_id, before = self._open[rule]
        after = replace(before, finding=refined(before.finding))
        if after != before:
            self._open[rule] = (alert_id, after)
            self._changed.add(alert_id)
            self._told = [(told, after if told == alert_id else alert, change) for told, alert, change in self._told]

    def began(self, rule: str) -> int | None:
        """Return the first step of the open alert of a rule."""
        return self._open[rule][1].first_step if rule in self._open else None

    def tells(self, rule: str) -> bool:
        """Return whether this transaction tells something of the open alert of a rule."""
        return rule in self._open and any(told == self._open[rule][0] for told, _, _ in self._told)

    def unmute(self, step: int, at: float) -> None:
        """Tell of what fires, was not told, and is no longer to be kept quiet."""
        for rule, (alert_id, alert) in self._open.items():
            before = self._muted.get(alert_id)
            if before is None:
                continue
            reason = self._mute(rule, alert_id)
            if reason is None:
                self._told.append((alert_id, alert, Transition("firing", alert.finding.severity, step, at)))
            if reason != before:
                self._set_muted(alert_id, reason)

    def _advance(self, rule: str, finding: Finding | None, step: int, at: float) -> None:
        alert_id, before = self._open.get(rule) or (secrets.token_hex(8), self._last(rule))
        after, transition = advance(before, finding, step, at)
        self._put(rule, alert_id, after, transition)

    def _last(self, rule: str) -> Alert | None:
        """Return the last alert of a rule that has resolved."""
        if rule in self._resolved:
            return self._resolved[rule]
        table = schema.alerts
        row = self._connection.execute(
            sa.select(table)
            .where(table.c.run == self._run.id, table.c.rule == rule, table.c.state == "resolved")
            .order_by(table.c.resolved_at.desc())
            .limit(1)
        ).one_or_none()
        return None if row is None else _from_row(row)

    def _mute(self, rule: str, alert_id: str) -> str | None:
        """Return why an alert of this run is not told now."""
        if self._silences is None:
            self._silences = silences.load(self._connection, time.time())
        firing = [other for other, (_, alert) in self._open.items() if alert.state == "firing"]
        acknowledged_by = self._acknowledged.get(alert_id)
        return silences.muted(self._silences, firing, self._run.project, self._run.id, rule, acknowledged_by)

    def _set_muted(self, alert_id: str, reason: str | None) -> None:
        self._muted[alert_id] = reason
        self._changed.add(alert_id)

    def close(self, step: int, at: float, reason: str) -> None:
        """End every open alert: firing ones resolve with the reason, pending ones are forgotten."""
        for rule, (alert_id, alert) in list(self._open.items()):
            if alert.state == "firing":
                self._put(rule, alert_id, *resolve(alert, step, at, reason))
            else:
                self._put(rule, alert_id, None, None)

    def _put(self, rule: str, alert_id: str, after: Alert | None, transition: Transition | None) -> None:
        before = self._open.pop(rule, None)
        if after is not None and transition is not None:
            if transition.state == "firing" and (reason := self._mute(rule, alert_id)) is not None:
                self._set_muted(alert_id, reason)
            else:
                self._told.append((alert_id, after, transition))
                if transition.state == "firing" and self._muted.get(alert_id) is not None:
                    self._set_muted(alert_id, None)  # else the end of the silence would be told as well
        if after is not None and after.state == "resolved":
            self._closed.append((alert_id, after))
            self._resolved[rule] = after
        elif after is not None:
            self._open[rule] = (alert_id, after)
        if (before[1] if before else None) != after:
            self._changed.add(alert_id)

    def save(self) -> None:
        """Write the alerts as they stand, their transitions and one due delivery a receiver and transition."""
        current = [*self._open.values(), *self._closed]
        forgotten = self._stored - {alert_id for alert_id, _ in current}
        if forgotten:
            self._connection.execute(sa.delete(schema.alerts).where(schema.alerts.c.id.in_(forgotten)))
        for alert_id, alert in current:
            if alert_id not in self._changed:
                continue
            row = _to_row(alert) | {"muted": self._muted.get(alert_id)}
            if alert_id in self._stored:
                statement = sa.update(schema.alerts).where(schema.alerts.c.id == alert_id)
                self._connection.execute(statement.values(row))
            else:
                self._connection.execute(sa.insert(schema.alerts).values(id=alert_id, run=self._run.id, **row))
        for alert_id, alert, transition in self._told:
            self._tell(alert_id, alert, transition)

    def _tell(self, alert_id: str, alert: Alert, transition: Transition) -> None:
        table = schema.transitions
        number = self._connection.execute(
            sa.select(sa.func.coalesce(sa.func.max(table.c.number), 0) + 1).where(table.c.alert == alert_id)
        ).scalar_one()
        transition_id, now = secrets.token_hex(12), time.time()
        self._connection.execute(
            sa.insert(table).values(
                id=transition_id,
                alert=alert_id,
                number=number,
                state=transition.state,
                severity=transition.severity,
                step=transition.step,
                at=transition.at,
                payload=self._payload(alert_id, alert, transition),
            )
        )
        rows = [
            {
                "id": f"msg_{secrets.token_hex(12)}",
                "transition": transition_id,
                "alert": alert_id,
                "number": number,
                "receiver": receiver,
                "state": "due",
                "attempts": 0,
                "due_at": now,
                "leased_until": 0.0,
                "created_at": now,
            }
            for receiver in self._receivers(alert_id, alert.finding.rule, transition)
        ]
        if rows:
            self._connection.execute(sa.insert(schema.deliveries), rows)

    def _receivers(self, alert_id: str, rule: str, transition: Transition) -> list[str]:
        """Return whom to tell; that an alert is over, those who were told of it and no one else."""
        known = [receiver.name for receiver in self._configuration.receivers]
        if transition.state == "firing":
            routes = self._configuration.routes
            return choose(routes, known, self._run.project, rule, transition.severity)
        table = schema.deliveries
        told = self._connection.execute(sa.select(table.c.receiver).where(table.c.alert == alert_id).distinct())
        names = set(told.scalars())
        return [name for name in known if name in names]

    def _payload(self, alert_id: str, alert: Alert, transition: Transition) -> str:
        finding = alert.finding
        body = {
            "type": f"alert.{transition.state}",
            "timestamp": datetime.fromtimestamp(transition.at, UTC).isoformat(),
            "data": {
                "id": alert_id,
                "run": {"id": self._run.id, "name": self._run.name, "project": self._run.project},
                "fingerprint": hashlib.sha256(f"{self._run.id}/{finding.rule}".encode()).hexdigest()[:16],
                "rule": finding.rule,
                "severity": transition.severity,
                "state": transition.state,
                "fired_at": alert.fired_at,
                "resolved_at": alert.resolved_at,
                "step": transition.step,
                "first_step": alert.first_step,
                "fired_step": alert.fired_step,
                "resolved_step": alert.resolved_step,
                "resolution": alert.resolution,
                "parameters": _blamed(finding.parameters),
                "parameters_left_out": finding.left_out,
                "evidence": {name: serialise(value) for name, value in finding.evidence.items()},
                "summary": finding.summary,
                "cause": finding.cause,
                "remedy": finding.remedy,
                "url": f"{self._public_url}/runs/{self._run.id}?step={transition.step}",
            },
        }
        return msgspec.json.encode(body).decode()


def resolve_deleted(
    connection: sa.Connection, run: sa.Row[Any], *, configuration: Configuration, public_url: str
) -> None:
    """Resolve the open alerts of a run that is being deleted, and enqueue the notifications of that."""
    book = Book(connection, run, configuration, public_url)
    book.close(run.last_step or 0, time.time(), RUN_DELETED)
    book.save()


def _blamed(parameters: Sequence[Blame]) -> list[dict[str, Any]]:
    return [
        {"name": blame.name, "value": serialise(blame.value), "limit": serialise(blame.limit)} for blame in parameters
    ]


def _to_row(alert: Alert) -> dict[str, Any]:
    finding = alert.finding
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "state": alert.state,
        "held": alert.held,
        "clear": alert.clear,
        "flaps": alert.flaps,
        "first_step": alert.first_step,
        "fired_step": alert.fired_step,
        "resolved_step": alert.resolved_step,
        "first_at": alert.first_at,
        "fired_at": alert.fired_at,
        "resolved_at": alert.resolved_at,
        "resolution": alert.resolution,
        "hold_samples": finding.hold_samples,
        "clear_samples": finding.clear_samples,
        "parameters": _blamed(finding.parameters),
        "parameters_left_out": finding.left_out,
        "evidence": {name: serialise(value) for name, value in finding.evidence.items()},
        "summary": finding.summary,
        "cause": finding.cause,
        "remedy": finding.remedy,
    }


def _from_row(row: sa.Row[Any]) -> Alert:
    finding = Finding(
        rule=row.rule,
        severity=row.severity,
        first_step=row.first_step,
        parameters=[
            Blame(blame["name"], deserialise(blame["value"]), deserialise(blame["limit"])) for blame in row.parameters
        ],
        left_out=row.parameters_left_out,
        evidence={name: deserialise(value) for name, value in row.evidence.items()},
        summary=row.summary,
        cause=row.cause,
        remedy=row.remedy,
        hold_samples=row.hold_samples,
        clear_samples=row.clear_samples,
    )
    return Alert(
        state=row.state,
        finding=finding,
        first_step=row.first_step,
        first_at=row.first_at,
        held=row.held,
        clear=row.clear,
        flaps=row.flaps,
        resolved_at=row.resolved_at,
        fired_step=row.fired_step,
        fired_at=row.fired_at,
    )
