"""The loss of a step in the forms of public programs: what cannot be known is missing, never another number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .conftest import Server
from .watching import watch

STEPS = 5


class Task:
    """A network with random batches."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.main: dict[Tensor, Tensor] = {}

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(torch.randn(4, 6)), torch.randint(3, (4,)))


def given_a_gradient(task: Task) -> float | None:
    """As Wasserstein GANs do."""
    task.optimizer.zero_grad()
    loss, other = task.loss(), task.loss()
    loss.backward(torch.ones_like(loss))
    torch.autograd.backward([other], [torch.tensor(-0.5)])
    return float(loss.item() - 0.5 * other.item())


def one_task_after_the_other(task: Task) -> float | None:
    """Gradient surgery: each task's gradient is taken away, and all are put together by hand."""
    outputs = task.model(torch.randn(4, 6))
    losses = [nn.functional.cross_entropy(outputs, torch.randint(3, (4,))), outputs.square().mean()]
    parts = []
    for loss in losses:
        task.optimizer.zero_grad()
        loss.backward(retain_graph=True)
        parts.append([parameter.grad.clone() for parameter in task.parameters if parameter.grad is not None])
    for parameter, *several in zip(task.parameters, *parts, strict=True):
        parameter.grad = torch.stack(several).sum(0)
    return float(sum(loss.item() for loss in losses))


def moved_elsewhere(task: Task) -> float | None:
    """A hook adds each gradient to a buffer and drops it, over two micro-batches."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        task.main[parameter] += parameter.grad
        parameter.grad = None

    if not task.main:
        task.main = {parameter: torch.zeros_like(parameter) for parameter in task.parameters}
        for parameter in task.main:
            parameter.register_post_accumulate_grad_hook(move)
    for parameter, buffer in task.main.items():
        buffer.zero_()
        parameter.grad = None
    losses = [task.loss(), task.loss()]
    for loss in losses:
        loss.backward()
    for parameter, buffer in task.main.items():
        parameter.grad = buffer
    return sum(loss.item() for loss in losses)


def probe_beside_what_is_put_aside(task: Task) -> float | None:
    loss = task.loss()
    task.optimizer.zero_grad()
    loss.backward()
    kept = [parameter.grad for parameter in task.parameters]
    task.optimizer.zero_grad()
    task.loss().backward()
    for parameter, grad in zip(task.parameters, kept, strict=True):
        parameter.grad = grad
    return loss.item()


def probe_set_to_zero_by_hand(task: Task) -> float | None:
    task.optimizer.zero_grad()
    task.loss().backward()
    for parameter in task.parameters:
        assert parameter.grad is not None
        parameter.grad.zero_()
    loss = task.loss()
    loss.backward()
    return loss.item()


def rescaled_between_two_passes(task: Task) -> float | None:
    task.optimizer.zero_grad()
    losses = [task.loss(), task.loss()]
    for loss in losses:
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters, 0.1)
    return sum(loss.item() for loss in losses)


def probe_that_is_cleared(task: Task) -> float | None:
    task.loss().backward()
    task.optimizer.zero_grad()
    loss = task.loss()
    loss.backward()
    return loss.item()


def gradients_of_nobody(task: Task) -> float | None:
    """A probe is cleared, and what is stepped with is put in place by hand: it may be of both."""
    probe_that_is_cleared(task)
    for parameter in task.parameters:
        assert parameter.grad is not None
        parameter.grad = parameter.grad * 0.5
    return None


@pytest.mark.parametrize(
    "form",
    [
        given_a_gradient,
        one_task_after_the_other,
        moved_elsewhere,
        probe_beside_what_is_put_aside,
        probe_set_to_zero_by_hand,
        rescaled_between_two_passes,
        probe_that_is_cleared,
        gradients_of_nobody,
    ],
)
def test_the_loss_is_that_of_the_gradients(server: Server, form: Callable[[Task], float | None]) -> None:
    task, wanted = Task(), {}
    with watch(task.model, server, task.optimizer):
        for step in range(1, STEPS + 1):
            loss = form(task)
            if loss is not None:
                wanted[step] = loss
            task.optimizer.step()
    assert server.trail("loss") == pytest.approx(wanted, rel=1e-5)
    assert [sample.step for sample in server.samples] == list(range(1, STEPS + 1))
