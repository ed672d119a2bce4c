"""``pytest --unit`` skips what needs more than Python: ``make check`` runs only the tests that are left."""

import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT, environment

TESTS = """
import multiprocessing
import os
import subprocess

import sqlalchemy


def test_plain():
    assert True


def test_program():
    subprocess.run(["true"], check=True)


def test_database():
    sqlalchemy.create_engine("sqlite://").dispose()


def test_process():
    multiprocessing.get_context("spawn").Process().start()


def test_fork():
    os.waitpid(os.fork() or os._exit(0), 0)
"""


def outcomes(folder: Path, *options: str) -> str:
    """Return what pytest says of the tests in a folder, run with the fixtures of this one."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), "-qq"]
    run = subprocess.run(
        [*command, "-rA", *options, str(folder)], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    return run.stdout + run.stderr


def test_only_tests_that_need_no_program_process_or_database_are_run(tmp_path: Path) -> None:
    (tmp_path / "test_kinds.py").write_text(TESTS)
    (tmp_path / "test_browser.py").write_text("from playwright.sync_api import Page\n\ndef test_page(): ...\n")
    seen = outcomes(tmp_path, "--unit")
    assert "PASSED" in seen, seen
    assert [line.rpartition("::")[2] for line in seen.splitlines() if line.startswith("PASSED")] == ["test_plain"]
    for act in ("starts a program", "opens a database", "starts a process", "forks"):
        assert f"no unit test: it {act}" in seen
    assert "test_browser" not in seen


def test_without_the_option_every_test_is_run(tmp_path: Path) -> None:
    (tmp_path / "test_kinds.py").write_text(TESTS.partition("def test_process")[0])
    seen = outcomes(tmp_path)
    passed = [line.rpartition("::")[2] for line in seen.splitlines() if line.startswith("PASSED")]
    assert passed == ["test_plain", "test_program", "test_database"], seen
