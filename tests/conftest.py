"""Fixtures for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import GradwatchServer

torch.set_num_threads(1)  # tests run side by side: several threads each would wait for one another


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GradwatchServer]:
    with GradwatchServer(tmp_path / "gradwatch.db") as started:
        yield started


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradwatchServer]:
    """A server for tests that each use a run of their own."""
    with GradwatchServer(tmp_path_factory.mktemp("server") / "gradwatch.db") as started:
        yield started
