"""A device that lags behind the host: a copy of one number from it waits for all that is queued there.

The machine has no such device: copies to the CPU that other threads than the training ask for are made to take as long.
"""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import gradwatch

from .conftest import Server

LAG_SECONDS = 0.1
Wait = Callable[[Tensor], object]
"""Called before a tensor is copied."""


@pytest.fixture
def caught_up() -> Iterator[threading.Event]:
    """Set once the device has nothing queued any more; it is at the end, so that no thread waits on."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wait], None]:
    """Have each copy to the CPU wait as a function says, outside of the thread that trains."""
    copy, host = Tensor.cpu, threading.current_thread()

    def set_wait(wait: Wait) -> None:
        def cpu(tensor: Tensor) -> Tensor:
            if threading.current_thread() is not host:
                wait(tensor)
            return copy(tensor)

        monkeypatch.setattr(Tensor, "cpu", cpu)

    return set_wait


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 4)).square().mean().backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_every_loss_arrives_from_a_device_that_lags(
    server: Server, slow_copies: Callable[[Wait], None], caught_up: threading.Event
) -> None:
    slow_copies(lambda _: caught_up.wait(LAG_SECONDS))
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = gradwatch.attach(model, optimizer, url=server.url, every=10)
    for _ in range(100):
        step(model, optimizer)
        time.sleep(0.01)
    agent.close(timeout_seconds=4.0)
    told, ends = server.trail("loss"), [batch.end for batch in server.batches if batch.end is not None]
    assert sorted(told) == list(range(1, 101))
    assert [sample.step for sample in server.samples] == list(range(1, 101, 10))
    assert [end.status for end in ends] == ["completed"]


def test_steps_are_written_although_a_later_one_has_not_arrived(
    server: Server, slow_copies: Callable[[Wait], None], caught_up: threading.Event
) -> None:
    trained = threading.Event()

    def wait(number: Tensor) -> None:
        trained.wait(10.0)  # all steps wait by then
        if number.numel() == 1 and number.item() == 6.0:
            caught_up.wait()

    slow_copies(wait)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = gradwatch.attach(model, optimizer, url=server.url, every=10)
    for number in range(1, 11):
        agent.log(number=torch.tensor(float(number)))
        step(model, optimizer)
    trained.set()
    try:
        server.wait(lambda: set(server.trail("loss")) >= {1, 2, 3, 4, 5}, timeout_seconds=5.0)
    finally:
        caught_up.set()
        agent.close()
    assert sorted(server.trail("number")) == list(range(1, 11))
