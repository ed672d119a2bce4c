"""One training on the digits as in the paper: warm-up, cosine decay, Nesterov momentum; stopped once it diverged."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data

TEST_IMAGES = 360
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
DIVERGED_LOSS = 10 * math.log(10)
"""Ten times what guessing costs."""


@dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    accuracy: float
    """Share of the test images that it names rightly; 0 where it diverged."""
    steps: int
    """How many it took."""
    losses: tuple[float, ...]

    @property
    def diverged(self) -> bool:
        """Return whether it was stopped."""
        return not (math.isfinite(self.losses[-1]) and self.losses[-1] < DIVERGED_LOSS)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return standardised images and labels for training, then for testing."""
    images, labels = data.all_digits()
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return images[train], labels[train], images[test], labels[test]


def batches(images: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return data.endless(images, labels, batch, seed)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    batch: int,
    steps: int,
    seed: int,
    clip: Callable[[], object] = lambda: None,
) -> Outcome:
    """Train ``model`` with an optimizer whose learning rate is the highest one.

    Args:
        model: fresh.
        optimizer: of its parameters.
        batch: images a step.
        steps: how many.
        seed: of the split and the order.
        clip: called before each step.
    """
    images, labels, test_images, test_labels = digits(seed)
    warm = max(1, round(WARM_UP * steps))
    highest = optimizer.param_groups[0]["lr"]
    losses: list[float] = []
    for step, (inputs, targets) in enumerate(data.endless(images, labels, batch, seed)):
        rate = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = highest * rate
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        losses.append(float(loss.detach()))
        if not losses[-1] < DIVERGED_LOSS:
            return Outcome(0.0, step, tuple(losses))
        if step == steps:
            break
        loss.backward()
        clip()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).float().mean()
    return Outcome(float(right), steps, tuple(losses))
