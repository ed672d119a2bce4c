"""Diagnosis in a worker process: the findings are the same, and its end changes nothing."""

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
from gradwatch_server.ingest.diagnosis_pool import Diagnosed, DiagnosisPool, diagnose_all
from tests.diagnosis.ticks import network
from tests.processes import PATIENCE_SECONDS, GradwatchServer

PARAMETERS = RunParameters.of(network())
SIZE = len(PARAMETERS.names)


def _samples(seed: int, first: int, count: int) -> list[Sample]:
    """Return samples of a run in which much goes wrong."""
    random = np.random.default_rng([seed, first])
    samples = []
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
        samples.append(Sample(step=step, at=step / 7, statistics=statistics, scalars={"loss": loss}, losses=told))
    return samples


def _same(one: Diagnosed, other: Diagnosed) -> bool:
    told, others = repr(one.findings), repr(other.findings)  # NaN is not equal to itself
    return one.history.to_bytes() == other.history.to_bytes() and told == others


@pytest.fixture
def pool() -> Iterator[DiagnosisPool]:
    """A pool of which this thread's worker takes jobs."""
    made = DiagnosisPool(from_time_share=0.0)
    made.begin(PARAMETERS, History(), _samples(0, 1, 8), Thresholds())()
    assert made.workers[0].is_ready(PATIENCE_SECONDS)
    yield made
    made.close()


@pytest.fixture
def only_there(pool: DiagnosisPool, monkeypatch: pytest.MonkeyPatch) -> DiagnosisPool:
    """Whatever is diagnosed in this process is a failure."""

    def here(*_: object) -> NoReturn:
        raise AssertionError("it was done here")

    monkeypatch.setattr(diagnosis_pool, "diagnose_all", here)
    return pool


def test_a_worker_finds_the_same_bit_for_bit(only_there: DiagnosisPool) -> None:
    rules = set()
    for seed in range(6):
        here = there = History()
        for first in range(1, 80, 8):
            samples = _samples(seed, first, 8)
            expected = diagnose_all(PARAMETERS, here, samples, Thresholds())
            found = only_there.begin(PARAMETERS, there, samples, Thresholds())()
            assert _same(found, expected)
            here, there = expected.history, found.history
            rules |= {finding.rule for findings in found.findings for finding in findings}
    assert {"exploding", "nonfinite"} <= rules


def test_a_single_small_sample_is_not_worth_handing_over(pool: DiagnosisPool) -> None:
    _kill(pool)
    samples = _samples(1, 1, 1)
    assert _same(
        pool.begin(PARAMETERS, History(), samples, Thresholds())(),
        diagnose_all(PARAMETERS, History(), samples, Thresholds()),
    )
    assert pool.workers, "the worker was asked and found to be dead"


def test_networks_too_large_for_the_cache_or_the_pipe_are_diagnosed_too(only_there: DiagnosisPool) -> None:
    parameters = RunParameters.of(network(3_000))
    vector = np.ones(len(parameters.names), np.float32)
    samples = [Sample(step=step, at=0.0, statistics={"grad_norm": vector, "weight_norm": vector}) for step in range(40)]
    expected = diagnose_all(parameters, History(), samples, Thresholds())
    begun = [only_there.begin(parameters, History(), samples, Thresholds()) for _ in range(3)]
    assert all(_same(wait(), expected) for wait in begun)


def test_a_diagnosis_may_begin_before_the_one_before_it_is_done(only_there: DiagnosisPool) -> None:
    stories = [_samples(seed, 1, 8) for seed in range(4)]
    begun = [only_there.begin(PARAMETERS, History(), samples, Thresholds()) for samples in stories]
    for wait, samples in zip(begun, stories, strict=True):
        assert _same(wait(), diagnose_all(PARAMETERS, History(), samples, Thresholds()))


def test_a_result_that_nobody_waits_for_is_not_taken_for_the_next(only_there: DiagnosisPool) -> None:
    only_there.begin(PARAMETERS, History(), _samples(1, 1, 8), Thresholds())
    samples = _samples(2, 1, 8)
    found = only_there.begin(PARAMETERS, History(), samples, Thresholds())()
    assert _same(found, diagnose_all(PARAMETERS, History(), samples, Thresholds()))


def test_signals_to_the_whole_group_do_not_end_the_worker(only_there: DiagnosisPool) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(only_there.workers[0].pid, number)
    samples = _samples(1, 1, 8)
    assert len(only_there.begin(PARAMETERS, History(), samples, Thresholds())().findings) == 8


def _end_between(begin: Callable[[], Callable[[], Diagnosed]], pool: DiagnosisPool) -> Callable[[], Diagnosed]:
    _kill(pool)
    return begin()


def _end_within(begin: Callable[[], Callable[[], Diagnosed]], pool: DiagnosisPool) -> Callable[[], Diagnosed]:
    os.kill(pool.workers[0].pid, signal.SIGSTOP)
    wait = begin()
    _kill(pool)
    return wait


def _kill(pool: DiagnosisPool) -> None:
    pid = pool.workers[0].pid
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
def test_when_the_worker_is_killed_the_samples_are_diagnosed_here(
    pool: DiagnosisPool, end: Callable[..., Callable[[], Diagnosed]], caplog: pytest.LogCaptureFixture
) -> None:
    samples, first = _samples(1, 1, 8), pool.workers[0].pid
    expected = diagnose_all(PARAMETERS, History(), samples, Thresholds())
    wait = end(lambda: pool.begin(PARAMETERS, History(), samples, Thresholds()), pool)
    assert _same(wait(), expected)
    assert f"diagnosis worker {first} has ended" in caplog.text
    assert pool.workers[0].pid != first  # it takes much time again, so there is another


@pytest.mark.parametrize("parameters", [PARAMETERS, RunParameters.of(network(30_000))], ids=["answer", "question"])
def test_a_worker_that_stands_still_is_given_up(
    pool: DiagnosisPool, parameters: RunParameters, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It neither answers nor, where the network is larger than the pipe, reads all of the job."""
    vector = np.ones(len(parameters.names), np.float32)
    samples = [Sample(step=step, at=0.0, statistics={"grad_norm": vector, "weight_norm": vector}) for step in range(8)]
    expected = diagnose_all(parameters, History(), samples, Thresholds())
    monkeypatch.setattr(diagnosis_pool, "_DEADLINE_SECONDS", 0.1)
    first = pool.workers[0].pid
    os.kill(first, signal.SIGSTOP)
    assert _same(pool.begin(parameters, History(), samples, Thresholds())(), expected)
    assert f"diagnosis worker {first} stood still" in caplog.text
    assert pool.workers[0].pid != first


def test_when_the_worker_is_killed_with_two_jobs_both_are_done_here(
    pool: DiagnosisPool, caplog: pytest.LogCaptureFixture
) -> None:
    stories, first = [_samples(1, 1, 8), _samples(2, 1, 8)], pool.workers[0].pid
    os.kill(first, signal.SIGSTOP)
    begun = [pool.begin(PARAMETERS, History(), samples, Thresholds()) for samples in stories]
    _kill(pool)
    for wait, samples in zip(begun, stories, strict=True):
        assert _same(wait(), diagnose_all(PARAMETERS, History(), samples, Thresholds()))
    assert caplog.text.count("has ended") == 1
    (other,) = pool.workers
    assert other.pid != first
    assert other.is_ready(PATIENCE_SECONDS)


def test_if_no_worker_can_be_started_it_goes_on_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pool = DiagnosisPool(from_time_share=0.0)
    for first in (1, 9):
        assert len(pool.begin(PARAMETERS, History(), _samples(1, first, 8), Thresholds())().findings) == 8
    assert caplog.text.count("cannot start a diagnosis worker") == 1


def test_a_worker_that_ends_before_it_takes_a_job_is_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "false")  # as where the interpreter cannot load what it needs
    pool = DiagnosisPool(from_time_share=0.0)
    pool.begin(PARAMETERS, History(), _samples(1, 1, 8), Thresholds())()
    with pytest.raises(EOFError):
        pool.workers[0].is_ready(PATIENCE_SECONDS)
    for first in (9, 17):
        assert len(pool.begin(PARAMETERS, History(), _samples(1, first, 8), Thresholds())().findings) == 8
    assert not pool.workers
    assert caplog.text.count("ended before it took a job") == 1


def test_a_pool_that_is_closed_or_was_not_asked_to_starts_none(pool: DiagnosisPool) -> None:
    pool.close()
    for made in (pool, DiagnosisPool()):
        assert len(made.begin(PARAMETERS, History(), _samples(1, 1, 8), Thresholds())().findings) == 8
        assert not made.workers


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


def test_under_load_the_server_has_a_worker_whose_end_changes_nothing_and_which_ends_with_it(
    own_database_url: str, tmp_path: Path
) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as server:
        load = _Load(server)
        started = load.until(r"diagnosis worker (\d+) is ready")
        with _awaited(int(started[1])):
            os.kill(int(started[1]), signal.SIGKILL)
        again = load.until(rf"diagnosis worker {started[1]} has ended(?s:.*)diagnosis worker (\d+) is ready")
        load.send(np.full(300, np.nan, np.float32))
        assert load.told() == (64 * load.batches, ["nonfinite"])
        with _awaited(int(again[1])):
            server.kill()
