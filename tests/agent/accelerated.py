"""The agent on a simulated accelerator, run by test_accelerator.py in a process whose accelerator it is."""

import ast
import gc
import math
import random
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import wire
from tests.accelerator.device import Accelerator, accelerator_of_process

from .conftest import Server

LAG_SECONDS = 0.2


@pytest.fixture
def device() -> Iterator[Accelerator]:
    accelerator = accelerator_of_process()
    accelerator.reset()
    yield accelerator
    accelerator.reset()


class Training:
    """A small training, and what it computed: the losses and clip norms of its steps, as tensors on its device."""

    def __init__(self, on: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(on)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.input = torch.randn(16, 4).to(on)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.gradients: list[Tensor] = []
        """Norm of the first weight's gradient as the optimizer got it."""

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(self.input).square().mean()
        loss.backward()
        self.losses.append(loss.detach().clone())
        self.norms.append(clip_grad_norm_(self.model.parameters(), 0.05).clone())
        gradient = next(self.model.parameters()).grad
        assert gradient is not None
        self.gradients.append(gradient.norm())
        self.optimizer.step()


def floats(tensors: list[Tensor]) -> list[float]:
    return [float(tensor.cpu()) for tensor in tensors]


def by_step(numbers: list[float]) -> dict[int, object]:
    return {step: pytest.approx(number, rel=1e-5) for step, number in enumerate(numbers, 1)}


def check(server: Server, training: Training, sampled: Sequence[int]) -> None:
    """Compare everything that a server got with what the training computed."""
    assert server.trail("loss") == by_step(floats(training.losses))
    assert server.trail("clip_norm") == by_step(floats(training.norms))
    assert [sample.step for sample in server.samples] == list(sampled)
    gradients = floats(training.gradients)
    told = {step: next(iter(server.values("clipped_grad_norm", step).values())) for step in sampled}
    assert told == {step: pytest.approx(gradients[step - 1], rel=1e-5) for step in sampled}
    assert [batch.end.status for batch in server.batches if batch.end is not None] == ["completed"]


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("behaviour", ["lag", "full queue"])
def test_every_number_arrives_and_nobody_waits(server: Server, device: Accelerator, behaviour: str, every: int) -> None:
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=every)
    training.step()
    torch.accelerator.synchronize(0)
    device.forget()
    if behaviour == "lag":
        device.change(latency_seconds=LAG_SECONDS)
    else:
        device.change(cost_seconds=1e-4, capacity=100)
    for _ in range(29):
        training.step()
    agent.close()
    assert device.waits() == []
    device.reset()
    check(server, training, range(1, 31, every))


@pytest.mark.parametrize("every", [1, None], ids=["every step", "default"])
@pytest.mark.parametrize("behaviour", ["lag", "full queue"])
def test_what_the_device_has_made_is_written_although_nothing_more_is_heard(
    server: Server, device: Accelerator, behaviour: str, every: int | None
) -> None:
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=every, overhead_budget=1e-9)
    if behaviour == "lag":
        device.change(latency_seconds=LAG_SECONDS)
    else:
        device.change(cost_seconds=1e-4, capacity=100)
    for _ in range(25):
        training.step()
    sampled = range(1, 26 if every else 21)  # then the budget is spent
    server.wait(lambda: [sample.step for sample in server.samples] == list(sampled))
    server.wait(lambda: len(server.trail("loss")) == len(server.trail("clip_norm")) == 25)
    agent.close()
    device.reset()
    check(server, training, sampled)


def test_samples_without_room_are_counted_and_their_numbers_told(
    server: Server, device: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwatch.norms.buffers._POOL_BYTES", 4 << 14)  # room for 4 samples
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=1)
    device.change(held=True)
    for _ in range(10):
        training.step()
    device.change(held=False)
    torch.accelerator.synchronize(0)
    server.wait(lambda: len(server.samples) == 4)
    training.step()
    agent.close()
    check(server, training, [1, 2, 3, 4, 11])
    assert server.batches[-1].dropped == wire.Dropped(samples=6)


def test_what_has_arrived_is_written_while_the_device_stands_still(server: Server, device: Accelerator) -> None:
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=10)
    for _ in range(5):
        training.step()
    torch.accelerator.synchronize(0)
    device.change(held=True)
    for _ in range(5):
        training.step()
    server.wait(lambda: len(server.trail("loss")) == 5)
    device.change(held=False)
    agent.close()
    check(server, training, range(1, 11, 10))


def test_a_model_on_a_device_that_is_not_the_current_one(server: Server, device: Accelerator) -> None:
    training = Training("sim:1")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=1)
    device.change(1, latency_seconds=0.05)
    for _ in range(20):
        training.step()
    agent.close()
    assert torch.accelerator.current_device_index() == 0
    device.reset()
    check(server, training, range(1, 21))


def test_a_training_on_a_side_stream(server: Server, device: Accelerator) -> None:
    side = torch.Stream("sim:0")
    with side:
        training = Training("sim:0")
    device.change(latency_seconds=0.05)
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=5)
    device.forget()
    for step in range(20):
        with side:
            training.step()
        if step % 3 == 0:  # the default stream is far ahead: what is read there is not written yet
            agent.log(one=torch.ones((), device="sim:0"))
    waits = device.waits_of_agent()
    agent.close()
    assert waits == []
    device.reset()
    check(server, training, range(1, 21, 5))


def test_numbers_of_several_streams(server: Server, device: Accelerator) -> None:
    side = torch.Stream("sim:0")
    with side:
        training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=2)
    for step in range(1, 7):
        device.sleep(0.02)  # the side stream, where the step ends, is ahead
        agent.log(number=torch.full((), float(step), device="sim:0"))
        with side:
            training.step()
    agent.close()
    device.reset()
    check(server, training, range(1, 7, 2))
    assert server.trail("number") == {step: step for step in range(1, 7)}


@pytest.mark.parametrize("clip", [None, 0.05], ids=["measured", "clipped"])
def test_two_trainings_of_one_agent_on_streams_that_nothing_orders(
    server: Server, device: Accelerator, clip: float | None
) -> None:
    torch.manual_seed(0)
    shapes = [nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8))) for _ in range(2)]
    streams = [torch.Stream("sim:0") for _ in range(2)]
    inputs = [torch.randn(4, 16), 3 * torch.randn(4, 16)]
    expected: dict[str, float] = {}
    for place, (model, given) in enumerate(zip(shapes, inputs, strict=True)):
        model(given).square().sum().backward()
        expected |= {f"{place}.{name}": float(grad_of(p).norm()) for name, p in model.named_parameters()}
        model.zero_grad()
    pair = nn.ModuleList(shapes).to("sim:0")
    moved = [given.to("sim:0") for given in inputs]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in shapes]
    agent = gradwatch.attach(pair, optimizers, url=server.url, every=1, clip=clip)
    device.change(alternates=True)
    for step in range(1, 6):
        device.change(held=True)
        for model, given, stream, optimizer in zip(shapes, moved, streams, optimizers, strict=True):
            with stream:
                optimizer.zero_grad()
                model(given).square().sum().backward()
                optimizer.step()
        device.change(held=False)  # both streams go on, operator by operator
        server.wait(lambda: len(server.samples) == step)  # noqa: B023  # the next step uses the same buffers
    agent.close()
    for sample in server.samples:
        assert server.values("grad_norm", sample.step) == pytest.approx(expected, rel=1e-4)
    assert len(server.samples) == 5


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_a_device_that_fails_ends_the_run_with_the_steps_before(server: Server, device: Accelerator) -> None:
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=2)
    for _ in range(6):
        training.step()
    torch.accelerator.synchronize(0)
    expected = by_step(floats(training.losses))
    device.change(latency_seconds=0.05)
    training.step()
    device.change(failed=True)
    with pytest.raises(RuntimeError, match="device-side assertion"):
        training.step()
    agent.close(status="failed")
    assert server.trail("loss") == expected
    assert [sample.step for sample in server.samples] == [1, 3, 5]
    assert [batch.end.status for batch in server.batches if batch.end is not None] == ["failed"]
    assert server.batches[-1].dropped.values >= 1


SIGNS = {
    "loss x 1,000": (1000.0, 1.0),
    "loss NaN": (math.nan, 1.0),
    "gradient x 1,000": (1.0, 1000.0),
    "gradient zero": (1.0, 0.0),
    "gradient infinite": (1.0, math.inf),
}


def sampled_with_sign(
    server: Server, device: Accelerator, *, bad_step: int, loss_factor: float, gradient_factor: float, lag_steps: int
) -> list[int]:
    """Multiply one step's loss or gradient; return the steps that were sampled after the first.

    The device stands still, but after each ``lag_steps`` steps, when all numbers arrive at once.
    """
    model = nn.Linear(4, 1, bias=False).to("sim:0")
    given, noise = torch.ones(1, 4).to("sim:0"), random.Random(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=1_000_000):
        for step in range(1, bad_step + 2 * lag_steps + 1):
            device.change(held=True)
            factors = (loss_factor, gradient_factor) if step == bad_step else (1.0, 1.0)
            optimizer.zero_grad()
            loss = model(given).square().sum() * (1.0 + 0.1 * noise.random()) * factors[1]
            loss = loss + ((factors[0] - 1) * loss).detach()
            loss.backward()
            clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            if step % lag_steps == 0:
                device.change(held=False)
                torch.accelerator.synchronize(0)
    assert server.samples[0].step == 1
    return [sample.step for sample in server.samples[1:]]


@pytest.mark.parametrize("lag_steps", [1, 5])
@pytest.mark.parametrize(("loss_factor", "gradient_factor"), SIGNS.values(), ids=SIGNS)
def test_a_sign_brings_a_sample_of_the_step_after_it_has_arrived(
    server: Server, device: Accelerator, loss_factor: float, gradient_factor: float, lag_steps: int
) -> None:
    factors = {"loss_factor": loss_factor, "gradient_factor": gradient_factor}
    assert sampled_with_sign(server, device, bad_step=30, lag_steps=lag_steps, **factors) == [31]


def test_a_sign_brings_a_burst_in_the_default_setting(server: Server, device: Accelerator) -> None:
    model = nn.Linear(4, 1).to("sim:0")
    given, noise = torch.ones(1, 4).to("sim:0"), random.Random(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, overhead_budget=1e-9):
        for step in range(1, 61):
            optimizer.zero_grad()
            (model(given).square().sum() * (1000.0 if step == 30 else 1.0 + 0.1 * noise.random())).backward()
            optimizer.step()
            torch.accelerator.synchronize(0)
    assert [sample.step for sample in server.samples] == [*range(1, 21), *range(31, 52)]
    assert sorted(server.trail("loss")) == list(range(1, 61))


def test_a_sign_is_written_although_no_further_step_is_made(server: Server, device: Accelerator) -> None:
    """Nothing more is heard of the training, so the collector has to look for itself."""
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=100)
    for _ in range(5):
        training.step()
    device.change(held=True)
    training.input = training.input * math.nan
    training.step()
    device.change(held=False)
    server.wait(lambda: [event.step for event in server.events if event.kind == "nonfinite_step"] == [6])
    agent.close()


def test_only_the_training_thread_calls_a_device_and_only_its_own(server: Server, device: Accelerator) -> None:
    training = Training("sim:1")
    device.forget()
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=1)
    for _ in range(5):
        training.step()
    server.wait(lambda: len(server.samples) == 5)
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("gradwatch-")]
    assert mine
    assert [device.touched(thread.ident or 0) for thread in mine] == [set()] * len(mine)
    assert device.touched(threading.get_ident()) == {1}
    agent.close()


def test_a_step_that_is_not_sampled_launches_few_operators(server: Server, device: Accelerator) -> None:
    def launches(training: Training) -> int:
        before = device.launches()
        training.step()
        return device.launches() - before

    alone = Training("sim:0")
    launches(alone)
    watched = Training("sim:0")
    agent = gradwatch.attach(watched.model, watched.optimizer, url=server.url, every=100)
    launches(watched), launches(watched)  # the first is sampled
    assert launches(watched) - launches(alone) <= 8
    agent.close()


def test_the_capture_of_a_graph_is_not_broken_and_eager_steps_stay_right(server: Server, device: Accelerator) -> None:
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=1)
    for _ in range(3):
        training.step()
    device.change(held=True)
    training.step()  # is waited for while the graph is captured
    side, losses = torch.Stream("sim:0"), training.losses[:]
    with side, device.capture() as graph:
        training.optimizer.zero_grad()
        training.model(training.input).square().mean().backward()
        training.optimizer.step()
        time.sleep(0.3)  # several polls of the collector
    device.change(held=False)
    torch.accelerator.synchronize(0)
    for _ in range(8):
        graph.replay()
    training.losses = losses
    for _ in range(3):
        training.step()
    agent.close()
    assert agent.step == 7
    assert [event.kind for event in server.events] == ["not_measured"]
    assert "captured graph" in server.events[0].message
    check(server, training, range(1, 8))


@pytest.mark.parametrize("warm", [True, False])
def test_agc_in_a_captured_step_clips_at_every_replay(server: Server, device: Accelerator, warm: bool) -> None:
    weight = nn.Linear(4, 4, bias=False)
    scale = torch.ones(())
    model = weight.to("sim:0")
    scale = scale.to("sim:0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1, clip=gradwatch.AGC(0.01, exclude=[]))
    given = torch.randn(8, 4).to("sim:0")
    side = torch.Stream("sim:0")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (model(given).square().sum() * scale).backward()
        optimizer.step()

    model.weight.grad = torch.zeros(4, 4).to("sim:0")
    if warm:
        step()
    torch.accelerator.synchronize(0)
    with side, device.capture() as graph:
        step()
    for factor in (1.0, 10.0, 1e-6):
        scale.fill_(factor)
        graph.replay()
        torch.accelerator.synchronize(0)
        clipped, weights = grad_of(model.weight).cpu(), model.weight.detach().cpu()
        ratios = clipped.norm(dim=1) / weights.norm(dim=1)
        if factor > 0.5:
            torch.testing.assert_close(ratios, torch.full((4,), 0.01), rtol=1e-4, atol=0)
        else:
            assert bool((ratios < 0.01).all())
    agent.close()


SHAPES = [(3, 4), (5,), (2, 3, 2, 2), (3, 5000), (2, 8000), (1,)]


class Many(nn.Module):
    """Parameters of several shapes, whose gradients are given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.parts = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES)


@pytest.mark.parametrize("granularity", ["unit", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_that_overflow_are_clipped_and_told_as_on_the_cpu(
    server: Server, device: Accelerator, dtype: torch.dtype, granularity: Literal["unit", "tensor"]
) -> None:
    results = []
    for on in ("cpu", "sim:0"):
        model = Many(dtype).to(on)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        agc = gradwatch.AGC(0.01, exclude=[], granularity=granularity)
        agent = gradwatch.attach(model, optimizer, url=server.url, every=1, clip=agc)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e20)
        list(model.parameters())[1].grad = torch.full((5,), math.inf, dtype=dtype).to(on)
        optimizer.step()
        results.append([grad_of(parameter).float().cpu() for parameter in model.parameters()])
        agent.close()
    on_cpu, on_device = results
    for expected, found in zip(on_cpu, on_device, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    assert float(on_device[0].abs().max()) < 1.0
    for statistic in ("grad_norm", "nonfinite_count", "max_unit_ratio"):
        vectors = [sample.statistics[statistic] for sample in server.samples]
        finite = [place for place in range(len(SHAPES)) if place != 1 or statistic == "grad_norm"]
        np.testing.assert_allclose(vectors[1][finite], vectors[0][finite], rtol=1e-5)


@pytest.mark.parametrize("granularity", ["unit", "tensor"])
def test_a_device_without_float64(server: Server, device: Accelerator, granularity: Literal["unit", "tensor"]) -> None:
    training = Training("sim:0")
    device.forbid_float64()
    agc = gradwatch.AGC(0.01, granularity=granularity)
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=1, clip=agc)
    for _ in range(3):
        training.step()
    agent.close()
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.batches[-1].dropped.errors == 0


@pytest.mark.parametrize("granularity", ["unit", "tensor"])
def test_clipping_never_makes_the_training_wait(
    server: Server, device: Accelerator, granularity: Literal["unit", "tensor"]
) -> None:
    training = Training("sim:0")
    agc = gradwatch.AGC(0.01, granularity=granularity)
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=2, clip=agc)
    device.forget()
    device.change(latency_seconds=0.01)
    for step in range(6):
        training.optimizer.param_groups[0]["clip"] = 0.01 * (step + 1)
        training.step()
    gradwatch.adaptive_clip_grad_(training.model, 0.01)
    assert device.waits() == []
    agent.close()


@pytest.mark.parametrize("every", [1, 100])
def test_a_number_that_is_not_finite_names_parameters_but_never_a_wrong_module(
    server: Server, device: Accelerator, every: int
) -> None:
    training = Training("sim:0")
    device.change(latency_seconds=0.05)
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=every)
    for step in range(12):
        if step == 4:
            training.input = training.input * math.nan
        training.step()
    agent.close()
    events = [event for event in server.events if event.kind.startswith("nonfinite")]
    assert [(event.step, event.kind, event.parameter) for event in events] == [(5, "nonfinite_step", None)]
    assert ("0.weight" if every == 1 else "not sampled") in events[0].message
    assert "on an accelerator" in events[0].message


def test_no_float64_is_made_off_the_cpu() -> None:
    found = float64_off_cpu(Path(gradwatch.__file__).parent)
    assert found == []


def test_float64_off_the_cpu_is_found(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("a = torch.zeros(2, dtype=torch.float64, device=x.device)\nb = t.double()\n")
    assert float64_off_cpu(tmp_path) == ["bad.py:1", "bad.py:2"]


_ALLOWED = {"norms/reference.py", "recording/float64.py", "ranks/sharding.py"}
"""Modules whose tensors are all on the CPU, or on the devices of a process group, which have float64."""


def float64_off_cpu(folder: Path) -> list[str]:
    """Return the lines that make a float64 tensor where neither they nor the line before say that it is on the CPU."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        text = path.read_text()
        lines = text.splitlines()
        calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
        for call in calls if name not in _ALLOWED else ():
            arguments = (*call.args, *(keyword.value for keyword in call.keywords))
            wide = "torch.float64" in map(ast.unparse, arguments)
            wide |= isinstance(call.func, ast.Attribute) and call.func.attr == "double"
            if wide and "cpu" not in "".join(lines[max(call.lineno - 2, 0) : call.lineno]).lower():
                found.append(f"{name}:{call.lineno}")
    return sorted(set(found))


class Network(nn.Module):
    """A convolution, a normalisation, attention over two tokens and a head; ``parts`` may lie on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.keys, self.queries, self.values = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.image(x).view(x.shape[0], -1, 16).to(self.keys.weight.device)
        scores = (self.queries(tokens) @ self.keys(tokens).transpose(1, 2)).softmax(2)
        result: Tensor = self.head((scores @ self.values(tokens)).mean(1))
        return result


def trained(
    server: Server | None, *, two_devices: bool = False, clip: float | None = None, every: int | None = 1
) -> Network:
    torch.manual_seed(0)
    model = Network()
    images, classes = torch.randn(12, 4, 3, 6, 6), torch.randint(0, 4, (12, 4))
    model = model.to("sim:0")
    last = "sim:1" if two_devices else "sim:0"
    for part in (model.keys, model.queries, model.values, model.head):
        part.to(last)
    images, classes = images.to("sim:0"), classes.to(last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    agent = None
    if server is not None:
        agent = gradwatch.attach(model, optimizer, url=server.url, every=every)
    for image, label in zip(images, classes, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if agent is not None:
        agent.close()
    return model


@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("every", [1, None], ids=["every step", "default"])
def test_a_watched_training_ends_with_the_same_weights(
    server: Server, device: Accelerator, every: int | None, two_devices: bool
) -> None:
    alone = trained(None, two_devices=two_devices)
    for index in range(2):
        device.change(index, latency_seconds=LAG_SECONDS)
    device.forget()
    watched = trained(server, two_devices=two_devices, every=every)
    assert device.waits_of_agent() == []
    device.reset()
    for expected, found in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected.cpu(), found.cpu())
    assert [sample.step for sample in server.samples] == list(range(1, 13))
    assert sorted(server.trail("loss")) == list(range(1, 13))
    assert all(math.isfinite(loss) for loss in server.trail("loss").values())
    assert server.batches[-1].dropped == wire.Dropped()


def test_nothing_is_kept_of_a_model_that_is_gone(server: Server, device: Accelerator) -> None:
    training = Training("sim:0")
    agent = gradwatch.attach(training.model, training.optimizer, url=server.url, every=1, clip=0.1)
    training.step()
    gone = [weakref.ref(parameter) for parameter in training.model.parameters()]
    server.wait(lambda: len(server.samples) == 1)
    del training
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    agent.close()
