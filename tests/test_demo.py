"""``gradwatch demo`` with the server killed in the middle; test_release.py runs it undisturbed."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from tests.processes import environment


def _demo(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gradwatch", "demo", "--folder", str(folder)],
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_server_may_be_killed_in_the_middle(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with _demo(folder) as demo:
        output = _kill_in_the_middle(demo)
    assert demo.returncode == 0, output
    assert "the server has died" in output
    with sqlite3.connect(folder / "gradwatch.db") as database:
        runs = database.execute(
            "SELECT run, count(*), count(DISTINCT step), max(step) FROM samples WHERE level = 0 GROUP BY run"
        )
        assert [row[1:] for row in runs] == [(250, 250, 250)] * 4
    database.close()


def _kill_in_the_middle(demo: subprocess.Popen[str]) -> str:
    """Kill the server once the second network has alerted; return all that the demonstration prints."""
    assert demo.stdout is not None
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if "20-sigmoid-layers" in line and "vanishing" in line:
            found = subprocess.run(
                ["pgrep", "-P", str(demo.pid), "-f", "gradwatch serve"], capture_output=True, text=True
            )
            os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
            break
    return "".join([*lines, *demo.stdout])
