"""The numbers of the run in the loggers that people already have: the real ones, read back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch

from .conftest import OwnErrors, Server
from .watching import monitor_of

pytestmark = pytest.mark.filterwarnings("ignore")


def train(server: Server, mirror: Any, **options: Any) -> dict[int, float]:
    """Train three steps; return the global gradient norm of each."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        agent.mirror(mirror, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
    return {sample.step: server.scalar("global_grad_norm", sample.step) for sample in server.samples}


def test_tensorboard(server: Server, tmp_path: Path) -> None:
    expected = train(server, "tensorboard", log_dir=str(tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written: Any = EventAccumulator(str(tmp_path))
    written.Reload()
    found = {event.step: event.value for event in written.Scalars("gradwatch/global_grad_norm")}
    assert found == pytest.approx(expected, rel=1e-6)
    assert {event.step for event in written.Scalars("gradwatch/loss")} == {1, 2, 3}


def test_wandb(server: Server, tmp_path: Path) -> None:
    import wandb

    run: Any = wandb.init(mode="offline", dir=tmp_path)
    expected = train(server, "wandb")
    assert run.summary["gradwatch/global_grad_norm"] == pytest.approx(expected[3])
    assert run.summary["gradwatch/step"] == 3
    run.finish()


def test_mlflow(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("gradwatch")
    with mlflow.start_run() as run:
        expected = train(server, "mlflow")
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "gradwatch/global_grad_norm")
    assert {metric.step: metric.value for metric in history} == pytest.approx(expected)


def test_a_logger_that_fails_is_left_alone(server: Server, own_errors: OwnErrors, tmp_path: Path) -> None:
    import wandb

    run: Any = wandb.init(mode="offline", dir=tmp_path)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        agent.mirror("wandb")
        run.finish()
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        assert monitor_of(agent).guard.watching
    assert len(server.samples) == 6
    assert own_errors.warnings == 1


def test_only_the_rank_that_reports_writes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert train(server, "tensorboard", log_dir=str(tmp_path)) == {}
    assert not list(tmp_path.glob("events*"))


def test_an_unknown_logger_is_named(server: Server) -> None:
    with gradwatch.attach(nn.Linear(1, 1), url=server.url) as agent, pytest.raises(ValueError, match="'comet'"):
        agent.mirror("comet")  # type: ignore[arg-type]
