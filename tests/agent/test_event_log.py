"""The event log: what a real training wrote is replayed to the same steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from gradwatch.steps import event_log
from gradwatch.steps.core import StepCore
from gradwatch.steps.event_log import EVENTS, replay

from .conftest import OwnErrors, Server
from .watching import GRAD_A, Two, watch


def train(server: Server) -> None:
    model = Two()
    one, other = torch.optim.SGD([model.a], lr=0.0), torch.optim.Adam([model.b], lr=0.0)
    with watch(model, server, [one, other]) as agent:
        for value in (1.0, float("nan"), 2.0):
            for optimizer in (one, other):
                optimizer.zero_grad()
            model(GRAD_A, value).backward()
            model(GRAD_A, value).backward()
            agent.log(value=value)

            def closure() -> Any:
                loss = model(GRAD_A, 3.0)
                loss.backward()
                clip_grad_norm_(model.parameters(), 1.0)
                return loss

            one.step(closure)
            other.step()


def test_a_training_is_replayed_from_its_log(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "steps.jsonl"
    monkeypatch.setenv("GRADWATCH_STEP_LOG", str(log))
    train(server)
    with log.open("rb") as lines:
        ended = [replayed.ended for replayed in replay(lines) if replayed.ended is not None]
    assert [record.step for record in ended] == [1, 2, 3]
    assert [len(record.losses) for record in ended] == [3, 3, 3]
    assert [len(record.clips) for record in ended] == [1, 1, 1]
    assert [record.finite for record in ended] == [True, False, True]
    assert event_log.main([str(log)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("backward_began(")
    assert shown.count("    = StepRecord(") == 3
    assert "tensor(" not in log.read_text(), "no number of a tensor is read"


def test_without_the_variable_nothing_is_written_and_a_log_that_cannot_be_is_told_of(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_errors: OwnErrors
) -> None:
    monkeypatch.setenv("GRADWATCH_STEP_LOG", str(tmp_path / "nowhere" / "steps.jsonl"))
    train(server)
    assert own_errors.warnings == 1
    assert len(server.samples) == 3


def test_a_log_ends_after_its_most_events(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MOST_EVENTS", 5)
    monkeypatch.setenv("GRADWATCH_STEP_LOG", str(tmp_path / "steps.jsonl"))
    train(server)
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 5
    assert len(server.samples) == 3


@pytest.mark.parametrize("line", [b"{", b'{"event": "logged", "arguments": {}}', b'{"event": "other"}'])
def test_a_line_that_is_none_of_a_log_is_named(line: bytes) -> None:
    with pytest.raises(ValueError, match="line 1"):
        list(replay([line]))


def test_every_public_method_of_the_core_is_an_event() -> None:
    methods = {name for name, value in vars(StepCore).items() if callable(value) and not name.startswith("_")}
    assert methods == set(EVENTS)
