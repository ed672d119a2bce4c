"""The agent on a simulated accelerator, in processes of their own: torch has one accelerator for each process."""

import subprocess
import sys

from tests.accelerator.plugin import MODULES
from tests.processes import ROOT, environment

COMMAND = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis")


def run(*arguments: str) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_numbers_clipping_and_lifetimes_hold_on_an_accelerator() -> None:
    run("tests/agent/accelerated.py")


def test_what_holds_on_the_cpu_holds_on_an_accelerator_that_lags() -> None:
    run("-p", "tests.accelerator.plugin", *(f"tests/agent/test_{name}.py" for name in MODULES))
