"""Gradients that change between clipping and the step: noise, masks, decay by hand, other gradients in their place."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gradwatch import wire
from gradwatch.recording.gradient_versions import ClippedGradients
from gradwatch.recording.optimizer_parameters import OptimizerParameters
from tests.processes import PATIENCE_SECONDS

from .conftest import Server
from .truth import norm
from .watching import monitor_of, watch


def add_noise(weight: Tensor, grad: Tensor) -> None:
    grad.add_(0.05 * torch.randn_like(grad))


def decay(weight: Tensor, grad: Tensor) -> None:
    grad.add_(weight.detach(), alpha=0.1)


def mask(weight: Tensor, grad: Tensor) -> None:
    grad.mul_(torch.arange(grad.numel()).reshape(grad.shape) % 2)


def take_sign(weight: Tensor, grad: Tensor) -> None:
    grad.sign_().mul_(1e-3)


def replace(weight: Tensor, grad: Tensor) -> None:
    weight.grad = grad + 0.05


def add_to_data(weight: Tensor, grad: Tensor) -> None:
    """No version tells of this."""
    grad.data.add_(0.05)


def leave(weight: Tensor, grad: Tensor) -> None:
    pass


class Training:
    """A network whose gradients are clipped, changed, and stepped with."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.before: list[dict[str, float]] = []
        self.after: list[dict[str, float]] = []

    def norms(self) -> dict[str, float]:
        return {name: norm(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self, change: Callable[[Tensor, Tensor], None]) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 4)).square().mean().backward()
        self.before.append(self.norms())
        clip_grad_norm_(self.model.parameters(), 0.01)
        for weight in self.model.parameters():
            assert weight.grad is not None
            change(weight, weight.grad)
        self.after.append(self.norms())
        self.optimizer.step()


@pytest.mark.parametrize("change", [add_noise, decay, mask, take_sign, replace, add_to_data, leave])
def test_both_norms_are_those_that_were_there(server: Server, change: Callable[[Tensor, Tensor], None]) -> None:
    training = Training()
    with watch(training.model, server, training.optimizer):
        for _ in range(5):
            training.step(change)
    for step, (before, after) in enumerate(zip(training.before, training.after, strict=True), start=1):
        assert server.values("grad_norm", step) == pytest.approx(before, rel=1e-5), step
        assert server.values("clipped_grad_norm", step) == pytest.approx(after, rel=1e-5), step


@pytest.mark.parametrize("change", [add_noise, replace])
def test_a_training_that_begins_to_change_them_shows_no_other_number(
    server: Server, change: Callable[[Tensor, Tensor], None]
) -> None:
    """Where gradients were left alone for long, they are measured at the step alone."""
    training = Training()
    with watch(training.model, server, training.optimizer) as agent:
        clipped = monitor_of(agent).listener._actions.clipped_gradients
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not clipped.are_left_alone and time.monotonic() < deadline:
            training.step(leave)
        assert clipped.are_left_alone
        training.step(leave)
        begun = len(training.before) + 1
        for _ in range(3):
            training.step(change)
    for step, (before, after) in enumerate(zip(training.before, training.after, strict=True), start=1):
        measured = server.values("grad_norm", step)
        if step == begun:
            assert set(measured.values()) == {wire.MISSING}
        else:
            assert measured == pytest.approx(before, rel=1e-5), step
        assert server.values("clipped_grad_norm", step) == pytest.approx(after, rel=1e-5), step


def test_both_norms_are_measured_again_now_and_then(server: Server) -> None:
    training = Training()
    with watch(training.model, server, training.optimizer) as agent:
        clipped = monitor_of(agent).listener._actions.clipped_gradients
        for _ in range(10):
            clipped.comparison()(True)
        assert clipped.are_left_alone
        for _ in range(40):
            training.step(add_to_data)
    measured = server.values("grad_norm")
    assert measured == pytest.approx(training.before[-1], rel=1e-5)


def test_a_comparison_of_before_a_change_says_nothing_after_it() -> None:
    clipped, left = ClippedGradients(), nn.Parameter(torch.ones(2))
    left.grad = torch.ones(2)
    listed = OptimizerParameters([[left]], lambda _tensor: 0)
    late = [clipped.comparison() for _ in range(20)]
    for compared in late[:10]:
        compared(True)
    clipped.note(listed)
    left.grad.add_(1.0)
    assert clipped.are_left_alone
    assert clipped.changed(listed) == {0}
    for compared in late[10:]:
        compared(True)
    assert not clipped.are_left_alone
