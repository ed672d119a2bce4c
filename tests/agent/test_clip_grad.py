"""What ``clip_grad_norm_`` and ``clip_grad_value_`` leave to be reported: before, after, and where a NaN came from."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch
from gradwatch.recording import optimizer_parameters
from gradwatch.recording.optimizer_parameters import ListedParameters, OptimizerParameters

from .conftest import Server
from .watching import GRAD_A, Two, watch


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


def test_lists_that_are_clipped_in_turn_are_each_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_parameters, "_LISTS", 50)
    first, second = [torch.zeros(1)], [torch.zeros(2), torch.zeros(3)]
    lists = ListedParameters(lambda parameters: OptimizerParameters([parameters], lambda _parameter: None))
    known = [lists.find(first), lists.find(second)]
    assert [lists.find(first), lists.find(list(second))] == known
    assert lists.find(second[:1]) not in known
    others = [[torch.zeros(1)] for _ in range(100)]
    for other in others:
        lists.find(other)
    assert lists.find(first) not in known  # they are not kept for ever


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


def _clip_all_after_the_first_step(model: Two, first: torch.optim.SGD) -> None:
    first.step()
    clip_grad_norm_(model.parameters(), 1.3)


def _clip_all_then_a_new_gradient(model: Two, first: torch.optim.SGD) -> None:
    clip_grad_norm_(model.parameters(), 1.3)
    first.step()
    model.b.grad = None
    (model.b * 12.0).sum().backward()


def _clip_all_then_the_second_by_value(model: Two, first: torch.optim.SGD) -> None:
    clip_grad_norm_(model.parameters(), 1.3)
    first.step()
    clip_grad_value_([model.b], 0.1)


def _clip_all_by_value_then_the_second_again(model: Two, first: torch.optim.SGD) -> None:
    clip_grad_value_(model.parameters(), 1.0)
    first.step()
    clip_grad_value_([model.b], 0.5)


@pytest.mark.parametrize(
    ("clip", "after", "limit"),
    [
        (_clip_all_after_the_first_step, {"a": 5.0, "b": 1.2}, None),
        (_clip_all_then_a_new_gradient, {"a": 0.5, "b": 12.0}, None),
        (_clip_all_then_the_second_by_value, {"a": 0.5, "b": 0.1}, 1.3),
        (_clip_all_by_value_then_the_second_again, {"a": math.sqrt(2), "b": 0.5}, None),
    ],
)
def test_of_two_optimizers_each_is_told_what_clipped_its_own(
    server: Server, clip: Callable[[Two, torch.optim.SGD], None], after: dict[str, float], limit: float | None
) -> None:
    model = Two()
    first, second = torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0)
    with watch(model, server, [first, second]):
        model(GRAD_A, 12.0).backward()
        clip(model, first)
        second.step()
    assert server.values("grad_norm") == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.values("clipped_grad_norm") == pytest.approx(after, rel=1e-4)
    assert server.samples[-1].scalars.get("global_grad_norm_limit") == limit


def test_clipping_by_value_twice_reports_before_the_first(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        clip_grad_value_(model.parameters(), 3.0)
        clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
    assert server.values("grad_norm") == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.values("clipped_grad_norm") == pytest.approx({"a": math.sqrt(2), "b": 1.0})


def test_clipping_to_nothing_reports_what_there_was(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 0.0)
        optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert server.values("clipped_grad_norm") == {"a": 0.0, "b": 0.0}


def test_a_small_gradient_of_float16_is_told_as_it_was_before_it_was_rounded_to_nothing(server: Server) -> None:
    model = Two().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model.a.grad, model.b.grad = (1e-4 * torch.tensor(GRAD_A)).half(), torch.tensor([60_000.0]).half()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert server.values("grad_norm") == pytest.approx({"a": 5e-4, "b": 60_000.0}, rel=1e-3)
    assert server.values("clipped_grad_norm")["a"] == 0.0


@pytest.mark.parametrize("to_none", [True, False])
def test_the_loss_of_a_step_that_was_left_out_goes_with_its_gradients(server: Server, to_none: bool) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for b in (12.0, math.nan, 6.0):
            model(GRAD_A, b).backward()
            if math.isfinite(b):
                optimizer.step()
            model.zero_grad(set_to_none=to_none)
    assert server.trail("loss") == {1: 59.0, 2: 35.0}
