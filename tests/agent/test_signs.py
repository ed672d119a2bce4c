"""Signs of trouble between samples: what shows one, and that it brings a sample of the step that shows it."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch.steps.quiet import Signs, UsualLevel

from .conftest import Server
from .watching import Two

STEPS = 2000

Course = Callable[[int, random.Random], float]
HEALTHY: dict[str, Course] = {
    "falls and levels off": lambda step, noise: 2.3 * math.exp(-step / 200) + 0.1 * noise.random() + 0.05,
    "constant noise": lambda _step, noise: noise.gauss(1.0, 0.3),
    "around zero": lambda _step, noise: noise.gauss(0.0, 1.0),
    "heavy tails": lambda _step, noise: noise.lognormvariate(0.0, 0.5),
    "slow rise": lambda step, noise: 1.0 + 0.01 * step + noise.random(),
    "negative": lambda step, noise: -5.0 - 0.001 * step + noise.random(),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_course_shows_next_to_no_sign(name: str) -> None:
    signs, noise = Signs(), random.Random(0)
    found = [step for step in range(STEPS) if signs.of_numbers(HEALTHY[name](step, noise), None)]
    assert len(found) <= 2


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("times", [100.0, 1000.0])
def test_a_number_far_above_its_own_past_is_a_sign(name: str, times: float) -> None:
    level, noise = UsualLevel(), random.Random(1)
    last = 0.0
    for step in range(500):
        last = HEALTHY[name](step, noise)
        level.exceeded(last)
    assert level.exceeded(times * max(abs(last), 1.0))
    assert not level.exceeded(last), "one spike is no sign at the next step"
    assert level.exceeded(times * max(abs(last), 1.0)), "and it has not become usual"


def test_a_loss_that_stops_changing_is_a_sign_once() -> None:
    signs = Signs()
    losses = [1.0, 0.9, 0.8, *[0.75] * 50, 0.7, 0.72, *[0.5] * 50]
    found = [step for step, loss in enumerate(losses) if signs.of_numbers(loss, None)]
    assert found == [13, 65]


def test_a_loss_that_moves_by_its_last_bits_stops_changing_once() -> None:
    signs = Signs()
    losses = [2.3040518 - 2.4e-7 * (step // 13) for step in range(500)]
    assert [step for step, loss in enumerate(losses) if signs.of_numbers(loss, None)] == [10]


def test_a_clip_norm_of_zero_is_a_sign() -> None:
    signs = Signs()
    assert [signs.of_numbers(None, norm) for norm in (1.0, 2.0, 0.0, 1.0)] == [False, False, True, False]


def planted(server: Server, step: int, loss_factor: float, gradient_factor: float) -> set[int]:
    """Train with one step whose loss or gradient is multiplied; return the steps that were sampled."""
    model, noise = Two(), random.Random(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=1_000_000):
        for number in range(1, step + 5):
            here = number == step
            optimizer.zero_grad()
            size = 1.0 + 0.1 * noise.random()
            loss = model([[size, 0.0, 0.0], [0.0, 0.0, 0.0]], 0.0) * (gradient_factor if here else 1.0)
            loss = loss + ((loss_factor - 1) * loss).detach() if here else loss
            loss.backward()
            clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
    return {sample.step for sample in server.samples}


@pytest.mark.parametrize(
    ("loss_factor", "gradient_factor"),
    [(1000.0, 1.0), (math.nan, 1.0), (1.0, 1000.0), (1.0, 0.0), (1.0, math.inf)],
    ids=["loss x 1,000", "loss NaN", "gradient x 1,000", "gradient zero", "gradient infinite"],
)
def test_the_step_that_shows_a_sign_is_sampled(server: Server, loss_factor: float, gradient_factor: float) -> None:
    assert planted(server, 60, loss_factor, gradient_factor) == {1, 60}


def test_a_sign_brings_a_burst_in_the_default_setting(server: Server) -> None:
    layers = [layer for _ in range(40) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model, noise = nn.Sequential(*layers), random.Random(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, overhead_budget=1e-9):
        for number in range(1, 121):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 8)).sum() * (1.0 + 0.1 * noise.random())
            loss = loss + 1000.0 if number == 60 else loss
            loss.backward()
            optimizer.step()
    steps = {sample.step for sample in server.samples}
    assert steps == {*range(1, 21), *range(60, 81)}
    assert sorted(server.trail("loss")) == list(range(1, 121))
