"""Where the first number that is not finite came from: the module that the agent names."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import wire
from gradwatch.hooks.module_outputs import OutputHooks

from .conftest import Server
from .watching import monitor_of


class Normalise(nn.Module):
    """Divides by a spread that is zero for an even row."""

    def __init__(self, width: int, *, gain: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        spread = centred / centred.square().mean(1, keepdim=True).sqrt()
        return spread if self.gain is None else spread * self.gain


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *middle, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def named(server: Server) -> list[wire.Event]:
    return [event for event in server.events if event.kind == "nonfinite_module"]


def train(model: nn.Module, server: Server, bad_step: int, bad: Any, steps: int = 6, forward: Any = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            inputs = torch.randn(8, 4)
            if step == bad_step:
                inputs = bad(inputs)
            nn.functional.cross_entropy((forward or model)(inputs), torch.zeros(8, dtype=torch.long)).backward()
            optimizer.step()


class EvenRow(nn.Module):
    """Makes one row even where the input says so."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0.999, x[:, :1], x)


def even(inputs: Tensor) -> Tensor:
    inputs = inputs.clone()
    inputs[2] = 1e4
    return inputs


def with_nan(inputs: Tensor) -> Tensor:
    inputs = inputs.clone()
    inputs[3, 1] = torch.nan
    return inputs


def test_bad_data_is_laid_at_the_first_layers_door(server: Server) -> None:
    train(network(), server, 4, with_nan)
    assert [(event.step, event.parameter) for event in named(server)] == [(4, "0")]
    assert "look at the data" in named(server)[0].message


@pytest.mark.parametrize(("gain", "module"), [(False, "0"), (True, "3")])
def test_zero_by_zero_between_two_layers(server: Server, gain: bool, module: str) -> None:
    """With parameters of its own the operation is named itself, without any the layer that it follows."""
    model = network(EvenRow(), Normalise(6, gain=gain))
    with torch.no_grad():
        model[0].weight.uniform_(0.1, 1.0)  # type: ignore[operator]
        model[0].bias.zero_()  # type: ignore[operator]
    train(model, server, 3, even)
    assert [(event.step, event.parameter) for event in named(server)] == [(3, module)]


def test_a_loss_that_is_bad_by_itself(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        for step in range(3):
            optimizer.zero_grad()
            likelihood = model(torch.randn(8, 4)).softmax(1)[:, 0] * (0.0 if step == 1 else 1.0)
            (-likelihood.log().mean()).backward()
            optimizer.step()
    assert [(event.step, event.parameter) for event in named(server)] == [(2, "")]


def test_weights_that_are_bad_already_name_nobody(server: Server) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan  # type: ignore[operator]
    train(model, server, 0, None)
    assert not named(server)


def test_an_overflow_of_the_loss_scale_is_nobodys_fault(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 4)).square().sum() * 100).backward()
            scaler.step(optimizer)
            scaler.update()
    assert not named(server)


def reached(server: Server, step: int) -> bool:
    return bool(server.samples) and server.samples[-1].step >= step


def test_where_the_graph_cannot_be_read_hooks_watch_the_next_steps_and_go(server: Server) -> None:
    """Under activation checkpointing; the training skips bad steps, so that the weights stay finite."""
    model = network(EvenRow(), Normalise(6))
    with torch.no_grad():
        model[0].weight.uniform_(0.1, 1.0)  # type: ignore[operator]
        model[0].bias.zero_()  # type: ignore[operator]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hooked = []
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        for step in range(1, 400):
            optimizer.zero_grad()
            inputs = even(torch.randn(8, 4))
            out: Any = checkpoint(model, inputs, use_reentrant=False)
            loss = nn.functional.cross_entropy(out, torch.zeros(8, dtype=torch.long))
            loss.backward()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            hooked.append(any(module._forward_hooks for module in model.modules()))
            if hooked[-1]:
                pickle.loads(pickle.dumps(model))
            if step > 3 and hooked[-2:] == [True, False]:
                break
            server.wait(partial(reached, server, step))
        assert monitor_of(agent).guard.watching
    assert sum(hooked) == 3
    assert not hooked[-1]
    assert {event.parameter for event in named(server)} == {"3"}
    assert "its output was not finite, its input and its weights were" in named(server)[0].message


class Touchy(Tensor):
    """Cannot be asked whether it is finite."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.isfinite:
            raise TypeError("not this one")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class Touching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_subclass(Touchy)


def test_tensors_that_hooks_hand_out_once_are_left_to_the_backward_pass(server: Server) -> None:
    """As offloading of activations does; the module hooks find where it began at the next bad loss."""
    model = network(Normalise(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> int:
        kept[len(kept) + 1000 * step] = tensor
        return len(kept) - 1 + 1000 * step

    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        for step in range(1, 5):
            optimizer.zero_grad()
            inputs = torch.randn(8, 4)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda key: kept.pop(key)):
                loss = model(with_nan(inputs) if step in (2, 3) else inputs).sum()
            loss.backward()
            kept.clear()
            if not loss.isfinite():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.zero_()
            optimizer.step()
    assert [event.parameter for event in named(server)] == ["0"]


def test_hooks_do_not_raise_into_the_training() -> None:
    model = network(Touching())
    hooks = OutputHooks([model])
    out = model(torch.randn(8, 4))
    (out * torch.ones(8, 3).as_subclass(Touchy)).sum().backward()
    assert [seen.module for seen in hooks.take()][:1] == ["0"]
    hooks.close()


def test_hooks_see_nothing_of_a_copy() -> None:
    model = network()
    hooks = OutputHooks([model])
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        size = len(pickle.dumps(twin))
        for _ in range(3):
            twin(torch.randn(8, 4)).sum().backward()
        assert len(pickle.dumps(twin)) == size  # nothing was kept in it
    assert hooks.take() == []
    model(torch.randn(8, 4)).sum().backward()
    assert {seen.kind for seen in hooks.take()} == {"output", "gradient"}
    hooks.close()
    assert not any(module._forward_hooks for module in model.modules())


class Doubled(torch.autograd.Function):
    """A function in Python that saves a tensor: its node has other attributes than those of operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_functions_in_python_are_read_like_operators(server: Server) -> None:
    model = network()
    doubled: Callable[[Tensor], Tensor] = Doubled.apply
    train(model, server, 4, with_nan, forward=lambda inputs: model[1:](doubled(model[0](inputs))))
    assert [(event.step, event.parameter) for event in named(server)] == [(4, "0")]


def test_origin_under_fsdp2(server: Server) -> None:
    """The graph holds unsharded parameters, and the weights that it saved are freed until the backward pass."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = network(EvenRow(), Normalise(6, gain=True))
        with torch.no_grad():
            model[0].weight.uniform_(0.1, 1.0)  # type: ignore[operator]
            model[0].bias.zero_()  # type: ignore[operator]
        mesh = init_device_mesh("cpu", (1,))
        for layer in (model[0], model[3], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, server, 3, even)
    finally:
        distributed.destroy_process_group()
    assert [(event.step, event.parameter) for event in named(server)] == [(3, "3")]
    depths = {parameter.name: parameter.depth for parameter in server.registrations[-1].parameters}
    assert depths["0.weight"] == 0
    assert depths["6.bias"] == len(depths) - 1
