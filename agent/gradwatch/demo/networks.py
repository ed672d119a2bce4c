"""The four trainings of the demonstration, on scikit-learn's digits: one healthy, three with one classic fault each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Progress = Callable[[int, float], None]
"""Called after each step with the number of steps made and the loss."""

BATCH = 64


@dataclass(frozen=True)
class Case:
    """One training, and the alert that is expected of it."""

    name: str
    expected_rule: str | None
    """The rule that must alert; None: no rule may."""
    steps: int
    build: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
    loss: Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def digits(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images, shape (64, 64) float32 in 0 to 1, and labels, shape (64,) int64, for ever."""
    bundle = load_digits()
    images = torch.tensor(bundle.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(bundle.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield images[chosen], labels[chosen]


def _classify(model: nn.Module, images: Tensor, labels: Tensor, _step: int) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def _healthy() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def _sigmoids() -> tuple[nn.Module, torch.optim.Optimizer]:
    layers: list[nn.Module] = [nn.Linear(64, 64), nn.Sigmoid()]
    for _ in range(19):
        layers += [nn.Linear(64, 64), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _too_fast() -> tuple[nn.Module, torch.optim.Optimizer]:
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.LeakyReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return model, torch.optim.Adam(model.parameters(), lr=1.0)


def _perceptron() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _standardise_midway(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """From step 120 on, divide each pixel by its deviation: this is 0 / 0 in the corners, which are always white."""
    if step >= 120:
        images = (images - images.mean(0)) / images.std(0)
    return _classify(model, images, labels, step)


CASES = (
    Case("healthy", None, 250, _healthy, _classify),
    Case("20-sigmoid-layers", "vanishing", 250, _sigmoids, _classify),
    Case("learning-rate-too-high", "exploding", 250, _too_fast, _classify),
    Case("nan-midway", "nonfinite", 250, _perceptron, _standardise_midway),
)


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Train in a plain loop: the caller attaches the agent."""
    batches = digits(seed=0)
    for step in range(case.steps):
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = case.loss(model, images, labels, step)
        loss.backward()
        optimizer.step()
        progress(step + 1, loss.item())
