"""Alerts of a run: turns findings into alerts, transitions and notifications, saved in the transaction of the samples.

``RunAlerts`` holds the open alerts of one run for one transaction. It advances them sample by sample, mutes transitions
that a silence, an inhibiting rule or an acknowledgement covers, and routes all others to their receivers.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch.wire import deserialise, serialise
from gradwatch_server import steady_clock
from gradwatch_server.alerting import silences
from gradwatch_server.alerting.lifecycle import Alert, Transition, advance, resolve
from gradwatch_server.diagnosis import Blame, Finding
from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.notify import outbox
from gradwatch_server.settings import Configuration, Route
from gradwatch_server.store import schema
from gradwatch_server.store.prepared import Prepared

RUN_DELETED = "the run was deleted"
_open_alerts = Prepared(
    lambda _: sa.select(schema.alerts).where(
        schema.alerts.c.run == sa.bindparam("of_run"), schema.alerts.c.state != "resolved"
    )
)


class RunAlerts:
    """The alerts of one run within one transaction: advance them with each sample, then save them.

    An alert keeps its id and row while it is open. Muted transitions change the alert but notify nobody.
    """

    def __init__(
        self, connection: sa.Connection, run: sa.Row[Any], configuration: Configuration, public_url: str
    ) -> None:
        self._connection = connection
        self._run = run
        self._configuration = configuration
        self._public_url = public_url
        rows = _open_alerts.all(connection, {"of_run": run.id})
        # By rule: the open alerts with their ids, and the last alert of this transaction that has resolved.
        self._open: dict[str, tuple[str, Alert]] = {row.rule: (row.id, _read_alert(row)) for row in rows}
        self._last_resolved: dict[str, Alert] = {}
        # Alerts that resolved in this transaction, with their ids; transitions of which receivers are notified.
        self._resolved: list[tuple[str, Alert]] = []
        self._notified: list[tuple[str, Alert, Transition]] = []
        # Ids of alerts that have a row already, and of those whose row is to be written.
        self._stored = {alert_id for alert_id, _ in self._open.values()}
        self._changed: set[str] = set()
        # By id: why the alert is muted, and who has acknowledged it.
        self._mute_reasons: dict[str, str | None] = {row.id: row.muted for row in rows}
        self._acknowledged_by: dict[str, str | None] = {row.id: row.acknowledged_by for row in rows}
        self._silences = silences.load(connection, time.time()) if rows else None

    def advance(self, findings: Sequence[Finding], step: int, at: float) -> None:
        """Advance all alerts by one sample, except the one for stalling; ``findings``: those of the sample."""
        found = {finding.rule: finding for finding in findings}
        rules = (found.keys() | self._open.keys()) - {stalled.RULE.name}
        # Rules that more others inhibit come later, so that the inhibiting alert fires first.
        for rule in sorted(rules, key=lambda rule: (len(silences.INHIBITED_BY.get(rule, ())), rule)):
            self._advance_rule(rule, found.get(rule), step, at)
        self.notify_unmuted(step, at)

    def advance_stalled(self, finding: Finding | None, step: int, at: float) -> None:
        """Advance the alert for stalling, whose findings depend on the server's clock; None: the run reports."""
        if finding is not None or stalled.RULE.name in self._open:
            self._advance_rule(stalled.RULE.name, finding, step, at)

    def add_late(self, finding: Finding, step: int, at: float) -> None:
        """Start an alert for a sample that arrived after later ones; an open alert of the rule stays as it is."""
        if finding.rule not in self._open:
            self._advance_rule(finding.rule, finding, step, at)

    def refine(self, rule: str, refined: Callable[[Finding], Finding]) -> None:
        """Change the finding of a rule's open alert, and with it the notifications of this transaction."""
        if rule not in self._open:
            return
        alert_id, before = self._open[rule]
        after = replace(before, finding=refined(before.finding))
        if after != before:
            self._open[rule] = (alert_id, after)
            self._changed.add(alert_id)
            self._notified = [
                (other, after if other == alert_id else alert, transition)
                for other, alert, transition in self._notified
            ]

    def first_step(self, rule: str) -> int | None:
        """Return the step at which the open alert of a rule began; None if there is none."""
        return self._open[rule][1].first_step if rule in self._open else None

    def notifies(self, rule: str) -> bool:
        """Return whether this transaction has a notification of the rule's open alert."""
        return rule in self._open and any(alert_id == self._open[rule][0] for alert_id, _, _ in self._notified)

    def notify_unmuted(self, step: int, at: float) -> None:
        """Notify of firing alerts that are no longer muted."""
        for rule, (alert_id, alert) in self._open.items():
            before = self._mute_reasons.get(alert_id)
            if before is None:
                continue
            reason = self._mute_reason(rule, alert_id)
            if reason is None:
                self._notified.append((alert_id, alert, Transition("firing", alert.finding.severity, step, at)))
            if reason != before:
                self._set_mute_reason(alert_id, reason)

    def resolve_all(self, step: int, at: float, reason: str) -> None:
        """End every open alert: firing ones resolve with this reason, pending ones are deleted."""
        for rule, (alert_id, alert) in list(self._open.items()):
            if alert.state == "firing":
                self._put(rule, alert_id, *resolve(alert, step, at, reason))
            else:
                self._put(rule, alert_id, None, None)

    def save(self) -> None:
        """Write the alerts, the transitions that notify, and a due delivery per transition and receiver."""
        current = [*self._open.values(), *self._resolved]
        deleted = self._stored - {alert_id for alert_id, _ in current}
        if deleted:
            self._connection.execute(sa.delete(schema.alerts).where(schema.alerts.c.id.in_(deleted)))
        for alert_id, alert in current:
            if alert_id in self._changed:
                self._save_alert(alert_id, alert)
        for alert_id, alert, transition in self._notified:
            self._save_notification(alert_id, alert, transition)

    def _advance_rule(self, rule: str, finding: Finding | None, step: int, at: float) -> None:
        alert_id, before = self._open.get(rule) or (secrets.token_hex(8), self._load_last_resolved(rule))
        after, transition = advance(before, finding, step, at)
        self._put(rule, alert_id, after, transition)

    def _load_last_resolved(self, rule: str) -> Alert | None:
        """Return the alert of a rule that resolved last, which tells whether a new one flaps."""
        if rule in self._last_resolved:
            return self._last_resolved[rule]
        table = schema.alerts
        row = self._connection.execute(
            sa.select(table)
            .where(table.c.run == self._run.id, table.c.rule == rule, table.c.state == "resolved")
            .order_by(table.c.resolved_at.desc())
            .limit(1)
        ).one_or_none()
        return None if row is None else _read_alert(row)

    def _put(self, rule: str, alert_id: str, after: Alert | None, transition: Transition | None) -> None:
        """Replace the alert of a rule, or delete it for None; notify of the transition unless the alert is muted."""
        _, before = self._open.pop(rule, (alert_id, None))
        if after is not None and transition is not None:
            self._notify_or_mute(rule, alert_id, after, transition)
        if after is not None and after.state == "resolved":
            self._resolved.append((alert_id, after))
            self._last_resolved[rule] = after
        elif after is not None:
            self._open[rule] = (alert_id, after)
        if before != after:
            self._changed.add(alert_id)

    def _notify_or_mute(self, rule: str, alert_id: str, alert: Alert, transition: Transition) -> None:
        reason = self._mute_reason(rule, alert_id) if transition.state == "firing" else None
        if reason is not None:
            self._set_mute_reason(alert_id, reason)
            return
        self._notified.append((alert_id, alert, transition))
        if transition.state == "firing" and self._mute_reasons.get(alert_id) is not None:
            self._set_mute_reason(alert_id, None)  # else the end of the silence would be notified as well

    def _mute_reason(self, rule: str, alert_id: str) -> str | None:
        """Return why an alert of this run is muted now; None if it is not."""
        if self._silences is None:
            self._silences = silences.load(self._connection, time.time())
        firing = [other for other, (_, alert) in self._open.items() if alert.state == "firing"]
        acknowledged_by = self._acknowledged_by.get(alert_id)
        return silences.mute_reason(self._silences, firing, self._run.project, self._run.id, rule, acknowledged_by)

    def _set_mute_reason(self, alert_id: str, reason: str | None) -> None:
        self._mute_reasons[alert_id] = reason
        self._changed.add(alert_id)

    def _save_alert(self, alert_id: str, alert: Alert) -> None:
        table = schema.alerts
        row = _alert_row(alert) | {"muted": self._mute_reasons.get(alert_id)}
        if alert_id in self._stored:
            self._connection.execute(sa.update(table).where(table.c.id == alert_id).values(row))
        else:
            self._connection.execute(sa.insert(table).values(id=alert_id, run=self._run.id, **row))

    def _save_notification(self, alert_id: str, alert: Alert, transition: Transition) -> None:
        """Write a transition and one due delivery per receiver."""
        table = schema.transitions
        position = self._connection.execute(
            sa.select(sa.func.coalesce(sa.func.max(table.c.number), 0) + 1).where(table.c.alert == alert_id)
        ).scalar_one()
        row = {
            "id": secrets.token_hex(12),
            "alert": alert_id,
            "number": position,
            "state": transition.state,
            "severity": transition.severity,
            "step": transition.step,
            "at": transition.at,
            "payload": self._payload(alert_id, alert, transition),
        }
        self._connection.execute(sa.insert(table).values(row))
        receivers = self._receivers(alert_id, alert.finding.rule, transition)
        outbox.enqueue(self._connection, row, self._fingerprint(alert.finding.rule), receivers, steady_clock.now())

    def _receivers(self, alert_id: str, rule: str, transition: Transition) -> list[str]:
        """Return the names of the receivers to notify; of a resolved alert, only those that were notified before."""
        configured = [receiver.name for receiver in self._configuration.receivers]
        if transition.state == "firing":
            routes = self._configuration.routes
            return matching_receivers(routes, configured, self._run.project, rule, transition.severity)
        table = schema.deliveries
        query = sa.select(table.c.receiver).where(table.c.alert == alert_id).distinct()
        notified = set(self._connection.execute(query).scalars())
        return [name for name in configured if name in notified]

    def _fingerprint(self, rule: str) -> str:
        """Return what all alerts of the rule and this run have in common: receivers identify them by it."""
        return hashlib.sha256(f"{self._run.id}/{rule}".encode()).hexdigest()[:16]

    def _payload(self, alert_id: str, alert: Alert, transition: Transition) -> str:
        """Return the JSON document of docs/alert.schema.json for a transition."""
        finding, run = alert.finding, self._run
        data = {
            "id": alert_id,
            "run": {"id": run.id, "name": run.name, "project": run.project},
            "fingerprint": self._fingerprint(finding.rule),
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
            **_finding_fields(finding),
            "url": f"{self._public_url}/runs/{run.id}?step={transition.step}",
        }
        timestamp = datetime.fromtimestamp(transition.at, UTC).isoformat()
        document = {"type": f"alert.{transition.state}", "timestamp": timestamp, "data": data}
        return msgspec.json.encode(document).decode()


def resolve_deleted(
    connection: sa.Connection, run: sa.Row[Any], *, configuration: Configuration, public_url: str
) -> None:
    """Resolve the open alerts of a run that is being deleted, and enqueue the notifications of that."""
    alerts = RunAlerts(connection, run, configuration, public_url)
    alerts.resolve_all(run.last_step or 0, steady_clock.now(), RUN_DELETED)
    alerts.save()


def matching_receivers(
    routes: Sequence[Route], receivers: Sequence[str], project: str, rule: str, severity: str
) -> list[str]:
    """Return the receivers of every route that matches an alert, each once; without routes, all receivers."""
    if not routes:
        return list(receivers)
    chosen = {name for route in routes if _matches(route, project, rule, severity) for name in route.receivers}
    return [name for name in receivers if name in chosen]


def _matches(route: Route, project: str, rule: str, severity: str) -> bool:
    asked = ((project, route.projects), (rule, route.rules), (severity, route.severities))
    return all(any(fnmatchcase(value, pattern) for pattern in patterns) for value, patterns in asked)


def _finding_fields(finding: Finding) -> dict[str, Any]:
    """Return the part of a finding that an alert's row and its payload have in common, ready for JSON."""
    return {
        "parameters": [
            {"name": blame.name, "value": serialise(blame.value), "limit": serialise(blame.limit)}
            for blame in finding.parameters
        ],
        "parameters_left_out": finding.left_out,
        "evidence": {name: serialise(value) for name, value in finding.evidence.items()},
        "summary": finding.summary,
        "cause": finding.cause,
        "remedy": finding.remedy,
    }


def _alert_row(alert: Alert) -> dict[str, Any]:
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
        **_finding_fields(finding),
    }


def _read_alert(row: sa.Row[Any]) -> Alert:
    return Alert(
        state=row.state,
        finding=_read_finding(row),
        first_step=row.first_step,
        first_at=row.first_at,
        held=row.held,
        clear=row.clear,
        flaps=row.flaps,
        resolved_at=row.resolved_at,
        fired_step=row.fired_step,
        fired_at=row.fired_at,
    )


def _read_finding(row: sa.Row[Any]) -> Finding:
    return Finding(
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
