"""The plain training step that most cases share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from benchmarks.zoo.case import Training
from benchmarks.zoo.data import Batches

Loss = Callable[[Tensor, Tensor], Tensor]
Prepare = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Changes the batch of a step."""


def plain(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    batches: Batches | Iterator[tuple[Tensor, Tensor]],
    *,
    loss_of: Loss = F.cross_entropy,
    clip: float | None = None,
    scheduler: LRScheduler | None = None,
    prepare: Prepare | None = None,
    before_step: Callable[[int], None] | None = None,
    accumulate: int = 1,
    context: Callable[[], Any] | None = None,
) -> Training:
    """Return forward, backward and step, with what the case asks for in between."""
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)

    def one_batch(step: int) -> Tensor:
        inputs, targets = next(batches)
        if prepare is not None:
            inputs, targets = prepare(step, inputs, targets)
        if context is None:
            return loss_of(model(inputs), targets)
        with context():
            return loss_of(model(inputs), targets)

    def step(number: int) -> float:
        for each in optimizers:
            each.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            loss = one_batch(number) / accumulate
            loss.backward()
            total += float(loss.detach())
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if before_step is not None:
            before_step(number)
        for each in optimizers:
            each.step()
        if scheduler is not None:
            scheduler.step()
        return total

    return Training(model, step)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def seeded(seed: int) -> torch.Generator:
    """Seed torch for the building of a model, and return a generator for what the case draws itself."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed + 1)
