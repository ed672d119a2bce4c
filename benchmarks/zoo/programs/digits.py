"""The small classifier of digits, and its training by a schedule, that several programs share."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.training import plain


def classifier(seed: int, *widths: int) -> nn.Sequential:
    """Return a seeded perceptron, by default of three layers."""
    torch.manual_seed(seed)
    return perceptron(*(widths or (64, 64, 64, 10)))


def scheduled(seed: int, rate_of: Callable[[int], float], rate: float = 3e-3) -> Training:
    """Return its training by Adam at ``rate`` times what ``rate_of`` returns for the number of the step."""
    model = classifier(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    return plain(model, optimizer, data.digits(seed), scheduler=LambdaLR(optimizer, rate_of))
