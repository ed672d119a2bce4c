"""The agent and a real server that goes away and comes back."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import wire
from gradwatch.cli import main
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.spool import Spool
from tests.processes import PATIENCE_SECONDS, GradwatchServer, sample


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


def test_a_lazy_network_is_resumed_from_its_checkpoint(server: GradwatchServer) -> None:
    """Its first layer was found last in the first attempt, and is found first in the second."""

    def train(model: nn.Module, run: str | None, step: int) -> str:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.attach(model, optimizer, url=server.url, every=1, run=run, step=step) as agent:
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(4, 8)).square().mean().backward()
                optimizer.step()
        return agent.run_id

    first, second = (nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(2))
    run = train(first, None, 0)
    second.load_state_dict(first.state_dict())
    assert train(second, run, 2) == run
    assert server.get(f"/api/v1/runs/{run}")["sample_count"] == 4
    weights = server.get(f"/api/v1/runs/{run}/series", statistic="weight_norm", parameter="0.weight", from_step=3)
    assert weights["last"][0] == pytest.approx(float(first.get_parameter("0.weight").detach().norm()), rel=1e-5)


def _leave_behind(directory: Path, url: str, *documents: wire.Registration | wire.Batch) -> None:
    """Leave a spool with these documents, of a run "gained", as a process that has ended does."""
    spool = Spool(directory, url=url, run="gained", dropped=Dropped(), warn=print)
    for document in documents:
        if isinstance(document, wire.Batch):
            spool.append("batch", wire.encode(document), len(document.samples))
        else:
            spool.append("registration", wire.encode(document))
    spool.close()


def test_what_an_older_attempt_left_is_delivered_though_the_run_has_gained_a_parameter(
    server: GradwatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = wire.Registration(id="gained", attempt=1, parameters=[wire.Parameter("a", [4, 4], units=4)])
    waiting = wire.Batch(id="b1", attempt=1, samples=[sample(step, 1.0) for step in range(1, 50)])
    _leave_behind(tmp_path / "spool", server.url, first, waiting)
    server.register(["a"], id="gained", attempt=1)
    server.register(["a", "b"], id="gained", attempt=2)
    server.store("gained", wire.Batch(id="c1", attempt=2, samples=[sample(100, 1.0, 1.0)]))
    assert main(["flush"]) == 0
    assert "2 of 2 documents delivered" in capsys.readouterr().err
    series = server.get("/api/v1/runs/gained/series", statistic="grad_norm", parameter="a")
    assert series["steps"] == [*range(1, 50), 100]


def test_flush_says_what_the_server_refuses(
    server: GradwatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.register(["a"], id="gained", attempt=1)
    trail = {"loss": wire.Trail(steps=[1, 2], values=[1.0, 1.0])}
    bad = wire.Batch(id="b1", attempt=1, samples=[sample(step, 1.0, 1.0) for step in (1, 2)], trail=trail)
    good = wire.Batch(id="b2", attempt=1, samples=[sample(3, 1.0)])
    _leave_behind(tmp_path / "spool", server.url, bad, good)
    assert main(["flush"]) == 1
    said = capsys.readouterr().err
    assert "has 2 values, the run has 1 parameters" in said
    assert "gained: 1 of 2 documents delivered" in said
    assert "the server did not take all of 1 documents: 2 samples and" in said
    assert not list((tmp_path / "spool").glob("*"))
    assert main(["flush"]) == 0
