"""Which step a backward pass, its loss and its gradients belong to, each against a truth computed by hand."""

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import wire

from .conftest import OwnErrors, Server
from .watching import GRAD_A, Two, monitor_of, watch


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


class Counting(TorchFunctionMode):
    """As ``torch.set_default_device``: torch hands its functions to it, which calls them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("modes", [1, 2])
def test_a_loss_counts_once_within_modes_of_torch(server: Server, modes: int) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer) as agent, ExitStack() as stack:
        for _ in range(modes):
            stack.enter_context(Counting())
        torch.autograd.backward([model(GRAD_A, 1.0), model(GRAD_A, 2.0)])
        optimizer.step()
        model(GRAD_A, 1.0).backward()
        optimizer.step()
        assert agent.step == 2
    with torch.no_grad():
        one, two = float(model(GRAD_A, 1.0)), float(model(GRAD_A, 2.0))
    assert server.trail("loss") == pytest.approx({1: one + two, 2: one})


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
        assert monitor_of(agent).recorder.pool._made - len(monitor_of(agent).recorder.pool._free) <= 3
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


class Deaf(torch.optim.SGD):
    """Takes a closure, as Lightning and others pass one, and does not call it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


@pytest.mark.parametrize("clip", [None, 1e9])
def test_a_closure_that_is_not_called_leaves_the_loss(
    server: Server, clip: float | None, own_errors: OwnErrors
) -> None:
    model = Two()
    optimizer = Deaf(model.parameters(), lr=0.0)
    with watch(model, server, optimizer, clip=None if clip is None else gradwatch.AGC(clip, exclude=[])):
        for value in (12.0, 13.0):
            optimizer.zero_grad()
            model(GRAD_A, value).backward()
            optimizer.step(lambda: None)
        optimizer.step()
    assert server.trail("loss") == {1: 59.0, 2: 63.0}
    assert [sample.step for sample in server.samples] == [3]
    (event,) = server.events
    assert (event.step, event.kind, own_errors.warnings) == (1, "not_measured", 1)
    assert ("not clipped" in event.message) == (clip is not None)


def test_a_closure_that_fails_was_called(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def closure() -> float:
        raise ValueError("no batch")

    with watch(model, server, optimizer):
        with pytest.raises(ValueError, match="no batch"):
            optimizer.step(closure)
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert not server.events


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
        assert len(monitor_of(agent).steps.state.losses) <= 1024
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


@pytest.mark.parametrize(("split", "given"), [(False, False), (False, True), (True, False), (True, True)])
def test_optimizers_that_are_made_anew_for_each_step(server: Server, split: bool, given: bool) -> None:
    """As meta-learning and federated training do; what comes later often lies where an earlier one lay."""
    model = Two()

    def made() -> list[torch.optim.Optimizer]:
        groups = [[model.a], [model.b]] if split else [[model.a, model.b]]
        return [torch.optim.SGD(group, lr=0.0) for group in groups]

    optimizers = made()
    with watch(model, server, optimizers if given else None):
        for step in range(6):
            optimizers = made() if step else optimizers
            model.zero_grad()
            model(GRAD_A, step + 1.0).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert server.trail("loss") == {step: pytest.approx(11.0 + 4 * step) for step in range(1, 7)}
    assert [server.values("grad_norm", step) for step in range(1, 7)] == [
        {"a": 5.0, "b": float(step)} for step in range(1, 7)
    ]


def test_an_optimizer_made_anew_beside_one_that_stays(server: Server, own_errors: OwnErrors) -> None:
    """As where a discriminator begins anew. One that steps what the other, which is there, steps is a stranger."""
    model = Two()
    stays, anew = torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0)
    with watch(model, server, [stays, anew]):
        for step in range(4):
            anew = torch.optim.SGD([model.b], lr=0.0) if step else anew
            model.zero_grad()
            model(GRAD_A, step + 1.0).backward()
            stays.step()
            anew.step()
        assert own_errors.warnings == 0
        del anew
        torch.optim.SGD([model.a], lr=0.0).step()
        assert own_errors.warnings == 1
    assert [server.values("grad_norm", step) for step in range(1, 5)] == [
        {"a": 5.0, "b": float(step)} for step in range(1, 5)
    ]


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


def meanwhile(work: Callable[[], object]) -> None:
    """Let another thread work, and wait for it."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("stepping", ["meanwhile", "afterwards"])
def test_trainings_in_several_threads_have_each_their_own_loss(server: Server, stepping: str) -> None:
    """One makes a step, or its gradients, while another one is in the middle of its backward pass."""
    ours, other = Two(), Two()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        ours(GRAD_A, 12.0).backward()
        if stepping == "meanwhile":
            optimizer.step()

    with watch(ours, server, optimizer), watch(other, server, other_optimizer, run="other") as second:
        for _ in range(3):
            held = other(GRAD_A, 1.0)
            held.register_hook(lambda _grad: meanwhile(step))
            other_optimizer.zero_grad()
            held.backward()
            if stepping == "afterwards":
                optimizer.step()
            other_optimizer.step()
        second.close()
    losses = [tuple(batch.trail["loss"].values) for batch in server.batches if "loss" in batch.trail]
    assert sorted(value for values in losses for value in values) == [15.0] * 3 + [59.0] * 3
    assert all(len(set(values)) == 1 for values in losses)


def test_a_step_on_a_thread_of_autograd(server: Server) -> None:
    """On an accelerator hooks run on its thread, while the one that trains waits."""
    model = Two()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.0) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda ready: meanwhile(optimizers[ready].step))
    with watch(model, server):
        for factor in (1.0, 2.0, 3.0):
            model.zero_grad()
            (model(GRAD_A, 12.0) * factor).backward()
    assert server.trail("loss") == {1: 59.0, 2: 118.0, 3: 177.0}


def test_a_training_that_moves_to_another_thread_keeps_its_loss(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        optimizer.step()

    with watch(model, server, optimizer):
        for _ in range(2):
            step()
            meanwhile(step)
    assert server.trail("loss") == dict.fromkeys(range(1, 5), 59.0)


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


BESIDE = """
import sys, threading, torch
from torch import nn
import gradwatch

def train(number):
    generator = torch.Generator().manual_seed(number)
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with gradwatch.attach(model, optimizer, url=sys.argv[1], run=str(number), every=50) as agent:
        for _ in range(1500):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 100, generator=generator)).square().sum()
            loss.backward()
            agent.log(truth=loss)
            optimizer.step()
        assert not agent._session.monitor.dropped.errors
    print(number)

threads = [threading.Thread(target=train, args=(number,)) for number in (1, 2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_a_gradient_is_looked_at_by_no_thread_but_its_own(server: Server) -> None:
    """One that another thread replaces meanwhile ends the process."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", BESIDE, server.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["1", "2"]), done.stderr
    assert {registration.name for registration in server.registrations} == {"1", "2"}
    trails = [batch.trail for batch in server.batches if batch.trail]
    assert sum(len(trail["loss"].values) for trail in trails) == 3000
    assert all(trail["loss"].values == trail["truth"].values for trail in trails)
