"""Clipping beside the training loop: in a step pre-hook, in the step itself, of flat buffers, of lent gradients."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch

from .conftest import Server
from .watching import GRAD_A, Two, watch

STEPS = 14
"""Beyond the samples in which gradients are measured twice."""


class ClipsItself(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 6.5)
        super().step(closure)


def void(_returned: object) -> None:
    """A hook that returns something replaces the arguments of the step."""


def clips_in_hook(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: void(clip_grad_norm_(model.parameters(), 6.5)))
    return optimizer


def clips_itself(model: nn.Module) -> torch.optim.Optimizer:
    return ClipsItself(model.parameters(), lr=0.0)


def train(model: Two, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        model(GRAD_A, 12.0).backward()
        optimizer.step()
        optimizer.zero_grad()


def says(server: Server, step: int, before: dict[str, float], after: dict[str, float]) -> bool:
    return server.values("grad_norm", step) == pytest.approx(before, rel=1e-5) and server.values(
        "clipped_grad_norm", step
    ) == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("make", [clips_in_hook, clips_itself])
@pytest.mark.parametrize("every", [1, 5])
def test_clipping_within_the_step_is_heard(
    server: Server, make: Callable[[nn.Module], torch.optim.Optimizer], every: int
) -> None:
    model = Two()
    optimizer = make(model)
    with gradwatch.attach(model, optimizer, url=server.url, every=every):
        train(model, optimizer)
    assert server.trail("clip_norm") == dict.fromkeys(range(1, STEPS + 1), 13.0)
    assert len(server.samples) == math.ceil(STEPS / every)
    for sample in server.samples:
        assert says(server, sample.step, {"a": 5.0, "b": 12.0}, {"a": 2.5, "b": 6.0})
        assert sample.scalars["clipped_global_grad_norm"] == pytest.approx(6.5)
        assert sample.scalars["global_grad_norm_limit"] == 6.5


def test_clipping_in_the_loop_and_within_the_step(server: Server) -> None:
    model = Two()
    optimizer = clips_in_hook(model)
    with watch(model, server, optimizer):
        for _ in range(STEPS):
            model(GRAD_A, 12.0).backward()
            clip_grad_norm_([model.b], 3.0)
            optimizer.step()
            optimizer.zero_grad()
    scale = 6.5 / math.hypot(5.0, 3.0)
    for sample in server.samples:
        before, after = {"a": 5.0, "b": 12.0}, {"a": 5.0, "b": 3.0}
        expected = after if scale > 1 else {name: norm * scale for name, norm in after.items()}
        assert says(server, sample.step, before, expected)


def test_adaptive_clipping_comes_before_that_within_the_step(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[list[float]] = []

    def clip(*_: Any) -> None:
        seen.append([float(p.grad.norm()) for p in model.parameters() if p.grad is not None])
        clip_grad_norm_(model.parameters(), 0.5)

    optimizer.register_step_pre_hook(clip)
    with watch(model, server, optimizer, clip=gradwatch.AGC(0.1, exclude=())):
        train(model, optimizer, 3)
    assert seen[0] == pytest.approx([0.3, 0.4])
    assert says(server, 3, {"a": 5.0, "b": 12.0}, {"a": 0.3, "b": 0.4})  # 0.5 in all: nothing was left to clip
    assert server.trail("clip_norm") == pytest.approx(dict.fromkeys((1, 2, 3), 0.5))


def test_what_clipping_by_value_leaves_within_the_step_is_missing(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: void(clip_grad_value_([model.b], 3.0)))
    with watch(model, server, optimizer):
        train(model, optimizer, 2)
    assert says(server, 2, {"a": 5.0, "b": 12.0}, {"a": 5.0, "b": -1.0})


def test_a_step_that_raised_does_not_keep_the_clipping_of_the_next(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type]
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        handle.remove()
        model.zero_grad()
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 6.5)
        optimizer.step()
    assert says(server, -1, {"a": 5.0, "b": 12.0}, {"a": 2.5, "b": 6.0})


@pytest.mark.parametrize("every", [1, 5])
def test_clipping_a_flat_buffer_is_heard(server: Server, every: int) -> None:
    model = Two()
    flat = nn.Parameter(torch.zeros(7))
    flat.grad = torch.zeros(7)
    model.a.grad, model.b.grad = flat.grad[:6].view(2, 3), flat.grad[6:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=every):
        for _ in range(STEPS):
            flat.grad.zero_()
            model(GRAD_A, 12.0).backward()
            clip_grad_norm_([flat], 6.5)
            optimizer.step()
    assert server.trail("clip_norm") == dict.fromkeys(range(1, STEPS + 1), 13.0)
    for sample in server.samples:
        assert says(server, sample.step, {"a": 5.0, "b": 12.0}, {"a": 2.5, "b": 6.0})


@pytest.mark.parametrize("every", [1, 5])
def test_clipping_of_lent_gradients_is_heard(server: Server, every: int) -> None:
    shared = Two()
    worker = copy.deepcopy(shared)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.0)
    with gradwatch.attach(shared, optimizer, url=server.url, every=every):
        for _ in range(STEPS):
            worker.zero_grad()
            worker(GRAD_A, 12.0).backward()
            clip_grad_norm_(worker.parameters(), 6.5)
            for mine, its in zip(shared.parameters(), worker.parameters(), strict=True):
                mine.grad = its.grad
            optimizer.step()
    assert server.trail("clip_norm") == dict.fromkeys(range(1, STEPS + 1), 13.0)
    for sample in server.samples:
        assert says(server, sample.step, {"a": 5.0, "b": 12.0}, {"a": 2.5, "b": 6.0})


@pytest.mark.parametrize("clip_other", [clip_grad_norm_, clip_grad_value_])
def test_a_flat_buffer_is_heard_beside_clipping_of_another_model(
    server: Server, clip_other: Callable[[Any, float], object]
) -> None:
    model, other = Two(), Two()
    flat = nn.Parameter(torch.zeros(7))
    flat.grad = torch.zeros(7)
    model.a.grad, model.b.grad = flat.grad[:6].view(2, 3), flat.grad[6:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    others = torch.optim.SGD(other.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=1000):
        for _ in range(40):
            other(GRAD_A, 12.0).backward()
            clip_other(other.parameters(), 1.0)
            others.step()
            others.zero_grad()
            flat.grad.zero_()
            model(GRAD_A, 12.0).backward()
            clip_grad_norm_([flat], 6.5)
            optimizer.step()
    assert server.trail("clip_norm") == dict.fromkeys(range(1, 41), 13.0)


def test_lent_gradients_are_heard_beside_clipping_of_another_model(server: Server) -> None:
    shared, other = Two(), Two()
    worker = copy.deepcopy(shared)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.0)
    with gradwatch.attach(shared, optimizer, url=server.url, every=1000):
        for _ in range(40):
            worker.zero_grad()
            worker(GRAD_A, 12.0).backward()
            clip_grad_norm_(worker.parameters(), 6.5)
            other(GRAD_A, 12.0).backward()
            clip_grad_norm_(other.parameters(), 1.0)
            for mine, its in zip(shared.parameters(), worker.parameters(), strict=True):
                mine.grad = its.grad
            optimizer.step()
    assert server.trail("clip_norm") == dict.fromkeys(range(1, 41), 13.0)


def test_a_list_that_rested_without_gradients_is_heard(server: Server) -> None:
    model = Two()
    flat = nn.Parameter(torch.zeros(7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=1000):
        for _ in range(20):
            clip_grad_norm_([flat], 6.5)
        for _ in range(3):
            flat.grad = torch.zeros(7)
            model.a.grad, model.b.grad = flat.grad[:6].view(2, 3), flat.grad[6:]
            model(GRAD_A, 12.0).backward()
            clip_grad_norm_([flat], 6.5)
            optimizer.step()
    assert server.trail("clip_norm") == dict.fromkeys((1, 2, 3), 13.0)


def neighbours() -> list[tuple[Tensor, Tensor]]:
    """Return pairs of gradients, the first of Two's ``a``, that lie in one buffer and have no element in common."""
    ends, turns = torch.zeros(7), torch.zeros(13)
    columns = torch.zeros(3, 4)
    return [
        (ends[:6].view(2, 3), ends[6:]),
        (ends[1:].view(2, 3), ends[:1]),
        (turns[1::2].view(2, 3), turns[::2]),
        (columns[:, :2].t(), columns[:, 2:]),
    ]


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_clipping_of_a_neighbour_in_the_same_buffer_is_not_heard(
    server: Server, clip: Callable[[Any, float], object], place: int
) -> None:
    model = Two()
    grad, beside = neighbours()[place]
    model.a.grad, head = grad, nn.Parameter(torch.zeros_like(beside))
    head.grad = beside
    optimizer = torch.optim.SGD([*model.parameters(), head], lr=0.0)
    with watch(model, server, optimizer):
        for _ in range(3):
            grad.zero_()
            model.b.grad = None
            (model(GRAD_A, 12.0) + head.sum()).backward()
            clip([head], 0.1)
            optimizer.step()
    assert not server.trail("clip_norm")
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert "clipped_grad_norm" not in server.samples[-1].statistics


def test_clipping_a_gradient_in_pieces_is_heard(server: Server) -> None:
    model = Two()
    flat = torch.zeros(7)
    model.a.grad, model.b.grad = flat[:6].view(2, 3), flat[6:]
    pieces = [nn.Parameter(torch.zeros_like(piece)) for piece in flat.split(2)]
    for piece, its in zip(pieces, flat.split(2), strict=True):
        piece.grad = its
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for _ in range(3):
            flat.zero_()
            model(GRAD_A, 12.0).backward()
            clip_grad_norm_(reversed(pieces), 6.5)
            optimizer.step()
    assert server.trail("clip_norm") == pytest.approx(dict.fromkeys((1, 2, 3), 13.0))
    assert says(server, -1, {"a": 5.0, "b": 12.0}, {"a": 2.5, "b": 6.0})


def test_clipping_of_another_model_is_not_heard_and_keeps_nothing_alive(server: Server) -> None:
    model, other = Two(), Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for _ in range(STEPS):
            other(GRAD_A, 12.0).backward()
            clip_grad_norm_(other.parameters(), 1.0)
            memory = [StorageWeakRef(p.grad.untyped_storage()) for p in other.parameters() if p.grad is not None]
            other.zero_grad()
            assert all(of_gradient.expired() for of_gradient in memory)
            train(model, optimizer, 1)
    assert not server.trail("clip_norm")
    assert "clipped_grad_norm" not in server.samples[-1].statistics
