"""The life of an alert, pure: pending, firing, resolved.

One alert a run and rule. A finding that holds for ``hold_samples`` samples in a row fires; a firing alert that does not
hold for ``clear_samples`` samples in a row resolves; a pending one that stops holding is forgotten without a word.
One that flaps is damped: each time it fires again within 10 minutes of having resolved, it takes twice as many clear
samples to resolve, up to 16 times as many.
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
    """The first finding that held: what is wrong, where and what to do; later ones add parameters, a worse one its
    evidence."""
    first_step: int
    first_at: float
    held: int = 1
    clear: int = 0
    flaps: int = 0
    """How often it came back soon after it had resolved."""
    fired_step: int | None = None
    fired_at: float | None = None
    resolved_step: int | None = None
    resolved_at: float | None = None
    resolution: str | None = None


@dataclass(frozen=True)
class Transition:
    """One change that people are told about: fired, escalated or resolved."""

    state: Literal["firing", "resolved"]
    severity: str
    step: int
    at: float


def advance(
    alert: Alert | None, finding: Finding | None, step: int, at: float
) -> tuple[Alert | None, Transition | None]:
    """Take one sample's finding of a rule into account.

    Args:
        alert: the alert as it stands, or its last one, resolved; none where the rule never held.
        finding: what the rule found at this sample; none: it does not hold.
        step: the sample's step.
        at: the sample's time, Unix seconds.

    Returns:
        The alert as it stands now (none: forgotten) and the transition to tell, if there is one.
    """
    flaps = 0
    if alert is not None and alert.state == "resolved":
        flaps = alert.flaps + 1 if at - (alert.resolved_at or 0.0) <= FLAP_SECONDS else 0
        alert = None
    if finding is None:
        return _without(alert, step, at)
    if alert is None:
        started = Alert(state="pending", finding=finding, first_step=finding.first_step, first_at=at, flaps=flaps)
        return _fire_when_held(started, step, at)
    if alert.state == "pending":
        seen = replace(_together(alert.finding, finding), severity=finding.severity)
        return _fire_when_held(replace(alert, finding=seen, held=alert.held + 1), step, at)
    kept = _together(alert.finding, finding)
    held = replace(alert, finding=kept, held=alert.held + 1, clear=0)
    return held, Transition("firing", kept.severity, step, at) if kept.severity != alert.finding.severity else None


def _together(first: Finding, now: Finding) -> Finding:
    """Return what was found first, with the parameters that have come since; a worse finding brings its own words."""
    worse = SEVERITIES.index(now.severity) > SEVERITIES.index(first.severity)
    known = {blame.name for blame in first.parameters}
    blamed = first.parameters + [blame for blame in now.parameters if blame.name not in known]
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


def _without(alert: Alert | None, step: int, at: float) -> tuple[Alert | None, Transition | None]:
    if alert is None or alert.state == "pending":
        return None, None
    if alert.clear + 1 < alert.finding.clear_samples * 2 ** min(alert.flaps, _MOST_DOUBLINGS):
        return replace(alert, clear=alert.clear + 1), None
    return resolve(alert, step, at, "the condition is gone")


def resolve(alert: Alert, step: int, at: float, reason: str) -> tuple[Alert, Transition]:
    """End a firing alert, because its condition is gone or its run is over."""
    resolved = replace(alert, state="resolved", resolved_step=step, resolved_at=at, resolution=reason)
    return resolved, Transition("resolved", alert.finding.severity, step, at)
