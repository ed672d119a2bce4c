"""A handful of the zoo's trainings through the real agent; all of it is ``make zoo``."""

from pathlib import Path

import pytest
import torch
from benchmarks.zoo.case import Case, holds, train
from benchmarks.zoo.receiver import Recorder
from benchmarks.zoo.split import CASES, REPORTED_FILE, development, draw_report, label, reported, table

import gradwatch
from gradwatch import wire
from gradwatch_server.alerting.lifecycle import Alert, advance
from gradwatch_server.diagnosis import Finding, History, RunParameters, Sample, Thresholds, diagnose
from gradwatch_server.ingest.validation import with_states

DEVELOPMENT = {case.name: case for case in development()}
FAST_HEALTHY = (
    "rezero",
    "two-heads",
    "noisy-labels",
    "deep-linear",
    "rmsprop",
    "scalar-to-scalar",
    "converged-to-a-floor",
    "frozen-backbone",
    "turns-by-rates",
)
FAST_SICK = (
    "deep-softsign",
    "softmax-scale",
    "negative-bias",
    "mostly-negative-bias",
    "large-init",
    "chaotic-tanh",
    "unscaled-inputs",
    "root-of-zero",
)


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path))
    torch.set_num_threads(1)


def watched(case: Case, seed: int) -> list[tuple[int, Finding]]:
    """Train under the agent; return the alerts that fire with their steps."""
    with Recorder() as recorder:
        training = case.build(seed)
        agent = gradwatch.attach(training.model, None, url=recorder.url, every=1, clip=training.clip)
        result = train(training, case.steps, case.onset)
        agent.close(timeout_seconds=30)
    assert holds(case, result)
    assert recorder.registration is not None
    parameters, history = RunParameters.of(recorder.registration.parameters), History()
    alerts: dict[str, Alert | None] = {}
    fired = []
    losses = {step: loss for batch in recorder.batches for step, loss in _losses(batch)}
    for batch in recorder.batches:
        for sample in with_states(batch).samples:
            scalars = {name: wire.deserialise(value) for name, value in sample.scalars.items()}
            scalars["loss"] = losses[sample.step]
            measured = Sample(step=sample.step, at=sample.at, statistics=sample.statistics, scalars=scalars)
            history, findings = diagnose(parameters, history, measured, Thresholds())
            found = {finding.rule: finding for finding in findings}
            for rule in found.keys() | alerts.keys():
                alerts[rule], transition = advance(alerts.get(rule), found.get(rule), sample.step, sample.at)
                if transition is not None and transition.state == "firing":
                    fired.append((sample.step, found[rule]))
    return fired


def _losses(batch: wire.Batch) -> list[tuple[int, float]]:
    trail = batch.trail.get("loss")
    return [] if trail is None else list(zip(trail.steps, map(wire.deserialise, trail.values), strict=True))


@pytest.mark.parametrize("name", FAST_HEALTHY)
def test_healthy_runs_stay_quiet(name: str) -> None:
    assert watched(DEVELOPMENT[name], seed=3) == []


@pytest.mark.parametrize("name", FAST_SICK)
def test_sick_runs_alert(name: str) -> None:
    case = DEVELOPMENT[name]
    hits = [(step, finding) for step, finding in watched(case, seed=3) if finding.rule == case.rule]
    step, finding = hits[0]
    assert case.onset <= step <= case.onset + 12
    assert case.blames(finding.parameters[0].name)


def test_every_case_has_a_name_and_a_label_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    sick = [case for case in CASES if case.rule is not None]
    assert all(case.twin is not None for case in sick)
    rules = {"vanishing", "dead", "exploding", "nonfinite", "throttled", "unmoved", "slow"}
    assert {case.rule for case in sick} == rules


def test_the_reported_half_is_the_one_that_was_drawn_with_its_labels() -> None:
    assert REPORTED_FILE.read_text() == table(draw_report())
    healthy = [label(case) for case in reported() if case.rule is None]
    assert len(healthy) >= 60
    assert sum(name != "healthy" for name in healthy) >= len(healthy) / 3


def test_the_halves_share_no_program() -> None:
    assert not set(DEVELOPMENT) & {case.name for case in reported()}
    assert len(DEVELOPMENT) + len(reported()) == len(CASES)
    kinds = [{label(case) for case in half if case.rule != "throttled"} for half in (development(), reported())]
    assert kinds[0] == kinds[1]
