"""``gradwatch run``: the agent attached to programs that know nothing of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import GradwatchServer, environment

SCRIPT = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(12):
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
print("weights", sum(p.sum().item() for p in model.parameters()))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def _run(
    server: GradwatchServer, tmp_path: Path, *command: str, options: tuple[str, ...] = (), **changes: str
) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-m", "gradwatch", "run", "--url", server.url, "--every", "1", *options, "--", *command]
    surroundings = environment(GRADWATCH_SPOOL_DIR=str(tmp_path / "spool"), **changes)
    return subprocess.run(given, env=surroundings, cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_a_plain_script_is_watched_and_left_as_it_is(server: GradwatchServer, tmp_path: Path, script: Path) -> None:
    bare = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    watched = _run(server, tmp_path, sys.executable, str(script), options=("--project", "zero"))
    assert (watched.returncode, watched.stdout, watched.stderr) == (0, bare.stdout, "")
    (run,) = server.get("/api/v1/runs", project="zero")
    assert run["name"].startswith("train-")
    assert (run["state"], run["status"], run["exit_code"]) == ("finished", "completed", 0)
    assert (run["last_step"], run["sample_count"]) == (12, 12)
    names = [entry["name"] for entry in server.get(f"/api/v1/runs/{run['id']}")["parameters"]]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert server.get(f"/api/v1/runs/{run['id']}/series", statistic="loss")["steps"] == list(range(1, 13))


def test_a_module_is_watched(server: GradwatchServer, tmp_path: Path, script: Path) -> None:
    assert _run(server, tmp_path, sys.executable, "-m", "train", options=("--run", "as-module")).returncode == 0
    (run,) = server.get("/api/v1/runs")
    assert (run["name"], run["last_step"]) == ("as-module", 12)


@pytest.mark.parametrize(("line", "code"), [("sys.exit(7)", 7), ("raise ValueError('ours')", 1)])
def test_the_exit_code_is_the_commands_own(
    server: GradwatchServer, tmp_path: Path, script: Path, line: str, code: int
) -> None:
    script.write_text(f"{SCRIPT}\n{line}\n")
    assert _run(server, tmp_path, sys.executable, str(script)).returncode == code
    (run,) = server.get("/api/v1/runs")
    assert (run["state"], run["status"], run["exit_code"]) == ("finished", "failed", code)


def test_a_signal_is_the_commands_own(server: GradwatchServer, tmp_path: Path, script: Path) -> None:
    script.write_text(f"{SCRIPT}\nimport os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    assert _run(server, tmp_path, sys.executable, str(script)).returncode == -signal.SIGTERM


def test_the_users_own_sitecustomize_still_runs(server: GradwatchServer, tmp_path: Path, script: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text(
        "import os\nprint('mine first') if 'GRADWATCH_ATTACH' in os.environ else None\n"
    )
    paths = os.pathsep.join([str(own), environment()["PYTHONPATH"]])
    watched = _run(server, tmp_path, sys.executable, str(script), PYTHONPATH=paths)
    assert watched.stdout.startswith("mine first\nweights")
    assert len(server.get("/api/v1/runs")) == 1


def test_a_program_without_torch_never_loads_it(server: GradwatchServer, tmp_path: Path) -> None:
    seen = _run(
        server, tmp_path, sys.executable, "-c", "import sys; print('torch' in sys.modules, 'msgspec' in sys.modules)"
    )
    assert seen.stdout == "False False\n"
    assert server.get("/api/v1/runs") == []


def test_what_cannot_be_started_is_named(server: GradwatchServer, tmp_path: Path) -> None:
    missing = _run(server, tmp_path, "no-such-program")
    assert missing.returncode == 127
    assert "'no-such-program' is not a program on the PATH" in missing.stderr
    nothing = _run(server, tmp_path)
    assert nothing.returncode == 2
    assert "name the command to run" in nothing.stderr


def test_of_two_ranks_under_torchrun_the_first_reports(server: GradwatchServer, tmp_path: Path, script: Path) -> None:
    script.write_text(
        SCRIPT.replace("torch.manual_seed(0)", "torch.distributed.init_process_group('gloo')").replace(
            "optimizer =", "model = nn.parallel.DistributedDataParallel(model)\noptimizer ="
        )
        + "torch.distributed.destroy_process_group()\n"
    )
    watched = _run(
        server,
        tmp_path,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    )
    assert watched.returncode == 0, watched.stderr
    (run,) = server.get("/api/v1/runs")
    assert run["last_step"] == 12
    names = [entry["name"] for entry in server.get(f"/api/v1/runs/{run['id']}")["parameters"]]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
