"""Weights that no gradient steps in a round are those that they are, not those that they were."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradwatch.recording import resting_weights as others

from .conftest import Server
from .watching import watch


def norms(model: nn.Module) -> dict[str, float]:
    return {name: float(parameter.detach().double().norm()) for name, parameter in model.named_parameters()}


def test_what_is_frozen_after_some_training(server: Server) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = {}
    with watch(model, server, optimizer):
        for step in range(1, 8):
            model[0].requires_grad_(step < 4)
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            expected[step] = norms(model)
            optimizer.step()
    for step, weights in expected.items():
        assert server.values("weight_norm", step) == pytest.approx(weights, rel=1e-5), step


def test_experts_that_rest(server: Server) -> None:
    model = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = {}
    with watch(model, server, optimizer):
        for step in range(1, 8):
            optimizer.zero_grad()
            model[step % 3](torch.ones(2, 3)).square().sum().backward()
            expected[step] = norms(model)
            optimizer.step()
    for step, weights in expected.items():
        assert server.values("weight_norm", step) == pytest.approx(weights, rel=1e-5), step


def through_data(target: nn.Linear, source: nn.Linear) -> None:
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.data.mul_(0.5).add_(0.5 * theirs.data)


@torch.no_grad()
def in_place(target: nn.Linear, source: nn.Linear) -> None:
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.lerp_(theirs, 0.5)


@pytest.mark.parametrize("follow", [through_data, in_place])
def test_a_target_that_follows(server: Server, follow: Callable[[nn.Linear, nn.Linear], None]) -> None:
    """Torch does not count what is done to ``data``."""
    model = nn.ModuleDict({"online": nn.Linear(3, 3), "target": nn.Linear(3, 3).requires_grad_(False)})
    optimizer = torch.optim.SGD(model["online"].parameters(), lr=0.05)
    expected = {}
    with watch(model, server, optimizer):
        for step in range(1, 6):
            optimizer.zero_grad()
            model["online"](torch.ones(2, 3)).square().sum().backward()
            expected[step] = norms(model)
            optimizer.step()
            follow(model["target"], model["online"])  # type: ignore[arg-type]
    for step, weights in expected.items():
        online = {name: norm for name, norm in weights.items() if name.startswith("online")}
        seen = server.values("weight_norm", step)
        assert {name: seen[name] for name in online} == pytest.approx(online, rel=1e-5)
    target = {name: norm for name, norm in norms(model).items() if name.startswith("target")}
    before = {name: norm for name, norm in expected[5].items() if name.startswith("target")}
    # The last step may be read before or after the target has followed it.
    for name, norm in target.items():
        assert server.values("weight_norm", 5)[name] == pytest.approx(norm, rel=1e-5) or server.values(
            "weight_norm", 5
        )[name] == pytest.approx(before[name], rel=1e-5)
        assert norm != pytest.approx(expected[1][name], rel=1e-5)


def test_large_frozen_weights_are_read_in_turn(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what does not seem to have changed, a bounded number of elements at each sample."""
    monkeypatch.setitem(others._ELEMENTS, "cpu", 9)
    frozen = nn.ModuleList([nn.Linear(3, 3, bias=False).requires_grad_(False) for _ in range(4)])
    model = nn.ModuleDict({"frozen": frozen, "head": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(model["head"].parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for step in range(1, 8):
            optimizer.zero_grad()
            model["head"](torch.ones(2, 3)).sum().backward()
            optimizer.step()
            if step == 2:
                for layer in frozen:
                    layer.weight.data.zero_()  # type: ignore[operator]
    gone = [sum(norm == 0 for norm in server.values("weight_norm", step).values()) for step in range(1, 8)]
    assert gone == [0, 0, 1, 2, 3, 4, 4]


def test_parameters_on_the_meta_device_are_left_alone(server: Server) -> None:
    model = nn.ModuleDict({"meta": nn.Linear(3, 3, device="meta").requires_grad_(False), "head": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(model["head"].parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model["head"](torch.ones(2, 3)).sum().backward()
            optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 2, 3]
