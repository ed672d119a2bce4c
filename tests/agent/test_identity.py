"""Whose run it is: children of a training, ranks of a scheduler, notebooks; and what wrappers hide."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch.lifecycle.process import default_run_name, rank
from gradwatch.recording.optimizers import unwrapped

from .conftest import Server
from .test_launch import launch
from .watching import watch

PARENT_AND_CHILD = """
import subprocess, sys, torch
from torch import nn
model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    if step == 4 and len(sys.argv) > 2:
        subprocess.run([sys.executable, __file__, "2"], check=True)
"""


def test_a_child_that_trains_has_a_run_of_its_own(server: Server, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PARENT_AND_CHILD, encoding="utf-8")
    run = "run-00000000000000e1"
    done = launch(server, sys.executable, str(script), "8", "child", GRADWATCH_RUN=run)
    assert done.returncode == 0, done.stderr
    steps: dict[str, list[int]] = {}
    for batch in server.batches:
        steps.setdefault(server.run_of[batch.id], []).extend(sample.step for sample in batch.samples)
    assert steps.pop(run) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(steps.values()) == [[1, 2]]
    parents = {registration.id: registration.attributes.get("parent_run") for registration in server.registrations}
    assert parents == {run: None, next(iter(steps)): run}


FORKED = """
import os, torch
from torch import nn
def train(steps):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return model, optimizer
kept = train(3)
child = os.fork()
if not child:
    train(2)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_forked_child_that_leaves_by_exit_makes_no_run(server: Server, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FORKED, encoding="utf-8")
    done = launch(server, sys.executable, str(script))
    assert done.returncode == 0, done.stderr
    assert len({registration.id for registration in server.registrations}) == 1
    assert [sample.step for sample in server.samples] == [1, 2, 3]


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"])
def test_the_rank_that_a_scheduler_tells(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert rank() == 0
    monkeypatch.setenv(name, "3")
    assert rank() == 3


@pytest.mark.parametrize(
    ("program", "session", "name"),
    [
        ("/env/ipykernel_launcher.py", "", "notebook"),
        ("/env/ipykernel_launcher.py", "/home/me/bert.ipynb", "bert"),
        ("-", "", "python"),
    ],
)
def test_names_of_runs_without_a_script(monkeypatch: pytest.MonkeyPatch, program: str, session: str, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setenv("JPY_SESSION_NAME", session)
    assert default_run_name().split(" ")[0] == name


def test_a_slip_before_the_agent_attached_ends_no_run_as_failed(server: Server) -> None:
    cells = [
        "1 / 0",
        "import torch, gradwatch\nmodel = torch.nn.Linear(2, 2)",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
        f"agent = gradwatch.attach(model, optimizer, url={server.url!r}, every=1)",
        "model(torch.ones(1, 2)).sum().backward(); optimizer.step()",
    ]
    program = (
        "import code\nshell = code.InteractiveInterpreter({})\n"
        f"for cell in {cells!r}: shell.runcode(compile(cell, 'cell', 'exec'))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=600)
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert end.status == "completed"


class Holder(nn.Module):
    """A wrapper of a whole model."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.add_module(name, model)


@pytest.mark.parametrize("name", ["module", "_module", "_forward_module"])
def test_a_wrapper_of_a_whole_model_is_taken_off_the_names(server: Server, name: str) -> None:
    watch(Holder(name, nn.Sequential(nn.Linear(2, 2))), server).close()
    assert server.names == ["0.weight", "0.bias"]


def test_an_optimizer_that_a_wrapper_holds_as_its_base() -> None:
    class Wrapper:
        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base = base
            self.param_groups = base.param_groups

    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    given: Any = Wrapper(base)
    assert unwrapped(given) == [base]
