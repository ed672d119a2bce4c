"""Trainings that the agent clips adaptively: by far too little, and as it should be."""

import torch

from benchmarks.zoo import data
from benchmarks.zoo.case import Case, Training
from benchmarks.zoo.networks import Convolutional, perceptron
from benchmarks.zoo.training import plain, seeded


def tight(seed: int) -> Training:
    """A threshold a hundred times below the paper's smallest: the weights hardly move."""
    seeded(seed)
    model = perceptron(64, 48, 48, 10)
    training = plain(model, torch.optim.SGD(model.parameters(), lr=0.2), data.digits(seed))
    return Training(training.model, training.step, clip=1e-4)


def roomy(seed: int) -> Training:
    """No norm anywhere; the paper's threshold keeps it in hand."""
    seeded(seed)
    model = Convolutional(norm=False)
    training = plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))
    return Training(training.model, training.step, clip=0.08)


CASES = [
    Case(name="clipped-by-agent", build=roomy, steps=250, reaches=0.6, trap="adaptively clipped, and it learns"),
    Case(name="throttled", build=tight, twin=tight, rule="throttled", steps=180, reaches=1.0),
]
