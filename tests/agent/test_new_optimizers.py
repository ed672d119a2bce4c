"""Optimizers that are made while a training is watched: for a new head, for adapters, for weights that are all new."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import wire

from .conftest import OwnErrors, Server
from .truth import norm
from .watching import watch

CLIP = 0.001


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(batch) + self.up(self.down(batch))
        return result


def new_head(model: nn.Sequential) -> torch.optim.Optimizer:
    model[2] = nn.Linear(6, 3)
    return torch.optim.SGD(model[2].parameters(), lr=0.1)


def new_head_with_all(model: nn.Sequential) -> torch.optim.Optimizer:
    model[2] = nn.Linear(6, 3)
    return torch.optim.SGD(model.parameters(), lr=0.1)


def assigned_weights(model: nn.Sequential) -> torch.optim.Optimizer:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adapters(model: nn.Sequential) -> torch.optim.Optimizer:
    model[0] = Adapted(model[0])
    trained = [parameter for parameter in model[0].parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.1)


def check_clipped(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rows = (1, -1) if parameter.dim() < 2 else (len(parameter), -1)
            limit = CLIP * parameter.detach().reshape(rows).norm(dim=1).clamp(min=1e-3)
            assert (parameter.grad.reshape(rows).norm(dim=1) <= 1.001 * limit).all()


@pytest.mark.parametrize(
    ("make", "earlier"),
    [
        *itertools.product([new_head, assigned_weights, adapters], ["freed", "kept"]),
        (new_head_with_all, "freed"),  # where the earlier optimizer is kept, it is refused: see below
    ],
)
def test_a_new_optimizer_of_new_parameters_is_taken_over(
    server: Server, make: Callable[[nn.Sequential], torch.optim.Optimizer], earlier: str, own_errors: OwnErrors
) -> None:
    model = network()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kept = [optimizer] if earlier == "kept" else []
    truth = []
    with watch(model, server, optimizer, clip=gradwatch.AGC(CLIP, exclude=())):
        for step in range(6):
            if step == 3:
                optimizer = make(model)
            model.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            named = [(name, p) for name, p in model.named_parameters() if id(p) in stepped]
            truth.append({name: norm(p.grad) for name, p in named if p.grad is not None})
            handle = optimizer.register_step_pre_hook(lambda stepping, *_: check_clipped(stepping))
            optimizer.step()
            handle.remove()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5, 6]
    for step, expected in enumerate(truth, start=1):
        # Parameters that were added later have no place in the earlier samples.
        measured = dict(zip(server.names, server.samples[step - 1].statistics["grad_norm"].tolist(), strict=False))
        assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5), step
    assert own_errors.warnings == 0
    assert len(kept) == (earlier == "kept")


def test_an_optimizer_that_was_not_given_raises_once_instead_of_stepping_unclipped(server: Server) -> None:
    model = network()
    given, other = (torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (2, 0))
    with watch(model, server, given, clip=gradwatch.AGC(CLIP, exclude=())):
        model(torch.randn(4, 8)).square().mean().backward()
        given.step()
        with pytest.raises(RuntimeError, match=r"SGD steps watched parameters \(0.weight and 1 more\).*attach\(\)"):
            other.step()
        other.step()
    (event,) = server.events
    assert event.kind == "not_measured"
    assert "0.weight" in event.message


def test_an_optimizer_that_was_not_given_is_told_of_where_nothing_is_clipped(server: Server) -> None:
    model = network()
    given, other = (torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (2, 0))
    with watch(model, server, given):
        model(torch.randn(4, 8)).square().mean().backward()
        given.step()
        other.step()
    assert [(event.kind, "0.weight" in event.message) for event in server.events] == [("not_measured", True)]


def test_attaching_again_without_clipping_says_that_it_ends(server: Server, own_errors: OwnErrors) -> None:
    model = network()
    first = watch(model, server, clip=CLIP)
    assert own_errors.warnings == 0
    with watch(model, server):
        assert own_errors.warnings == 1
    (event,) = server.events
    assert event.kind == "clipping_ended"
    assert first.run_id in event.message


class ClipsItsUpdates(torch.optim.Optimizer):
    """An optimizer with a setting of its own that is named clip, as some have."""

    def __init__(self, parameters: object, clip: float = 1.0) -> None:
        super().__init__(parameters, {"lr": 0.1, "clip": clip})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.clamp(-group["clip"], group["clip"]), alpha=-group["lr"])


@pytest.mark.parametrize(("key", "threshold"), [(None, CLIP), ("agc_clip", 0.01)])
def test_a_setting_of_the_optimizer_is_not_the_threshold(server: Server, key: str | None, threshold: float) -> None:
    model = network()
    reference = copy.deepcopy(model)
    batch = torch.randn(4, 8)
    optimizer = ClipsItsUpdates(model.parameters())
    if key is not None:
        optimizer.param_groups[0][key] = threshold
    with watch(model, server, optimizer, clip=gradwatch.AGC(CLIP, exclude=())):
        for trained in (model, reference):
            trained(batch).square().mean().backward()
        optimizer.step()
    gradwatch.adaptive_clip_grad_(reference, threshold)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert server.scalar("removed_grad_norm") > 0


def test_tensor_wise_clipping_leaves_the_norms_of_double_precision_as_they_were(server: Server) -> None:
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, server, optimizer, clip=gradwatch.AGC(CLIP, granularity="tensor", exclude=())):
        (30 * model(torch.randn(4, 8, dtype=torch.float64))).square().mean().backward()
        truth = {name: norm(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        weights = {name: norm(p) for name, p in model.named_parameters()}
        optimizer.step()
    assert server.values("grad_norm") == pytest.approx(truth, rel=1e-6)
    assert server.values("weight_norm") == pytest.approx(weights, rel=1e-6)
    assert wire.MISSING not in server.values("clipped_grad_norm").values()
