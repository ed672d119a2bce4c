"""Every kind of training in which a naive hook shows wrong numbers, each against a truth computed by hand."""

import copy
import gc
import io
import math
import socket
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import taps, wire
from gradwatch.binding import Binding, Lists
from gradwatch.buffers import Slot

from .conftest import Server


class Two(nn.Module):
    """Two vectors whose gradients are what the test says: loss = sum(weight * gradient)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 2.0]]))
        self.b = nn.Parameter(torch.tensor([4.0]))

    def forward(self, a: list[list[float]], b: float) -> Tensor:
        return (self.a * torch.tensor(a)).sum() + (self.b * b).sum()


GRAD_A = [[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]
"""Norm 5; second unit zero."""


def watch(model: nn.Module, server: Server, optimizer: Any = None, **options: Any) -> gradwatch.Agent:
    return gradwatch.attach(model, optimizer, url=server.url, every=1, **options)


def test_statistics_worked_by_hand(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert server.values("weight_norm") == pytest.approx({"a": math.sqrt(13), "b": 4.0})
    assert server.values("max_unit_ratio") == pytest.approx({"a": 5 / 3, "b": 3.0})
    assert server.values("zero_unit_share") == {"a": 0.5, "b": 0.0}
    assert server.values("nonfinite_count") == {"a": 0.0, "b": 0.0}
    assert server.scalar("global_grad_norm") == 13.0
    # One piece of the weights at a sample: lr 0.5 moves a by 2.5, b by 6.
    updates = server.values("update_norm")
    assert (updates["a"], updates["b"]) in [(2.5, wire.MISSING), (wire.MISSING, 6.0)]


def test_update_norm_goes_round(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            optimizer.step()
    seen = [server.values("update_norm", step) for step in (1, 2)]
    assert {name: max(values[name] for values in seen) for name in ("a", "b")} == {"a": 2.5, "b": 6.0}


def test_update_norm_of_a_large_parameter_comes_now_and_then(server: Server) -> None:
    model = nn.Linear(1024, 1024, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(1, 1024)).sum().backward()
            optimizer.step()
    updates = {
        step: server.values("update_norm", step)
        for step in range(1, 9)
        if "update_norm" in server.samples[step - 1].statistics
    }
    # A copy of 2^18 elements is allowed at each sample: 2^20 of them at every fourth.
    assert updates == {4: {"weight": pytest.approx(512.0)}, 8: {"weight": pytest.approx(512.0)}}


def test_clipping_by_norm_reports_before_and_after(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 6.5)
        optimizer.step()
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    assert server.values("grad_norm", 1) == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.values("clipped_grad_norm", 1) == pytest.approx({"a": 2.5, "b": 6.0})
    assert server.scalar("global_grad_norm", 1) == pytest.approx(13.0)
    assert server.scalar("clipped_global_grad_norm", 1) == pytest.approx(6.5)
    assert server.values("grad_norm", 2) == server.values("clipped_grad_norm", 2) == {"a": 5.0, "b": 12.0}
    assert server.trail("clip_norm") == {1: 13.0, 2: 13.0}


def test_clipping_by_norm_of_a_part(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_([model.b], 3.0)
        optimizer.step()
    assert server.values("grad_norm") == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.values("clipped_grad_norm") == pytest.approx({"a": 5.0, "b": 3.0})


def test_the_limit_of_clipping_goes_with_the_norms_that_it_limits(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    limits: list[float | Tensor | None] = [6.5, 2.6, None, torch.tensor(26.0), math.inf]
    with watch(model, server, optimizer):
        for limit in limits:
            model(GRAD_A, 12.0).backward()
            if limit is not None:
                clip_grad_norm_(model.parameters(), limit)  # type: ignore[arg-type]  # torch takes a tensor, too
            optimizer.step()
            optimizer.zero_grad()
    told = [
        tuple(
            sample.scalars.get(name)
            for name in ("global_grad_norm", "clipped_global_grad_norm", "global_grad_norm_limit")
        )
        for sample in server.samples
    ]
    assert told == [
        pytest.approx((13.0, 6.5, 6.5)),
        pytest.approx((13.0, 2.6, 2.6)),
        (13.0, None, None),
        (13.0, 13.0, 26.0),
        (13.0, 13.0, None),
    ]


def _clip_a_part(model: Two) -> None:
    clip_grad_norm_([model.b], 3.0)


def _clip_both_alone(model: Two) -> None:
    clip_grad_norm_([model.a], 3.0)
    clip_grad_norm_([model.b], 3.0)


def _clip_by_another_norm(model: Two) -> None:
    clip_grad_norm_(model.parameters(), 3.0, norm_type=math.inf)


def _clip_by_value(model: Two) -> None:
    clip_grad_value_(model.parameters(), 3.0)


@pytest.mark.parametrize("clip", [_clip_a_part, _clip_both_alone, _clip_by_another_norm, _clip_by_value])
def test_what_limits_something_else_is_no_limit_of_the_whole_norm(
    server: Server, clip: Callable[[Two], object]
) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    first, second = server.samples
    assert "clipped_global_grad_norm" in first.scalars
    assert "global_grad_norm_limit" not in first.scalars
    assert second.scalars["global_grad_norm_limit"] == 3.0


def test_a_parameter_without_a_gradient_is_under_every_limit(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        (model.b * 12.0).sum().backward()
        clip_grad_norm_([model.b], 3.0)
        optimizer.step()
    assert server.scalar("global_grad_norm_limit") == 3.0


def test_clipping_by_value_reports_before_and_after(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            clip_grad_value_(model.parameters(), 3.0)
            optimizer.step()
    for step in (1, 2):
        assert server.values("grad_norm", step) == pytest.approx({"a": 5.0, "b": 12.0})
        assert server.values("clipped_grad_norm", step) == pytest.approx({"a": math.sqrt(18), "b": 3.0})


@pytest.mark.parametrize("norm_first", [True, False])
def test_clipping_by_norm_and_by_value_reports_what_was_before_both(server: Server, norm_first: bool) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        if norm_first:
            clip_grad_norm_(model.parameters(), 6.5)  # half is left: 2.5 and 6
        clip_grad_value_(model.parameters(), 5.0)
        if not norm_first:
            clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert server.values("grad_norm") == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.values("clipped_grad_norm")["b"] == pytest.approx(5.0 if norm_first else 0.1 / math.sqrt(2))


def test_clipping_does_not_wipe_out_where_the_nan_came_from(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, math.nan).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        assert model.a.grad is not None
        assert bool(model.a.grad.isnan().all())  # torch spread it over everything
        optimizer.step()
    norms = server.values("grad_norm")
    assert norms["a"] == 5.0
    assert math.isnan(norms["b"])
    assert server.values("nonfinite_count") == {"a": 0.0, "b": 1.0}
    assert math.isnan(server.trail("clip_norm")[1])


def test_the_first_bad_step_is_sampled_even_if_none_was_due(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=1000):
        for step in range(1, 8):
            optimizer.zero_grad()
            model(GRAD_A, math.inf if step >= 5 else 1.0).backward()
            optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 5]
    assert [step for step, loss in server.trail("loss").items() if not math.isfinite(loss)] == [5, 6, 7]


@pytest.mark.parametrize("clip", [False, True])
def test_the_first_bad_round_of_several_optimizers_is_sampled_whole(server: Server, clip: bool) -> None:
    """Where the other has stepped already, unmeasured, that is the next one: it must not look as without gradient."""
    model = Two()
    first, second = torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0)
    with gradwatch.attach(model, [first, second], url=server.url, every=1000):
        for step in range(1, 31):
            model.zero_grad()
            (model.a * torch.tensor(GRAD_A)).sum().backward()
            first.step()
            (model.b * (math.nan if step >= 5 else 12.0)).sum().backward()
            if clip:
                clip_grad_norm_([model.b], 1.0)
            second.step()
    assert [sample.step for sample in server.samples] == [1, 6]
    assert server.values("grad_norm", 6)["a"] == 5.0
    assert server.values("nonfinite_count", 6) == {"a": 0.0, "b": 1.0}


def test_nonfinite_elements_are_counted_exactly(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model([[math.nan, math.inf, 1.0], [-math.inf, 2.0, 2.0]], 1e30).backward()
        optimizer.step()
    assert server.values("nonfinite_count") == {"a": 3.0, "b": 0.0}
    assert server.values("grad_norm")["b"] == pytest.approx(1e30)  # its square is not a float32


def test_vanishing_below_what_float32_can_square(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model([[3e-30, 0.0, 4e-30], [0.0, 0.0, 0.0]], 0.0).backward()
        optimizer.step()
    assert server.values("grad_norm") == pytest.approx({"a": 5e-30, "b": 0.0})


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_is_taken_out(server: Server, fused: bool) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    with watch(model, server, optimizer):
        for value in (12.0, math.inf, 12.0):
            optimizer.zero_grad()
            scaler.scale(model(GRAD_A, value)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [sample.step for sample in server.samples] == [1, 3]
    assert server.values("grad_norm", 1) == server.values("grad_norm", 3) == {"a": 5.0, "b": 12.0}
    assert (server.scalar("loss_scale", 1), server.scalar("loss_scale", 3)) == (1024.0, 512.0)
    assert server.scalar("skipped_steps", 3) == 1.0
    assert [event.step for event in server.events if event.kind == "skipped_step"] == [2]
    assert server.trail("loss")[1] == pytest.approx(3 + 8 + 48)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_with_clipping(server: Server, fused: bool) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizer):
        scaler.scale(model(GRAD_A, 12.0)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 6.5)
        scaler.step(optimizer)
        scaler.update()
    assert server.values("grad_norm") == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.values("clipped_grad_norm") == pytest.approx({"a": 2.5, "b": 6.0})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_a_step_that_was_clipped_and_skipped_has_no_sample(
    server: Server, clip: Callable[[Any, float], Any], fused: bool
) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizer):
        for value in (12.0, math.inf, 12.0):
            optimizer.zero_grad()
            loss = model(GRAD_A, 12.0)
            scaler.scale(loss).backward()
            assert model.b.grad is not None
            model.b.grad *= value  # what an overflow in half precision does
            scaler.unscale_(optimizer)
            clip(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert [sample.step for sample in server.samples] == [1, 3]
    assert server.scalar("skipped_steps", 3) == 1.0
    assert [event.step for event in server.events] == [2]
    assert server.trail("loss")[2] == pytest.approx(loss.item(), abs=5.0)
    assert server.values("grad_norm", 3) == pytest.approx({"a": 5.0, "b": 144.0})


def test_a_round_in_which_one_optimizer_was_skipped_has_no_sample(server: Server) -> None:
    model = Two()
    optimizers = [torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizers):
        for value in (12.0, math.inf, 12.0):
            model.zero_grad()
            scaler.scale(model(GRAD_A, value)).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    assert [sample.step for sample in server.samples] == [1, 3]
    assert server.values("grad_norm", 3) == {"a": 5.0, "b": 12.0}
    assert server.scalar("skipped_steps", 3) == 1.0


def test_the_loss_is_unscaled_however_it_was_scaled(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizer):
        both = scaler.scale([model(GRAD_A, 1.0), model(GRAD_A, 2.0)])
        torch.autograd.backward(both)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        first, second = scaler.scale(model(GRAD_A, 1.0)), scaler.scale(model(GRAD_A, 2.0))
        second.backward()
        first.backward()
        scaler.step(optimizer)
    with torch.no_grad():
        expected = float(model(GRAD_A, 1.0) + model(GRAD_A, 2.0))
    assert server.trail("loss") == pytest.approx({1: expected, 2: expected})


def test_backward_takes_what_torch_takes(server: Server) -> None:
    model = Two()
    with watch(model, server, torch.optim.SGD(model.parameters(), lr=0.0)):
        losses: Any = (model(GRAD_A, 1.0) for _ in range(2))
        torch.autograd.backward(losses)
        assert model.a.grad is not None
        assert model.a.grad.tolist() == [[6.0, 0.0, 8.0], [0.0, 0.0, 0.0]]
        assert isinstance(torch.amp.GradScaler("cpu").scale([model.b.sum()]), list)


def test_the_loss_is_known_whatever_is_frozen(server: Server) -> None:
    """First, middle and last parameter are frozen, as a low-rank adapter freezes all but itself."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(5)))
    for place in (0, 2, 4):
        model[place].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    truth = {}
    with watch(model, server, optimizer):
        for step in range(1, 5):
            if step == 3:  # the other way round
                model.requires_grad_(True)
                model[1].requires_grad_(False)
                model[3].requires_grad_(False)
            optimizer.zero_grad()
            loss = model(torch.ones(2)).sum()
            loss.backward()
            optimizer.step()
            truth[step] = loss.item()
    assert server.trail("loss") == truth


@pytest.mark.parametrize("steps", [6, 130])
def test_the_loss_is_known_whichever_head_is_trained(server: Server, steps: int) -> None:
    heads, elsewhere = nn.ModuleList(nn.Linear(1, 1) for _ in range(6)), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.01)
    truth = {}
    with gradwatch.attach(heads, optimizer, url=server.url, every=1000):
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            # Long enough one of them alone that it is taken for what is always trained; then the others, in turn.
            head = heads[0 if steps > 6 and step < 110 else step % 6]
            loss = head(torch.ones(1)).square().sum()
            loss.backward()
            elsewhere(torch.ones(1)).sum().backward() if step % 3 == 0 and step > 110 else None
            optimizer.step()
            truth[step] = loss.item()
    assert server.trail("loss") == truth


def test_what_was_clipped_before_the_last_backward_is_no_clipping_of_the_step(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms: list[float] = []
    with watch(model, server, optimizer):
        for last in (True, False):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            clip_grad_norm_(model.parameters(), 1.3)  # a tenth is left: 0.5 and 1.2
            model([[1.5, 0.0, 2.0], [0.0, 0.0, 0.0]], 5.0).backward()  # 3 and 6.2 now
            norms = [clip_grad_norm_(model.parameters(), 1.3).item()] if last else norms
            optimizer.step()
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            clip_grad_value_(model.parameters(), 1.0)
            model.b.sum().backward()
            clip_grad_value_(model.parameters(), 1.5) if last else None
            optimizer.step()
    assert server.scalar("global_grad_norm", 1) == pytest.approx(math.hypot(3.0, 6.2))
    assert norms == [pytest.approx(math.hypot(3.0, 6.2))]
    assert server.scalar("clipped_global_grad_norm", 1) == pytest.approx(1.3)
    assert server.values("grad_norm", 3) == pytest.approx({"a": 3.0, "b": 6.2})
    assert server.values("grad_norm", 2)["b"] == 2.0
    assert server.values("clipped_grad_norm", 2)["b"] == 1.5
    assert server.values("grad_norm", 4)["b"] == 2.0


def test_the_loss_of_an_unwatched_model_is_not_ours(server: Server) -> None:
    model, critic = Two(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        (1000 * critic(torch.ones(1, 1))).sum().backward()
        model(GRAD_A, 1.0).backward()
        model.zero_grad()
        model(GRAD_A, 1.0).backward()
        optimizer.step()
    with torch.no_grad():
        assert server.trail("loss") == pytest.approx({1: float(model(GRAD_A, 1.0))})


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
@pytest.mark.parametrize("thrower", ["model", "optimizer"])
@pytest.mark.parametrize("bad", [math.nan, 1000.0])
def test_a_step_that_the_user_leaves_out_leaves_nothing_behind(
    server: Server, clip: Callable[[Any, float], Any], thrower: str, bad: float
) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer) as agent:
        for value in (12.0, bad, 12.0):
            (model if thrower == "model" else optimizer).zero_grad()
            model(GRAD_A, value).backward()
            clip(model.parameters(), 3.0)
            if value == 12.0:
                optimizer.step()
        (model if thrower == "model" else optimizer).zero_grad()
        model(GRAD_A, 12.0).backward()
        optimizer.step()
        assert agent._meter.slots._made - len(agent._meter.slots._free) <= 3
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    for step in (1, 2, 3):
        assert server.values("grad_norm", step) == pytest.approx({"a": 5.0, "b": 12.0})
        assert server.values("nonfinite_count", step) == {"a": 0.0, "b": 0.0}
    assert "clipped_grad_norm" in server.samples[1].statistics
    assert "clipped_grad_norm" not in server.samples[2].statistics
    assert server.trail("loss") == {1: 59.0, 2: 59.0, 3: 59.0}


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
@pytest.mark.parametrize("given", [True, False])
def test_what_another_optimizer_throws_away_is_not_ours(
    server: Server, clip: Callable[[Any, float], Any], given: bool
) -> None:
    """The generator's loss passes through the discriminator, whose gradients of it nobody wants."""
    model = Two()
    generator, discriminator = torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0)
    with watch(model, server, [generator, discriminator] if given else None):
        for _ in range(3):
            discriminator.zero_grad()
            (model.b * 12.0).sum().backward()
            discriminator.step()
            generator.zero_grad()
            model(GRAD_A, 100.0).backward()
            clip([model.a], 2.0)
            discriminator.zero_grad()
            generator.step()
    for step in (1, 2, 3):
        assert server.values("grad_norm", step) == pytest.approx({"a": 5.0, "b": 12.0})
        assert server.values("clipped_grad_norm", step)["a"] < 3.0
    assert server.trail("loss") == dict.fromkeys((1, 2, 3), 48.0 + 11.0 + 400.0)


def test_when_every_optimizer_throws_away_the_loss_is_gone(server: Server) -> None:
    model = Two()
    optimizers = [torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0)]
    with watch(model, server, optimizers):
        for value in (12.0, 1000.0, 12.0):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=False)
            model(GRAD_A, value).backward()
            clip_grad_norm_(model.parameters(), 6.5)
            for optimizer in optimizers if value == 12.0 else []:
                optimizer.step()
    assert server.values("grad_norm", 2) == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.trail("loss") == {1: 59.0, 2: 59.0}


def test_gradients_that_are_clipped_in_the_closure_belong_to_its_step(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(GRAD_A, 12.0)
        loss.backward()
        clip_grad_value_(model.parameters(), 3.0)
        return loss

    with watch(model, server, optimizer):
        optimizer.step(closure)
        optimizer.zero_grad()
        model(GRAD_A, 1.0).backward()
        optimizer.step()
    assert server.values("grad_norm", 1) == {"a": 5.0, "b": 12.0}
    assert server.values("clipped_grad_norm", 1) == pytest.approx({"a": math.sqrt(18), "b": 3.0})
    assert server.values("grad_norm", 2) == {"a": 5.0, "b": 1.0}
    assert "clipped_grad_norm" not in server.samples[1].statistics


def test_closures_are_measured_after_their_first_evaluation(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss: Tensor = ((model.a**2).sum() + (model.b**2).sum()) / 2
        loss.backward()
        return loss

    with watch(model, server, optimizer):
        for _ in range(2):
            first = model.a.detach().norm().item(), model.b.detach().norm().item()
            optimizer.step(closure)
    assert evaluations > 2
    assert [sample.step for sample in server.samples] == [1, 2]
    assert server.values("grad_norm", 1) == pytest.approx({"a": math.sqrt(13), "b": 4.0})
    assert server.trail("loss")[1] == pytest.approx((13 + 16) / 2)
    assert server.values("grad_norm", 2) == pytest.approx({"a": first[0], "b": first[1]}, rel=1e-5)


def test_a_subclass_that_calls_super_counts_once(server: Server) -> None:
    class Outer(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise ValueError("user code")
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # SGD.step itself is hooked from now on
    model = Two()
    optimizer = Outer(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for step in range(4):
            optimizer.fails = step == 1
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            if optimizer.fails:
                with pytest.raises(ValueError, match="user code"):
                    optimizer.step()
            else:
                optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4]


def test_accumulation_counts_steps_and_sums_the_loss(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for _ in range(2):
            for _ in range(4):
                (model(GRAD_A, 12.0) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [sample.step for sample in server.samples] == [1, 2]
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert server.trail("loss") == pytest.approx({1: 59.0, 2: 59.0})


def test_accumulation_over_any_number_of_batches_sums_the_loss(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer) as agent:
        for _ in range(2500):
            model(GRAD_A, 12.0).backward()
        assert len(agent._pending.losses) <= 1024
        optimizer.step()
    assert server.trail("loss") == {1: 59.0 * 2500}


def test_the_loss_of_a_scaler_that_scales_in_its_own_way(server: Server) -> None:
    """As the one for sharded training does; it is imported after the agent was attached, or before."""
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def train(scaler: torch.amp.GradScaler) -> None:
        optimizer.zero_grad()
        scaler.scale(model(GRAD_A, 12.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    with watch(model, server, optimizer):

        class Scaler(torch.amp.GradScaler):
            def scale(self, outputs: Any) -> Any:
                assert self._scale is not None or not self._lazy_init_scale_growth_tracker(outputs.device)  # type: ignore[func-returns-value]
                return outputs * self._scale

        own = Scaler.scale
        train(scaler := Scaler("cpu", init_scale=1024.0))
        train(scaler)
    assert server.trail("loss") == {1: 59.0, 2: 59.0}
    assert Scaler.scale is own
    with watch(model, server, optimizer):
        train(scaler)
    assert server.trail("loss") == {1: 59.0, 2: 59.0}


def test_whoever_wrapped_backward_meanwhile_does_not_count_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)  # to be put back
    agent = watch(model, server, optimizer)
    first = torch.autograd.backward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return first(*args, **kwargs)

    torch.autograd.backward = theirs
    agent.close()
    with watch(model, server, optimizer):
        for _ in range(2):
            model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert server.trail("loss") == {1: 118.0}


def test_several_optimizers_make_one_round(server: Server) -> None:
    model = Two()
    first, second = torch.optim.SGD([model.a], lr=0.25), torch.optim.SGD([model.b], lr=0.5)
    with watch(model, server):
        for _ in range(3):
            model.zero_grad()
            model(GRAD_A, 12.0).backward()
            first.step()
            second.step()
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.values("grad_norm", 2) == {"a": 5.0, "b": 12.0}
    assert (server.scalar("learning_rate"), server.scalar("learning_rate.1")) == (0.25, 0.5)


def test_an_optimizer_over_part_of_the_model(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD([model.b], lr=0.5)
    elsewhere = nn.Linear(2, 2)
    other = torch.optim.SGD(elsewhere.parameters(), lr=0.5)
    with watch(model, server):
        model(GRAD_A, 12.0).backward()
        elsewhere(torch.ones(2)).sum().backward()
        other.step()
        optimizer.step()
    assert server.values("grad_norm") == {"a": wire.MISSING, "b": 12.0}
    assert server.values("weight_norm") == pytest.approx({"a": math.sqrt(13), "b": 4.0})


@pytest.mark.parametrize("at_once", [True, False])
def test_optimizer_in_backward(server: Server, at_once: bool) -> None:
    """Gradients are thrown away at once, or before the next backward pass."""
    model = Two()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.0) for parameter in model.parameters()}

    def apply(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        if at_once:
            optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(apply)
    with watch(model, server):
        for factor in (1.0, 1.0, 2.0):
            model.zero_grad()
            (model(GRAD_A, 12.0) * factor).backward()
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.values("grad_norm", 1) == server.values("grad_norm", 2) == {"a": 5.0, "b": 12.0}
    assert server.values("grad_norm", 3) == {"a": 10.0, "b": 24.0}
    assert server.trail("loss") == {1: 59.0, 2: 59.0, 3: 118.0}


def test_a_backward_pass_within_another_leaves_it_its_loss(server: Server) -> None:
    """Reentrant checkpointing differentiates each part by itself; a pass that fails has no loss."""
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model.weight.fill_(1.0)

    def fail(_grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    with watch(model, server, optimizer):
        for step in range(3):
            failing = model(torch.ones(2)).sum()
            failing.register_hook(fail)
            with pytest.raises(ZeroDivisionError):
                failing.backward()
            optimizer.zero_grad()
            inputs = torch.full((2,), step + 1.0, requires_grad=True)
            checkpoint(model, inputs, use_reentrant=True).sum().backward()
            optimizer.step()
            del failing
    assert server.trail("loss") == {1: 4.0, 2: 8.0, 3: 12.0}


def test_tied_frozen_and_later_unfrozen(server: Server) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, server, optimizer):
        for frozen in (True, False):
            model[2].requires_grad_(not frozen)
            optimizer.zero_grad()
            model(torch.ones(3)).sum().backward()
            optimizer.step()
    assert server.names == ["0.weight", "2.weight", "2.bias"]
    trainable = [[parameter.trainable for parameter in told.parameters] for told in server.registrations]
    assert (trainable[0], trainable[-1]) == ([True, False, False], [True, True, True])
    assert server.values("grad_norm", 1)["2.weight"] == wire.MISSING
    assert server.values("grad_norm", 2)["2.bias"] == pytest.approx(math.sqrt(2))


def test_networks_that_freeze_each_other_in_turn_stay_as_they_are(server: Server) -> None:
    players = [nn.Linear(3, 3), nn.Linear(3, 3)]
    optimizers = [torch.optim.SGD(player.parameters(), lr=0.1) for player in players]
    with gradwatch.attach(players, optimizers, url=server.url, every=1):
        for _ in range(5):
            for player, other, optimizer in zip(players, players[::-1], optimizers, strict=True):
                other.requires_grad_(False)
                optimizer.zero_grad()
                player(other(torch.ones(3))).sum().backward()
                optimizer.step()
                other.requires_grad_(True)
    assert all(parameter.trainable for parameter in server.registrations[-1].parameters)
    assert len(server.registrations) <= 4


def test_what_no_optimizer_steps_any_more_is_frozen_too(server: Server) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with gradwatch.attach(model, url=server.url, every=1):
        for frozen in (False, True):
            model[0].requires_grad_(not frozen)
            optimizer = torch.optim.SGD([entry for entry in model.parameters() if entry.requires_grad], lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(3)).sum().backward()
                optimizer.step()
    trainable = [parameter.trainable for parameter in server.registrations[-1].parameters]
    assert trainable == [False, False, True, True]


@pytest.mark.parametrize("clip", [False, True])
def test_sparse_gradients(server: Server, clip: bool) -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2))
    sparse, dense = torch.optim.SGD(model[0].parameters(), lr=0.0), torch.optim.SGD(model[1].parameters(), lr=0.0)
    index = torch.tensor([1, 4, 1])
    with watch(model, server):
        for _ in range(2):
            model.zero_grad()
            model(index).sum().backward()
            if clip:
                clip_grad_norm_(model[1].parameters(), 1.0)
            sparse.step()
            dense.step()
    linear = model[1]
    assert isinstance(linear, nn.Linear)
    row = linear.weight.detach().sum(0)
    assert server.values("grad_norm")["0.weight"] == pytest.approx(float(row.norm()) * math.sqrt(5), rel=1e-6)
    assert server.values("zero_unit_share")["0.weight"] == pytest.approx(4 / 6)
    assert server.registrations[0].parameters[0].units == 6


def test_complex_empty_and_zero_dimensional(server: Server) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.complex = nn.Parameter(torch.tensor([[3 + 4j, 0j], [0j, 2j]]))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.none = nn.Parameter(torch.zeros(3, 0))
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.gain = nn.Parameter(torch.tensor(3.0))
            self.wide = nn.Parameter(torch.tensor([[6.0, 8.0]], dtype=torch.float64))

        def forward(self) -> Tensor:
            return (
                (self.complex * self.complex.conj()).real.sum() / 2
                + self.empty.sum()
                + self.none.sum()
                + 7 * self.scalar
                + 5 * self.gain
                + self.wide.sum()
            )

    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)
    with watch(model, server, optimizer):
        model().backward()
        optimizer.step()
    expected = {"complex": math.sqrt(29), "empty": 0.0, "none": 0.0, "scalar": 7.0, "gain": 5.0, "wide": math.sqrt(2)}
    assert server.values("grad_norm") == pytest.approx(expected)
    assert server.values("weight_norm") == pytest.approx({**expected, "scalar": 2.0, "gain": 3.0, "wide": 10.0})
    assert [parameter.units for parameter in server.registrations[0].parameters] == [2, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(server: Server, dtype: torch.dtype) -> None:
    model = nn.Linear(300, 200).to(dtype)
    model.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model.weight.grad = torch.full_like(model.weight, 1000.0)
        model.bias.grad = torch.full_like(model.bias, 60000.0)
        optimizer.step()
    thousand = float(torch.tensor(1000.0, dtype=dtype))
    large = float(torch.tensor(60000.0, dtype=dtype))
    assert server.values("grad_norm") == pytest.approx(
        {"weight": thousand * math.sqrt(60000), "bias": large * math.sqrt(200)}, rel=1e-6
    )
    assert server.values("weight_norm")["weight"] == pytest.approx(math.sqrt(60000))


def test_parameters_added_and_removed_later(server: Server) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2)).sum().backward()
        optimizer.step()

    with watch(model, server, optimizer):
        step()
        model.append(nn.Linear(2, 3, bias=False))
        optimizer.add_param_group({"params": model[1].parameters()})
        step()
        del optimizer.param_groups[1]
        step()
    assert server.names == ["0.weight", "1.weight"]
    assert [len(sample.statistics["grad_norm"]) for sample in server.samples] == [1, 2, 2]
    assert server.values("grad_norm", 2)["1.weight"] > 0
    assert server.values("grad_norm", 3)["1.weight"] == wire.MISSING


@pytest.mark.parametrize("what", ["model", "step"])
def test_compiled(server: Server, what: str) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(), watch(model, server, optimizer):
        warnings.simplefilter("ignore")
        forward: Any = torch.compile(model, backend="aot_eager") if what == "model" else model
        step = torch.compile(optimizer.step, backend="eager") if what == "step" else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            (forward.a * torch.tensor(GRAD_A)).sum().backward() if what == "step" else forward(GRAD_A, 12.0).backward()
            step()
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.names == ["a", "b"]
    assert server.values("grad_norm")["a"] == 5.0


@pytest.mark.parametrize("whole", [True, False])
def test_clipping_that_is_compiled(server: Server, whole: bool) -> None:
    """As one graph it stays one, and is not heard; else the graph is broken around it."""
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def clip() -> None:
        clip_grad_norm_(model.parameters(), 6.5)
        if whole:
            clip_grad_value_(model.parameters(), 1e9)

    with warnings.catch_warnings(), watch(model, server, optimizer):
        warnings.simplefilter("ignore")
        compiled = torch.compile(clip, backend="eager", fullgraph=whole)
        for _ in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            compiled()
            optimizer.step()
    assert server.scalar("global_grad_norm") == pytest.approx(6.5 if whole else 13.0)
    assert server.trail("clip_norm") == ({} if whole else {1: 13.0, 2: 13.0})


def test_a_compiled_model_keeps_its_names_and_registration_order(server: Server) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: Any = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
        with watch(compiled, server, optimizer):
            compiled(torch.ones(3)).sum().backward()
            optimizer.step()
    assert server.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    depths = [parameter.depth or 0 for parameter in server.registrations[-1].parameters]
    assert max(depths[:2]) < min(depths[2:])


def test_a_watched_model_copies_and_pickles(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        for place in range(2):
            twin = copy.deepcopy(model)
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            assert torch.equal(torch.load(buffer, weights_only=False).a, model.a)
            twin(GRAD_A, 99.0).backward()
            torch.optim.SGD(twin.parameters(), lr=1.0).step()
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            optimizer.step()
            assert place + 1 == 1 or not model.a._post_accumulate_grad_hooks
    assert [sample.step for sample in server.samples] == [1, 2]
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}


def test_a_model_that_holds_its_agent_copies_and_pickles(server: Server) -> None:
    model: Any = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer) as agent:
        model.agent = agent
        assert copy.deepcopy(model).agent is copy.copy(model).agent is agent
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert (loaded.agent.run_id, loaded.agent.run_url) == (agent.run_id, agent.run_url)
    assert not loaded.agent.watching
    loaded.agent.log(loss=1.0)
    loaded.agent.close()
    assert [sample.step for sample in server.samples] == [1]
    assert len(server.registrations) == 2  # the second when the depth was known


def test_retain_graph_and_double_backward(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        loss = (model.a**2).sum() + (model.b**3).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        (gradient,) = torch.autograd.grad((model.b**3).sum(), model.b, create_graph=True)
        (gradient**2).sum().backward()  # (3 b^2)^2 = 9 b^4, derivative 36 b^3
        optimizer.step()
    assert server.values("grad_norm", 1) == pytest.approx({"a": 4 * math.sqrt(13), "b": 96.0})
    assert server.values("grad_norm", 2) == pytest.approx({"a": wire.MISSING, "b": 36 * 64})
    assert server.trail("loss") == pytest.approx({1: 2 * (13 + 64), 2: 48.0**2})


def test_an_exception_between_backward_and_step(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for step in range(3):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            if step != 1:
                optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 2]
    assert server.trail("loss") == {1: 59.0, 2: 59.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.0, foreach=False),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.0), capturable=False, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.0, foreach=True),
    ],
)
def test_forms_of_optimizers(server: Server, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = Two()
    optimizer = make(model.parameters())
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert server.scalar("learning_rate") == 0.0


def test_transposed_and_grouped_convolutions(server: Server) -> None:
    transposed = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    model = nn.Sequential(transposed, nn.Conv2d(6, 4, 3, groups=2), nn.LayerNorm([3, 3]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model(torch.randn(2, 4, 3, 3)).square().sum().backward()
        optimizer.step()
    assert {p.name: p.units for p in server.registrations[0].parameters} == {
        "0.weight": 6,
        "1.weight": 4,
        "1.bias": 1,
        "2.weight": 1,
        "2.bias": 1,
    }
    assert transposed.weight.grad is not None
    grad, weight = np.asarray(transposed.weight.grad.double()), np.asarray(transposed.weight.detach().double())
    ratios = []
    for group in range(2):
        for out in range(3):
            unit = np.s_[group * 2 : group * 2 + 2, out]
            ratios.append(float(np.linalg.norm(grad[unit])) / max(float(np.linalg.norm(weight[unit])), 1e-3))
    assert server.values("max_unit_ratio")["0.weight"] == pytest.approx(max(ratios), rel=1e-6)


def slots() -> list[Slot]:
    """Return the buffers of all agents of this process, those of earlier tests among them."""
    return [found for found in gc.get_objects() if type(found) is Slot]


def slot_bytes(others: list[Slot]) -> int:
    """Return what the buffers take that were made since."""
    return sum(slot.bytes for slot in slots() if all(slot is not other for other in others))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_packed_weights_of_one_column_are_one_unit_and_cost_no_memory(server: Server, dtype: torch.dtype) -> None:
    """As QLoRA keeps four-bit weights: frozen, of shape (N, 1)."""
    model = nn.Sequential(nn.Linear(3, 2))
    rows = 5_000_001  # more than integers are converted at once
    packed = (torch.arange(rows) % 7).to(dtype)[:, None]
    model.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    others = slots()
    with watch(model, server, optimizer):
        model[0](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert slot_bytes(others) < 100_000
    true = float(np.linalg.norm(packed.double().numpy()))
    assert server.values("weight_norm")["packed"] == pytest.approx(true, rel=1e-6)
    assert server.values("grad_norm")["packed"] == -1.0
    if dtype is torch.uint8:
        assert server.registrations[0].parameters[0].units == 1


@pytest.mark.parametrize(("rows", "units"), [(2**20, 2**20), (2**20 + 1, 1)])
def test_a_parameter_of_too_many_units_is_one(server: Server, rows: int, units: int) -> None:
    model = nn.Embedding(rows, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    others = slots()
    with watch(model, server, optimizer):
        model(torch.tensor([3, 3, 7])).sum().backward()  # gradients 2 and 1
        optimizer.step()
        assert slot_bytes(others) < 2 * 4 * 2 * units + 100_000
    assert server.registrations[0].parameters[0].units == units
    norm, weight = 5.0**0.5, 0.5 * rows**0.5
    assert server.values("grad_norm")["weight"] == pytest.approx(norm)
    assert server.values("weight_norm")["weight"] == pytest.approx(weight)
    assert server.values("max_unit_ratio")["weight"] == pytest.approx(2 / 0.5 if units > 1 else norm / weight)
    assert server.values("zero_unit_share")["weight"] == pytest.approx(1 - 2 / rows if units > 1 else 0.0)


def test_clipping_tells_all_units_apart(server: Server) -> None:
    model = nn.Embedding(2**20 + 1, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer, clip=gradwatch.AGC(3.0, exclude=[])):
        model(torch.tensor([3, 3, 7])).sum().backward()
        optimizer.step()
    assert model.weight.grad is not None
    assert model.weight.grad[[3, 7], 0].tolist() == [1.5, 1.0]  # at most three times 0.5
    assert server.registrations[0].parameters[0].units == 2**20 + 1


def test_a_lazy_module_is_watched_when_it_has_a_shape(server: Server) -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    with watch(model, server):
        out = model(torch.ones(1, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        out.sum().backward()
        optimizer.step()
        assert isinstance(model[0].weight.grad, Tensor)
    assert sorted(server.names) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert server.values("grad_norm")["0.weight"] == pytest.approx(float(model[0].weight.grad.norm()))


def test_two_agents_at_once(server: Server) -> None:
    first, second = Two(), nn.Linear(2, 1, bias=False)
    one, two = torch.optim.SGD(first.parameters(), lr=0.0), torch.optim.SGD(second.parameters(), lr=0.0)
    with watch(first, server) as a, watch(second, server) as b:
        for _ in range(2):
            one.zero_grad()
            first(GRAD_A, 12.0).backward()
            second(torch.ones(2)).sum().backward()
            one.step()
            two.step()
    by_run = {registration.id: registration for registration in server.registrations}
    assert [p.name for p in by_run[a.run_id].parameters] == ["a", "b"]
    assert [p.name for p in by_run[b.run_id].parameters] == ["weight"]
    own = [batch for batch in server.batches if batch.samples and len(batch.samples[0].statistics["grad_norm"]) == 2]
    trails = [batch.trail["loss"] for batch in own]
    assert dict(pair for trail in trails for pair in zip(trail.steps, trail.values, strict=True)) == {1: 59.0, 2: 59.0}


def test_an_agent_whose_model_is_gone_retires(server: Server) -> None:
    gradwatch.attach(nn.Linear(2, 2), url=server.url)
    gc.collect()
    kept = nn.Linear(2, 2)
    wrapped = gradwatch.attach(nn.Sequential(kept), url=server.url)  # only the wrapper is gone
    with gradwatch.attach(nn.Linear(3, 3), url=server.url) as last:
        assert [listener for listener in taps.listeners() if listener is not last] == [wrapped]
    wrapped.close()


def test_an_agent_that_is_never_closed_keeps_nothing_alive(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch(model, server)
    for _ in range(2):
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 6.5)
        clip_grad_value_([model.a], 1.0)
        optimizer.step()
    kept = weakref.ref(model.a), weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


def test_lists_that_are_clipped_in_turn_are_each_known_again() -> None:
    first, second = [torch.zeros(1)], [torch.zeros(2), torch.zeros(3)]
    lists = Lists(lambda parameters: Binding([parameters], lambda _parameter: None))
    known = [lists.binding(first), lists.binding(second)]
    assert [lists.binding(first), lists.binding(list(second))] == known
    assert lists.binding(second[:1]) not in known
    others = [[torch.zeros(1)] for _ in range(100)]
    for other in others:
        lists.binding(other)
    assert lists.binding(first) not in known  # they are not kept for ever


def test_clipping_another_model_does_not_search_ours(server: Server) -> None:
    class Walked(Two):
        walks = 0

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            self.walks += 1
            return super().named_modules(*args, **kwargs)

    model, other = Walked(), nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    other(torch.ones(2)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        before = model.walks
        for parameter in [*other.parameters()] * 2:
            clip_grad_norm_(parameter, 1.0)
        assert model.walks == before
        optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}


def test_a_parameter_with_the_id_of_one_that_is_gone(server: Server) -> None:
    model = Two()
    model.old = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(50))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server) as agent:
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 6.5)
        optimizer.step()
        gone = set(map(id, model.old))
        del model.old, optimizer.param_groups[0]["params"][2:]
        gc.collect()
        made = [nn.Parameter(torch.ones(2))]
        while id(made[-1]) not in gone:
            made.append(nn.Parameter(torch.ones(2)))
            assert len(made) < 10_000
        model.new = made[-1]
        optimizer.param_groups[0]["params"].append(model.new)
        optimizer.zero_grad()
        (model(GRAD_A, 12.0) + (model.new * torch.tensor([84.0, 0.0])).sum()).backward()
        clip_grad_norm_(model.parameters(), 8.5)  # of a norm of 85
        optimizer.step()
        assert agent.losses.errors == 0
    before, after = server.values("grad_norm", 2), server.values("clipped_grad_norm", 2)
    assert {name: before[name] for name in ("a", "b", "new")} == pytest.approx({"a": 5.0, "b": 12.0, "new": 84.0})
    assert {name: after[name] for name in ("a", "b", "new")} == pytest.approx(
        {"a": 0.5, "b": 1.2, "new": 8.4}, rel=1e-5
    )
    assert {value for name, value in before.items() if name.startswith("old")} == {wire.MISSING}


def test_repeated_attach_replaces_the_earlier_agent(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first = watch(model, server, optimizer)
    with watch(model, server, optimizer) as second:
        assert not first.watching
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert first.run_id != second.run_id
    assert len(server.samples) == 1


_DDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
import gradwatch
rank, port, url = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1, bias=False))
model.module.weight.data.fill_(1.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
with gradwatch.attach(model, optimizer, url=url, every=1):
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[3.0 + 2 * rank, 4.0 + 0 * rank]])).sum().backward()
        optimizer.step()
dist.destroy_process_group()
"""


def test_data_parallel_rank_0_reports(server: Server) -> None:
    import subprocess

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", _DDP, str(rank), port, server.url]) for rank in range(2)
    ]
    assert [process.wait(60) for process in ranks] == [0, 0]
    assert {registration.id for registration in server.registrations} == {server.registrations[0].id}
    assert server.names == ["weight"]
    # The mean of (3, 4) and (5, 4) is (4, 4).
    assert server.values("grad_norm") == pytest.approx({"weight": math.sqrt(32)})
    assert [sample.step for sample in server.samples] == [1, 2]
