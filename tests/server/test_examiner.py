"""The diagnosis in a process beside the server: what it finds is the same, and its end changes nothing."""

import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from gradwatch import wire
from gradwatch_server.diagnosis import History, RunParameters, Sample, Thresholds
from gradwatch_server.ingest import diagnosis_pool
from gradwatch_server.ingest.diagnosis_pool import Examiner
from gradwatch_server.ingest.diagnosis_worker import Examined, examine_all
from tests.diagnosis.ticks import network
from tests.processes import PATIENCE_SECONDS, GradwatchServer

LAYOUT = RunParameters.of(network())
SIZE = len(LAYOUT.names)


def _readings(seed: int, first: int, count: int) -> list[Sample]:
    """Return samples of a run in which much goes wrong."""
    random = np.random.default_rng([seed, first])
    readings = []
    for step in range(first, first + count):
        gradients = random.lognormal(-3.0 + seed * step / 20, 0.2, SIZE).astype(np.float32)
        gradients[random.random(SIZE) < 0.1 * (step % 3 == 0)] = random.choice([0.0, wire.MISSING, np.nan, np.inf])
        statistics: dict[wire.Statistic, wire.Vector] = {
            "grad_norm": gradients,
            "weight_norm": random.lognormal(1.0, 0.5, SIZE).astype(np.float32),
            "nonfinite_count": (~np.isfinite(gradients)).astype(np.float32),
            "zero_unit_share": (gradients == 0.0).astype(np.float32),
        }
        loss = float(2.0 + 0.1 * step)
        told = [(step, loss)] if seed % 2 else []
        readings.append(Sample(step=step, at=step / 7, statistics=statistics, scalars={"loss": loss}, losses=told))
    return readings


def _same(one: Examined, other: Examined) -> bool:
    told, others = repr(one.findings), repr(other.findings)  # NaN is not equal to itself
    return one.memory.to_bytes() == other.memory.to_bytes() and told == others


@pytest.fixture
def examiner() -> Iterator[Examiner]:
    """An examiner of which this thread's process takes jobs."""
    made = Examiner(from_share=0.0)
    made.begin(LAYOUT, History(), _readings(0, 1, 1), Thresholds())()
    assert made.processes[0].takes_jobs(PATIENCE_SECONDS)
    yield made
    made.close()


@pytest.fixture
def only_there(examiner: Examiner, monkeypatch: pytest.MonkeyPatch) -> Examiner:
    """Whatever is looked at in this process is a failure."""

    def here(*_: object) -> NoReturn:
        raise AssertionError("it was done here")

    monkeypatch.setattr(diagnosis_pool, "examine_all", here)
    return examiner


def test_what_the_process_finds_is_the_same_bit_for_bit(only_there: Examiner) -> None:
    rules = set()
    for seed in range(6):
        here = there = History()
        for first in range(1, 80, 8):
            readings = _readings(seed, first, 8)
            expected = examine_all(LAYOUT, here, readings, Thresholds())
            found = only_there.begin(LAYOUT, there, readings, Thresholds())()
            assert _same(found, expected)
            here, there = expected.memory, found.memory
            rules |= {finding.rule for findings in found.findings for finding in findings}
    assert {"exploding", "nonfinite"} <= rules


def test_networks_too_large_to_be_kept_or_to_wait_in_the_pipe_are_looked_at_too(only_there: Examiner) -> None:
    layout = RunParameters.of(network(3_000))
    vector = np.ones(len(layout.names), np.float32)
    readings = [
        Sample(step=step, at=0.0, statistics={"grad_norm": vector, "weight_norm": vector}) for step in range(40)
    ]
    expected = examine_all(layout, History(), readings, Thresholds())
    begun = [only_there.begin(layout, History(), readings, Thresholds()) for _ in range(3)]
    assert all(_same(examined(), expected) for examined in begun)


def test_a_look_may_begin_before_the_one_before_it_is_done(only_there: Examiner) -> None:
    stories = [_readings(seed, 1, 8) for seed in range(4)]
    begun = [only_there.begin(LAYOUT, History(), readings, Thresholds()) for readings in stories]
    for examined, readings in zip(begun, stories, strict=True):
        assert _same(examined(), examine_all(LAYOUT, History(), readings, Thresholds()))


def test_a_look_that_nobody_waits_for_is_not_taken_for_the_next(only_there: Examiner) -> None:
    only_there.begin(LAYOUT, History(), _readings(1, 1, 8), Thresholds())
    readings = _readings(2, 1, 8)
    found = only_there.begin(LAYOUT, History(), readings, Thresholds())()
    assert _same(found, examine_all(LAYOUT, History(), readings, Thresholds()))


def test_signals_to_the_whole_group_do_not_end_the_process(only_there: Examiner) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(only_there.processes[0].pid, number)
    readings = _readings(1, 1, 8)
    assert len(only_there.begin(LAYOUT, History(), readings, Thresholds())().findings) == 8


def _end_between(begin: Callable[[], Callable[[], Examined]], examiner: Examiner) -> Callable[[], Examined]:
    _kill(examiner)
    return begin()


def _end_within(begin: Callable[[], Callable[[], Examined]], examiner: Examiner) -> Callable[[], Examined]:
    os.kill(examiner.processes[0].pid, signal.SIGSTOP)
    examined = begin()
    _kill(examiner)
    return examined


def _kill(examiner: Examiner) -> None:
    pid = examiner.processes[0].pid
    with _awaited(pid):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def _awaited(pid: int) -> Iterator[None]:
    """End a process, which need not be a child of this one, within; wait until it has ended."""
    handle = os.pidfd_open(pid)
    try:
        yield
        assert select.select([handle], [], [], PATIENCE_SECONDS)[0], "it runs on"
    finally:
        os.close(handle)


@pytest.mark.parametrize("end", [_end_between, _end_within])
def test_when_the_process_is_killed_the_samples_are_looked_at_here(
    examiner: Examiner, end: Callable[..., Callable[[], Examined]], caplog: pytest.LogCaptureFixture
) -> None:
    readings, first = _readings(1, 1, 8), examiner.processes[0].pid
    expected = examine_all(LAYOUT, History(), readings, Thresholds())
    examined = end(lambda: examiner.begin(LAYOUT, History(), readings, Thresholds()), examiner)
    assert _same(examined(), expected)
    assert f"process {first}, which did the diagnosis, has ended" in caplog.text
    assert examiner.processes[0].pid != first  # it takes much time again, so there is another


def test_when_the_process_is_killed_with_two_jobs_both_are_done_here(
    examiner: Examiner, caplog: pytest.LogCaptureFixture
) -> None:
    stories, first = [_readings(1, 1, 8), _readings(2, 1, 8)], examiner.processes[0].pid
    os.kill(first, signal.SIGSTOP)
    begun = [examiner.begin(LAYOUT, History(), readings, Thresholds()) for readings in stories]
    _kill(examiner)
    for examined, readings in zip(begun, stories, strict=True):
        assert _same(examined(), examine_all(LAYOUT, History(), readings, Thresholds()))
    assert caplog.text.count("has ended") == 1
    (other,) = examiner.processes
    assert other.pid != first
    assert other.takes_jobs(PATIENCE_SECONDS)


def test_where_no_process_can_be_had_it_goes_on_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    examiner = Examiner(from_share=0.0)
    for first in (1, 9):
        assert len(examiner.begin(LAYOUT, History(), _readings(1, first, 8), Thresholds())().findings) == 8
    assert caplog.text.count("no process for the diagnosis") == 1


def test_a_process_that_ends_before_it_takes_a_job_is_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "false")  # as where the interpreter cannot load what it needs
    examiner = Examiner(from_share=0.0)
    examiner.begin(LAYOUT, History(), _readings(1, 1, 8), Thresholds())()
    with pytest.raises(EOFError):
        examiner.processes[0].takes_jobs(PATIENCE_SECONDS)
    for first in (9, 17):
        assert len(examiner.begin(LAYOUT, History(), _readings(1, first, 8), Thresholds())().findings) == 8
    assert not examiner.processes
    assert caplog.text.count("ended before it took a job") == 1


def test_an_examiner_that_is_closed_or_was_not_asked_to_starts_none(examiner: Examiner) -> None:
    examiner.close()
    for made in (examiner, Examiner()):
        assert len(made.begin(LAYOUT, History(), _readings(1, 1, 8), Thresholds())().findings) == 8
        assert not made.processes


class _Load:
    """Sends large batches of one run."""

    def __init__(self, server: GradwatchServer) -> None:
        self._server = server
        self._run = server.register([f"{place}.weight" for place in range(300)])
        self._draw = np.random.default_rng(0).lognormal(-3, 0.1, 300).astype(np.float32)
        self.batches = 0

    def send(self, gradients: wire.Vector | None = None) -> None:
        drawn = self._draw if gradients is None else gradients
        statistics: dict[wire.Statistic, wire.Vector] = {"grad_norm": drawn, "weight_norm": self._draw}
        first = 64 * self.batches
        listed = [wire.Sample(step=first + step, at=1.79e9 + first + step, statistics=statistics) for step in range(64)]
        answer = self._server.store(self._run, wire.Batch(id=f"b{self.batches}", samples=listed))
        assert answer.status_code == 200, answer.text
        self.batches += 1

    def until(self, pattern: str) -> re.Match[str]:
        """Send until the server's log has it."""
        for _ in range(2_000):
            self.send()
            found = re.search(pattern, self._server.log.read_text())
            if found is not None:
                return found
        raise AssertionError(self._server.log.read_text())

    def told(self) -> Any:
        """Return what is stored: how many samples, and the rules of the alerts."""
        alerts = self._server.get("/api/v1/alerts", run=self._run)
        return self._server.get(f"/api/v1/runs/{self._run}")["sample_count"], [alert["rule"] for alert in alerts]


def test_under_load_the_server_has_a_process_whose_end_changes_nothing_and_which_ends_with_it(
    own_database_url: str, tmp_path: Path
) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as server:
        load = _Load(server)
        started = load.until(r"process (\d+) does the diagnosis")
        with _awaited(int(started[1])):
            os.kill(int(started[1]), signal.SIGKILL)
        again = load.until(rf"process {started[1]}, which did .* has ended(?s:.*)process (\d+) does the diagnosis")
        load.send(np.full(300, np.nan, np.float32))
        assert load.told() == (64 * load.batches, ["nonfinite"])
        with _awaited(int(again[1])):
            server.kill()
