"""Real data that needs no download: scikit-learn's bundled sets and the text of Python's own standard library."""

import argparse
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor

Batches = Iterator[tuple[Tensor, Tensor]]


def endless(inputs: Tensor, targets: Tensor, batch: int, seed: int) -> Batches:
    """Yield shuffled batches for ever; the last, smaller one of an epoch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(inputs), generator=generator).split(batch):
            if len(chosen) == batch:
                yield inputs[chosen], targets[chosen]


@functools.cache
def _bundle(name: str) -> tuple[Any, Any]:
    load: Callable[[], Any] = getattr(datasets, f"load_{name}")
    bundle = load()
    return bundle.data, bundle.target


def table(name: str) -> tuple[Tensor, Tensor]:
    """Return one of scikit-learn's bundled sets, raw: float32 inputs and targets as they are."""
    data, target = _bundle(name)
    return torch.tensor(data, dtype=torch.float32), torch.tensor(target)


def standardised(inputs: Tensor) -> Tensor:
    """Return inputs with mean 0 and deviation 1 in each column; constant columns are 0."""
    return (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-6)


def all_digits() -> tuple[Tensor, Tensor]:
    """Return images, shape (1797, 64) float32 in 0 to 1, and labels, shape (1797,) int64."""
    images, labels = table("digits")
    return images / 16.0, labels.long()


def digits(seed: int, batch: int = 64) -> Batches:
    """Yield batches of handwritten digits for ever."""
    return endless(*all_digits(), batch, seed)


@functools.cache
def text_bytes(count: int = 60_000) -> Tensor:
    """Return the bytes of a module's source, shape (count,) int64."""
    return torch.tensor(list(inspect.getsource(argparse).encode()[:count]), dtype=torch.int64)


def text(seed: int, batch: int = 16, length: int = 32) -> Batches:
    """Yield pieces of source text and the same moved by one byte, shape (batch, length) int64 each, for ever."""
    content = text_bytes()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(content) - length - 1, (batch, 1), generator=generator)
        chosen = starts + torch.arange(length + 1)
        pieces = content[chosen]
        yield pieces[:, :-1], pieces[:, 1:]
