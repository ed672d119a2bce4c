"""The agent and a real server that goes away and comes back."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.cli import main
from tests.processes import PATIENCE_SECONDS, GradwatchServer


@pytest.fixture(autouse=True)
def _own_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path / "spool"))


def test_a_server_that_comes_back_gets_everything(server: GradwatchServer) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        for step in range(60):
            if step == 20:
                server.kill()
            if step == 40:
                server.start()
            model.zero_grad()
            model(torch.randn(3, 4)).mean().backward()
            optimizer.step()
            time.sleep(0.01)
        agent.close(timeout_seconds=2 * PATIENCE_SECONDS)
    series = server.get(f"/api/v1/runs/{agent.run_id}/series", statistic="grad_norm", parameter="weight")
    assert series["steps"] == list(range(1, 61))


@pytest.mark.usefixtures("patient_collector")
def test_flush_delivers_to_a_real_server_what_was_left(server: GradwatchServer, tmp_path: Path) -> None:
    server.stop()
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    for _ in range(30):
        model.zero_grad()
        model(torch.randn(3, 4)).mean().backward()
        optimizer.step()
    agent.close(timeout_seconds=0.5)
    server.start()
    assert main(["flush"]) == 0
    run = server.get(f"/api/v1/runs/{agent.run_id}")
    assert (run["sample_count"], run["last_step"], run["state"]) == (30, 30, "finished")
    assert not list((tmp_path / "spool").glob("*"))
