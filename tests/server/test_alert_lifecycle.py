"""Life cycle of an alert: tables of findings by sample, with the states and transitions that follow."""

from dataclasses import replace

import pytest

from gradwatch_server.alerting.lifecycle import Alert, advance, resolve
from gradwatch_server.diagnosis import Blame, Finding

FINDING = Finding(
    rule="exploding",
    severity="warning",
    first_step=1,
    parameters=[],
    summary="",
    cause="",
    remedy="",
    hold_samples=3,
    clear_samples=2,
)
WORSE = replace(FINDING, severity="critical")


def _advance_all(ticks: str) -> tuple[list[str], list[str]]:
    """Return the states and transitions of an alert over samples: '.' clear, 'w' warning, 'c' critical."""
    alert: Alert | None = None
    states: list[str] = []
    transitions: list[str] = []
    for step, tick in enumerate(ticks, 1):
        finding = {".": None, "w": FINDING, "c": WORSE}[tick]
        alert, transition = advance(alert, finding, step, float(step))
        states.append(alert.state if alert else "-")
        if transition:
            transitions.append(f"{step} {transition.state} {transition.severity}")
    return states, transitions


@pytest.mark.parametrize(
    ("ticks", "last_state", "expected"),
    [
        ("ww", "pending", []),
        ("www", "firing", ["3 firing warning"]),
        ("ww.www", "firing", ["6 firing warning"]),
        ("ww.ww.ww.", "-", []),
        ("www.", "firing", ["3 firing warning"]),
        ("www.w.w.w", "firing", ["3 firing warning"]),
        ("www..", "resolved", ["3 firing warning", "5 resolved warning"]),
        ("www..www", "firing", ["3 firing warning", "5 resolved warning", "8 firing warning"]),
        ("wwwwc", "firing", ["3 firing warning", "5 firing critical"]),
        ("wwwcw..", "resolved", ["3 firing warning", "4 firing critical", "7 resolved critical"]),
    ],
)
def test_states_and_transitions_over_samples(ticks: str, last_state: str, expected: list[str]) -> None:
    states, transitions = _advance_all(ticks)
    assert states[-1] == last_state
    assert transitions == expected


def test_with_hold_samples_1_the_first_finding_fires() -> None:
    alert, transition = advance(None, replace(FINDING, hold_samples=1), 7, 7.0)
    assert alert is not None
    assert (alert.state, alert.fired_step) == ("firing", 7)
    assert transition is not None


def test_a_run_that_ends_resolves_its_alert_with_the_reason() -> None:
    alert, _ = advance(None, replace(FINDING, hold_samples=1), 7, 7.0)
    assert alert is not None
    resolved, transition = resolve(alert, 9, 9.0, "the run has ended")
    assert (resolved.state, resolved.resolved_step, resolved.resolution) == ("resolved", 9, "the run has ended")
    assert transition.state == "resolved"


def _blaming(*names: str, left_out: int = 0, severity: str = "warning", summary: str = "first") -> Finding:
    parameters = [Blame(name, 1.0, 0.0) for name in names]
    return replace(
        FINDING, hold_samples=1, parameters=parameters, left_out=left_out, severity=severity, summary=summary
    )


def test_the_first_evidence_stays_and_later_parameters_are_added() -> None:
    alert, _ = advance(None, _blaming("c", "b", left_out=3), 7, 7.0)
    alert, transition = advance(alert, replace(_blaming("a", "b", summary="later"), first_step=9), 9, 9.0)
    assert alert is not None
    assert transition is None
    assert [blame.name for blame in alert.finding.parameters] == ["c", "b", "a"]
    assert (alert.finding.left_out, alert.finding.summary, alert.first_step) == (2, "first", 1)
    alert, transition = advance(alert, _blaming("d", severity="critical", summary="worse"), 10, 10.0)
    assert alert is not None
    assert transition is not None
    assert [blame.name for blame in alert.finding.parameters] == ["c", "b", "a", "d"]
    assert (alert.finding.summary, alert.finding.first_step, alert.finding.left_out) == ("worse", 1, 1)


def test_at_most_twenty_are_kept() -> None:
    alert, _ = advance(None, _blaming(*"abcdefghijklmno"), 7, 7.0)
    alert, _ = advance(alert, _blaming(*"ABCDEFGHIJ"), 8, 8.0)
    assert alert is not None
    assert "".join(blame.name for blame in alert.finding.parameters) == "abcdefghijklmnoABCDE"
    assert alert.finding.left_out == 5
