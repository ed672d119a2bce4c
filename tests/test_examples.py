"""Each script of ``examples/``, run as its first lines say, against a real server."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, GradwatchServer, environment

EXAMPLES = {
    "plain_loop.py": {"plain loop": 200},
    "lightning_fit.py": {"lightning": 64},
    "transformers_trainer.py": {"transformers": 40},
    "fsdp2.py": {"fsdp2": 60},
    "sweep.py": {"sweep lr=0.001": 60, "sweep lr=0.03": 60, "sweep lr=30.0": 60},
    "policy_gradient.py": {"policy gradient": 150},
}
"""The runs that each makes, and their last steps."""
SICK = {"sweep.py": {"sweep lr=30.0"}}
"""Runs that alert."""
ENDLESS = "endless.py"
"""Has no end; the demonstration of docker-compose.yml runs it."""
MOST_LINES = 60


def test_each_example_is_run_and_short() -> None:
    scripts = {script.name: len(script.read_text().splitlines()) for script in (ROOT / "examples").glob("*.py")}
    assert set(scripts) == {*EXAMPLES, ENDLESS}
    assert not {name: lines for name, lines in scripts.items() if lines > MOST_LINES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_makes_its_runs(name: str, server: GradwatchServer, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if name == "fsdp2.py" else []
    subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / name)],
        env=environment(GRADWATCH_URL=server.url, GRADWATCH_SPOOL_DIR=str(tmp_path / "spool")),
        cwd=tmp_path,
        check=True,
        timeout=400,
    )
    runs = {run["name"]: run for run in server.get("/api/v1/runs?project=examples")}
    assert {name: run["last_step"] for name, run in runs.items()} == EXAMPLES[name]
    assert {run["status"] for run in runs.values()} == {"completed"}
    alerted = {name for name, run in runs.items() if run["worst_rule"] is not None}
    assert alerted == SICK.get(name, set())
