"""Life cycle of an alert: pending, firing, resolved. A pure state machine.

A run has at most one open alert per rule. It is pending at first, and fires when the rule has held for ``hold_samples``
samples in a row; a pending alert whose rule stops holding is dropped. A firing alert resolves when the rule has not
held for ``clear_samples`` samples in a row. Flapping is damped: each time an alert fires again within 10 minutes after
it resolved, it needs twice as many clear samples to resolve, up to 16 times as many.
"""

from dataclasses import dataclass, replace
from typing import Literal

from gradwatch_server.diagnosis import Finding
from gradwatch_server.diagnosis.finding import MOST_BLAMED

State = Literal["pending", "firing", "resolved"]
SEVERITIES = ("warning", "critical")
FLAP_SECONDS = 600.0
_MOST_DOUBLINGS = 4


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One rule that holds, or held, for one run."""

    state: State
    finding: Finding
    """The first finding: what is wrong, where, and what to do. Later findings add parameters to it, and a more severe
    one replaces its evidence and texts."""
    first_step: int
    first_at: float
    held: int = 1
    """Number of samples at which the rule held."""
    clear: int = 0
    """Number of samples in a row at which the rule has not held since it last did."""
    flaps: int = 0
    """How many times the alert came back within 10 minutes after it had resolved."""
    fired_step: int | None = None
    fired_at: float | None = None
    resolved_step: int | None = None
    resolved_at: float | None = None
    resolution: str | None = None


@dataclass(frozen=True)
class Transition:
    """A change of an alert that receivers are notified of: it fires, becomes critical, or resolves."""

    state: Literal["firing", "resolved"]
    severity: str
    step: int
    at: float


def advance(
    alert: Alert | None, finding: Finding | None, step: int, at: float
) -> tuple[Alert | None, Transition | None]:
    """Advance an alert by one sample.

    Args:
        alert: the open alert of the rule, or the last resolved one; None if the rule never held.
        finding: the finding of the rule at this sample; None if the rule does not hold.
        step: the sample's step.
        at: the sample's time, Unix seconds.

    Returns:
        The alert after the sample, None if it is dropped, and its transition if it has one.
    """
    flaps = 0
    if alert is not None and alert.state == "resolved":
        flaps = alert.flaps + 1 if at - (alert.resolved_at or 0.0) <= FLAP_SECONDS else 0
        alert = None
    if finding is None:
        return _advance_without_finding(alert, step, at)
    if alert is None:
        started = Alert(state="pending", finding=finding, first_step=finding.first_step, first_at=at, flaps=flaps)
        return _fire_when_held(started, step, at)
    if alert.state == "pending":
        seen = replace(_merge(alert.finding, finding), severity=finding.severity)
        return _fire_when_held(replace(alert, finding=seen, held=alert.held + 1), step, at)
    kept = _merge(alert.finding, finding)
    held = replace(alert, finding=kept, held=alert.held + 1, clear=0)
    return held, Transition("firing", kept.severity, step, at) if kept.severity != alert.finding.severity else None


def _merge(first: Finding, now: Finding) -> Finding:
    """Return the first finding with the parameters of the new one, and with its texts if the new one is more severe."""
    worse = SEVERITIES.index(now.severity) > SEVERITIES.index(first.severity)
    listed = {blame.name for blame in first.parameters}
    blamed = first.parameters + [blame for blame in now.parameters if blame.name not in listed]
    most = max(len(found.parameters) + found.left_out for found in (first, now))
    return replace(
        now if worse else first,
        first_step=first.first_step,
        parameters=blamed[:MOST_BLAMED],
        left_out=max(most, len(blamed)) - len(blamed[:MOST_BLAMED]),
        hold_samples=now.hold_samples,
        clear_samples=now.clear_samples,
    )


def _fire_when_held(alert: Alert, step: int, at: float) -> tuple[Alert, Transition | None]:
    if alert.held < alert.finding.hold_samples:
        return alert, None
    fired = replace(alert, state="firing", fired_step=step, fired_at=at)
    return fired, Transition("firing", alert.finding.severity, step, at)


def _advance_without_finding(alert: Alert | None, step: int, at: float) -> tuple[Alert | None, Transition | None]:
    if alert is None or alert.state == "pending":
        return None, None
    if alert.clear + 1 < alert.finding.clear_samples * 2 ** min(alert.flaps, _MOST_DOUBLINGS):
        return replace(alert, clear=alert.clear + 1), None
    return resolve(alert, step, at, "the condition is gone")


def resolve(alert: Alert, step: int, at: float, reason: str) -> tuple[Alert, Transition]:
    """Resolve a firing alert; ``reason``: why, such as "the run has ended: completed"."""
    resolved = replace(alert, state="resolved", resolved_step=step, resolved_at=at, resolution=reason)
    return resolved, Transition("resolved", alert.finding.severity, step, at)
