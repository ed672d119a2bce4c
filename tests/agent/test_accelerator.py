"""The agent on a simulated accelerator, in a process of its own: torch has one accelerator for each process."""

import subprocess
import sys

from tests.processes import ROOT, environment


def test_numbers_clipping_and_lifetimes_hold_on_an_accelerator() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis"]
    command += ["tests/agent/accelerated.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
