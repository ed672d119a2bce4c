"""Fixtures for all tests, and the option ``--unit``, by which ``make check`` chooses the tests that it runs."""

import contextlib
import multiprocessing.process
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy as sa
import torch
from hypothesis import HealthCheck, settings

from gradwatch import wire
from gradwatch.agent import Agent
from gradwatch.samples.collector import Collector
from gradwatch_server.store.database import open_engine, prepare
from tests.postgres import migrated_database, postgres_server
from tests.processes import PATIENCE_SECONDS, GradwatchServer

settings.register_profile(
    "calm", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("calm")
torch.set_num_threads(1)  # tests run side by side: several threads each would wait for one another


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option ``--unit``."""
    parser.addoption("--unit", action="store_true", help="skip tests that need a program, a process or a database")


_SYSTEM = re.compile(
    r"^(?:from|import) (?:benchmarks\.(?:paper|zoo)|gradwatch\.integrations|playwright|schemathesis)\b", re.MULTILINE
)
"""Imports whole trainings, a framework for them, a browser or a client that draws requests: that takes seconds."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--unit``, leave out the modules, and the folders whose ``conftest.py``, import one of these."""
    source = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    if config.getoption("--unit") and source.suffix == ".py" and source.is_file():
        return True if _SYSTEM.search(source.read_text()) else None
    return None


@pytest.fixture(scope="session", autouse=True)
def _unit_tests_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--unit``, skip a test as soon as it starts a program or a process, or opens a database of the server.

    What a test does decides, so that no list of tests has to be kept.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--unit"):
            patch.setattr(subprocess.Popen, "_execute_child", _skipping("starts a program"))
            patch.setattr(os, "fork", _skipping("forks"))
            patch.setattr(multiprocessing.process.BaseProcess, "start", _skipping("starts a process"))
            patch.setattr(sa, "create_engine", _skipping("opens a database"))
        yield


def _skipping(act: str) -> Callable[..., NoReturn]:
    def skip(*_: object, **__: object) -> NoReturn:
        pytest.skip(f"no unit test: it {act}")

    return skip


def pytest_configure() -> None:
    """Keep what tests write in memory where there is room: a shared disk takes seconds for a write at times."""
    with contextlib.suppress(OSError):
        if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free >= 4 << 30:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


@pytest.fixture(autouse=True)
def _patient_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a training all that a test looks for is waited for, however busy the machine is."""
    monkeypatch.setattr(Agent.close, "__defaults__", (PATIENCE_SECONDS,))


@pytest.fixture
def patient_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an agent is closed without its server: the disk is waited for all the same."""
    finish = Collector.finish

    def patient(self: Collector, end: wire.End | None, _seconds: float, *, device_failed: bool) -> None:
        finish(self, end, PATIENCE_SECONDS, device_failed=device_failed)

    monkeypatch.setattr(Collector, "finish", patient)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real PostgreSQL; the address of a database from which others are made."""
    with postgres_server() as url:
        yield url


def _empty_database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('database') / 'gradwatch.db'}"
        return
    with migrated_database(request.getfixturevalue("postgres")) as url:
        yield url


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A migrated, empty database of each engine in turn, shared by a module's tests."""
    yield from _empty_database(request, tmp_path_factory)


@pytest.fixture(scope="module")
def engine(database_url: str) -> Iterator[sa.Engine]:
    """The tests' database of each engine in turn, open."""
    opened = open_engine(database_url)
    prepare(opened)
    yield opened
    opened.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def own_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A migrated, empty database of each engine in turn, of one test alone."""
    yield from _empty_database(request, tmp_path_factory)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GradwatchServer]:
    with GradwatchServer(tmp_path / "gradwatch.db") as started:
        yield started


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[GradwatchServer]:
    """A server over each engine in turn, for tests that each use a run of their own."""
    with GradwatchServer(tmp_path_factory.mktemp("server") / "gradwatch.db", url=database_url) as started:
        yield started
