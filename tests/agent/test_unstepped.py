"""Three states of a gradient: none, one that no optimizer steps, one of exactly zero."""

import msgspec
import pytest
import torch
from torch import nn

from .conftest import Server
from .watching import watch


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.unused, self.silent = (nn.Parameter(torch.ones(3)) for _ in range(4))

    def forward(self) -> torch.Tensor:
        return (2 * self.body + self.head + 0 * self.silent).sum()


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model.zero_grad()
        model().backward()
        for optimizer in optimizers:
            optimizer.step()


def unstepped(server: Server) -> list[list[str]]:
    """Return the names of the parameters of each sample that have a gradient that no optimizer steps."""
    return [
        [] if isinstance(sample.unstepped, msgspec.UnsetType) else [server.names[place] for place in sample.unstepped]
        for sample in server.samples
    ]


@pytest.mark.parametrize("named", [True, False])
def test_a_gradient_that_no_optimizer_steps_is_told_apart(server: Server, named: bool) -> None:
    """Where attach() was given no optimizer, one that waits for its turn may hold the parameter for 100 steps."""
    model = Parts()
    optimizer = torch.optim.SGD([model.head, model.unused, model.silent], lr=0.1)
    with watch(model, server, optimizer if named else None):
        train(model, optimizer, steps=3 if named else 103)
    assert server.values("grad_norm") == pytest.approx({"body": -1, "head": 3**0.5, "unused": -1, "silent": 0})
    told = unstepped(server)
    assert told[-3:] == [["body"]] * 3
    assert not any(told[:-3])


def test_no_other_parameter_is_told_so(server: Server) -> None:
    """Frozen ones, and those of an optimizer whose steps do not count or that waits for its turn."""
    model = Parts()
    model.body.requires_grad_(False)
    named = torch.optim.SGD([model.head], lr=0.1)
    turns = torch.optim.SGD([model.unused], lr=0.1)
    with watch(model, server, [named, turns]):
        train(model, named)
        stranger = torch.optim.SGD([model.silent], lr=0.1)
        train(model, named, stranger)
        turns.step()
    assert unstepped(server)[:3] == [["silent"]] * 3
    assert unstepped(server)[-2:] == [[], []]
