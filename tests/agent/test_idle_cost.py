"""What the agent costs between samples, in Python calls, looks at gradients and writes: none depends on the machine."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch

from .conftest import Server
from .watching import watch

PACKAGE = str(Path(gradwatch.__file__).parent) + os.sep
NEVER = 1_000_000
"""Steps between two samples, of which no test makes as many."""


class Calls:
    """Counts the calls of the agent's Python functions, by file."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def note(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.files.append(frame.f_code.co_filename)

    def during(self, work: Callable[[], object]) -> list[str]:
        """Return the file of each call that this thread makes while it does the work."""
        before, self.files = sys.getprofile(), []
        sys.setprofile(self.note)
        try:
            work()
        finally:
            sys.setprofile(before)
        return self.files


def parameters(count: int) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(count)])


def stepping(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what makes one step of a training: one backward pass, one clipping, one optimizer."""

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum().backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    return step


def usual_calls(server: Server, count: int, optimizer_type: Any = torch.optim.Adam, every: int = NEVER) -> list[str]:
    """Return the file of each of the agent's calls in one step of a training that has run for a while."""
    model = parameters(count)
    step = stepping(model, optimizer_type(model.parameters(), lr=0.01))
    with gradwatch.attach(model, url=server.url, every=every):
        for _ in range(30):
            step()
        return sorted((Calls().during(step) for _ in range(5)), key=len)[2]  # every two seconds one takes some more


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_that_is_not_sampled_takes_few_calls(server: Server, optimizer_type: Any) -> None:
    calls = usual_calls(server, 6, optimizer_type)
    assert len(calls) <= 40
    assert len(set(calls)) <= 12


def test_a_sampled_step_runs_through_few_files(server: Server) -> None:
    assert len(set(usual_calls(server, 6, every=1))) <= 20


def test_a_step_that_is_not_sampled_takes_the_same_calls_however_many_parameters_there_are(server: Server) -> None:
    assert len(usual_calls(server, 400)) <= len(usual_calls(server, 6)) + 2


@pytest.mark.parametrize("count", [6, 400])
def test_a_model_that_is_not_watched_pays_next_to_nothing(server: Server, count: int) -> None:
    watched, other = parameters(count), parameters(count)
    ours = stepping(watched, torch.optim.Adam(watched.parameters(), lr=0.01))
    theirs = stepping(other, torch.optim.Adam(other.parameters(), lr=0.01))
    with gradwatch.attach(watched, url=server.url, every=NEVER):
        for _ in range(30):
            ours()
            theirs()
        assert max(len(Calls().during(theirs)) for _ in range(5)) <= 16


_GRADIENT: Any = torch.Tensor.grad


class LookedAt(nn.Parameter):
    """A parameter that counts how often the agent asks for its gradient."""

    looks = 0

    @property
    def grad(self) -> Tensor | None:
        type(self).looks += sys._getframe(1).f_code.co_filename.startswith(PACKAGE)
        gradient: Tensor | None = _GRADIENT.__get__(self)
        return gradient

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRADIENT.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _GRADIENT.__delete__(self)


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_backward_pass_looks_at_few_gradients(server: Server, in_turns: bool) -> None:
    """As a generator and a discriminator take turns, each with an optimizer of its own."""
    networks = [nn.ParameterList([LookedAt(torch.ones(2)) for _ in range(200)]) for _ in range(2)]
    turns = [[network] for network in networks] if in_turns else [networks]
    optimizers = [torch.optim.SGD([p for network in turn for p in network], lr=0.1) for turn in turns]
    with gradwatch.attach(networks, optimizers, url=server.url, every=NEVER):
        for _ in range(40):
            LookedAt.looks = 0
            for turn, optimizer in zip(turns, optimizers, strict=True):
                optimizer.zero_grad()
                torch.stack([parameter.sum() for network in turn for parameter in network]).sum().backward()
                optimizer.step()
        assert LookedAt.looks <= 20 * len(turns)


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_clipping_of_another_model_looks_at_few_gradients(
    server: Server, clip: Callable[[list[nn.Parameter], float], object]
) -> None:
    watched = nn.ParameterList([LookedAt(torch.ones(2)) for _ in range(200)])
    other = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = torch.optim.SGD(watched, lr=0.1)
    with gradwatch.attach(watched, optimizer, url=server.url, every=NEVER):
        torch.stack([parameter.sum() for parameter in [*watched, *other]]).sum().backward()
        LookedAt.looks = 0
        for _ in range(100):
            clip(other, 0.5)
        assert LookedAt.looks <= 15 * len(watched)


def test_steps_that_have_only_a_loss_are_written_in_large_pieces(server: Server) -> None:
    """About once a second: after a kill no more than the last second is missing."""
    model = parameters(6)
    step = stepping(model, torch.optim.SGD(model.parameters(), lr=0.01))
    seconds, steps = 4.0, 0
    with gradwatch.attach(model, url=server.url, every=NEVER):
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            step()
            steps += 1
            time.sleep(0.005)
    assert sorted(server.trail("loss")) == list(range(1, steps + 1))
    assert len(server.batches) <= 1.5 * seconds + 4


def test_the_agents_threads_rest_while_nothing_happens(server: Server) -> None:
    model, calls = parameters(6), Calls()
    step = stepping(model, torch.optim.SGD(model.parameters(), lr=0.01))
    threading.setprofile(calls.note)
    try:
        with watch(model, server):
            for _ in range(3):
                step()
            server.wait(lambda: len(server.samples) == 3)
            time.sleep(1.0)  # what follows the answer
            calls.files = []
            time.sleep(2.0)
            made = len(calls.files)
    finally:
        threading.setprofile(None)
    assert made <= 20


def test_the_default_setting_goes_on_sampling_short_steps(server: Server) -> None:
    """A sample of this model costs one or two milliseconds: 1% of six seconds pays for thirty and more."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, optimizer, url=server.url):
        for _ in range(300):
            time.sleep(0.03)
            batch = torch.randn(64, 16)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), batch[:, :4].argmax(1)).backward()
            optimizer.step()
    assert len([sample for sample in server.samples if sample.step > 100]) >= 5
