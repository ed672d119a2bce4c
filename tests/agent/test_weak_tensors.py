"""What the agent knows of a tensor keeps torch from nothing: not from freeing it, not from swapping it."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.hooks.weak_tensors import deaths, weak
from gradwatch.recording.optimizer_parameters import OptimizerParameters

from .conftest import Server
from .test_wrappers import Around
from .watching import watch


@pytest.fixture
def swapping() -> Iterator[None]:
    """Convert models as sharded ones are converted: by swapping their tensors."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 3, dtype=next(model.parameters()).dtype)).sum().backward()
    nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
    optimizer.step()


@pytest.mark.usefixtures("swapping")
def test_a_watched_model_is_converted_by_swapping(server: Server) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = watch(model, server, optimizer)
    step(model, optimizer)
    optimizer.zero_grad()
    model.double()
    step(model, optimizer)
    agent.close()
    optimizer.zero_grad()
    model.float()  # the agent is there still
    assert [sample.step for sample in server.samples] == [1, 2]
    assert server.values("grad_norm", 2) == pytest.approx(server.values("grad_norm", 1))


@pytest.mark.usefixtures("swapping")
def test_gradients_that_were_clipped_for_another_optimizer_are_swapped_too(server: Server) -> None:
    """They are known until the next step, since the optimizer within must not have them clipped again."""
    model = nn.Linear(3, 2)
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.0))
    with watch(model, server, clip=gradwatch.AGC(0.01, exclude=())):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        model.double()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float64


@pytest.mark.usefixtures("swapping")
def test_a_model_that_was_clipped_is_converted_by_swapping() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    gradwatch.adaptive_clip_grad_(model, 0.01)
    gradwatch.adaptive_clip_grad_(list(model.parameters()), 0.01)
    model.zero_grad()
    model.double()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    gradwatch.adaptive_clip_grad_(model, 0.01)
    weight = model.weight
    assert weight.grad is not None
    assert float(weight.grad.norm()) == pytest.approx(0.01 * float(weight.detach().norm()), rel=0.5)


def test_others_may_not_swap_what_they_hold_themselves(server: Server) -> None:
    """Torch's own check stands."""
    gradwatch.attach(nn.Linear(3, 2), url=server.url)  # torch is patched while an agent is attached
    one, other = torch.ones(2), torch.zeros(2)
    mine, theirs = weak(one), weakref.ref(one)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(one, other)
    assert mine() is one is theirs()
    del theirs
    torch.utils.swap_tensors(one, other)
    assert (one.tolist(), other.tolist(), mine()) == ([0.0, 0.0], [1.0, 1.0], one)


def test_a_tensor_is_held_by_one_and_dies_as_ever() -> None:
    tensor = torch.ones(2)
    holder, before = weak(tensor), deaths.count
    assert weak(tensor) is holder
    assert deaths.count == before
    del tensor
    gc.collect()
    assert holder() is None
    assert deaths.count != before


def test_a_list_is_whole_until_one_of_it_is_gone() -> None:
    """Its id may be another's by then, and the list would be taken for one that it is not."""
    kept, parameter = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    binding = OptimizerParameters([[kept, parameter]], lambda tensor: 0 if tensor is kept else None)
    assert binding.whole
    other = weak(torch.ones(1))
    gc.collect()
    assert other() is None
    assert binding.whole  # somebody else died
    del parameter
    gc.collect()
    assert not binding.whole


def test_nothing_is_patched_and_nothing_is_referred_to_once_the_last_agent_has_left(server: Server) -> None:
    original = torch.utils.swap_tensors
    model = nn.Linear(3, 2)
    agent = watch(model, server)
    assert torch.utils.swap_tensors is not original
    agent.close()
    assert torch.utils.swap_tensors is original
    assert not weakref.getweakrefs(model.weight)
