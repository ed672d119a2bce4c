"""The agent on a simulated accelerator that lags behind the host: its numbers, and what it never waits for."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
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


def by_step(numbers: list[float]) -> dict[int, float]:
    return {step: pytest.approx(number, rel=1e-5) for step, number in enumerate(numbers, 1)}


def check(server: Server, training: Training, sampled: range) -> None:
    """Compare everything that a server got with what the training computed."""
    assert server.trail("loss") == by_step(floats(training.losses))
    assert server.trail("clip_norm") == by_step(floats(training.norms))
    assert [sample.step for sample in server.samples] == list(sampled)
    gradients = floats(training.gradients)
    for step in sampled:
        (first, *_) = server.values("clipped_grad_norm", step).values()
        assert first == pytest.approx(gradients[step - 1], rel=1e-5)
    assert [batch.end.status for batch in server.batches if batch.end is not None] == ["completed"]


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("behaviour", ["lag", "full queue"])
def test_every_number_arrives_and_nobody_waits(
    server: Server, device: Accelerator, behaviour: str, every: int
) -> None:
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
    check(server, training, range(1, 31, every))


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
