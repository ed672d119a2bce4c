"""Trainings in which some parameters get no gradient while others learn."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Case, Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.training import plain, seeded


def negative_bias(seed: int, bias: float = -20.0) -> Training:
    seeded(seed)
    model = perceptron(64, 64, 64, 64, 64, 10)
    layer = model[4]
    assert isinstance(layer, nn.Linear)
    nn.init.constant_(layer.bias, bias)
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed))


def mostly_negative_bias(seed: int, bias: float = -2.0) -> Training:
    """A few units still answer to a few images; the network learns badly through them."""
    generator = seeded(seed)
    model = perceptron(64, 64, 64, 64, 10)
    layer = model[2]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.bias.fill_(bias)
        chosen = torch.randperm(64, generator=generator)[:1]
        layer.bias[chosen] = 0.0 if bias < 0 else bias
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


def dying_midway(seed: int, contrast: float = 1000.0) -> Training:
    """One batch of a thousand times the contrast throws the first layers below zero for good."""
    seeded(seed)
    model = perceptron(64, 64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images * contrast if step == 120 else images), labels

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    return plain(model, optimizer, data.digits(seed), prepare=prepare, loss_of=loss_of)


class Detached(nn.Module):
    """A body whose output is detached by accident before the head."""

    def __init__(self, *, detach: bool) -> None:
        super().__init__()
        self.body = perceptron(64, 64, 64)
        self.head = perceptron(64, 32, 10)
        self.detach = detach

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.body(images))
        out: Tensor = self.head(features.detach() if self.detach else features)
        return out


def detached(seed: int, *, detach: bool = True) -> Training:
    seeded(seed)
    model = Detached(detach=detach)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1), data.digits(seed))


class Forgotten(nn.Module):
    """A layer that is built and never called."""

    def __init__(self, *, call: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.extra = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)
        self.call = call

    def forward(self, images: Tensor) -> Tensor:
        stream = F.relu(self.first(images))
        if self.call:
            stream = stream + F.relu(self.extra(stream))
        out: Tensor = self.head(stream)
        return out


def forgotten(seed: int, *, call: bool = False) -> Training:
    seeded(seed)
    model = Forgotten(call=call)
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed))


class Gated(nn.Module):
    """A branch behind a gate."""

    def __init__(self, start: float, kind: str) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 48)
        self.branch = perceptron(48, 48, 48)
        self.gate = nn.Parameter(torch.tensor([start]))
        self.kind = kind
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = F.relu(self.stem(images))
        gate = F.relu(self.gate) if self.kind == "relu" else self.gate.sigmoid()
        out: Tensor = self.head(stream + gate * self.branch(stream))
        return out


def stuck_gate(seed: int, start: float = -0.5, kind: str = "relu") -> Training:
    seeded(seed)
    model = Gated(start, kind)
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed))


def _kept_at_zero(seed: int, *, kept: bool = True) -> Training:
    """An old training loop that fills gradients with zeros; the layer is cut off from step 100 on."""
    seeded(seed)
    model = Detached(detach=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = data.digits(seed)

    def step(number: int) -> float:
        model.detach = kept and number >= 100
        images, labels = next(batches)
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


CASES = [
    Case(
        name="negative-bias",
        build=negative_bias,
        twin=lambda seed: negative_bias(seed, 0.0),
        rule="dead",
        steps=200,
        reaches=1.0,
        blame=("4.*",),
        trap="the third ReLU layer never answers",
    ),
    Case(
        name="mostly-negative-bias",
        build=mostly_negative_bias,
        twin=lambda seed: mostly_negative_bias(seed, 0.0),
        rule="dead",
        steps=250,
        reaches=0.6,
        blame=("2.*",),
        trap="63 of 64 units of a layer never answer",
    ),
    Case(
        name="dying-midway",
        build=dying_midway,
        twin=lambda seed: dying_midway(seed, 1.0),
        rule="dead",
        steps=250,
        reaches=1.0,
        onset=120,
        blame=("0.*", "2.*", "4.*"),
        trap="one bad batch kills the ReLUs for good",
    ),
    Case(
        name="detached",
        build=detached,
        twin=lambda seed: detached(seed, detach=False),
        rule="dead",
        steps=150,
        reaches=1.0,
        proof="starved",
        blame=("body.*",),
        trap="an accidental detach(): the head learns, the body never has a gradient",
    ),
    Case(
        name="forgotten-layer",
        build=forgotten,
        twin=lambda seed: forgotten(seed, call=True),
        rule="dead",
        steps=150,
        reaches=0.5,
        proof="starved",
        blame=("extra.*",),
        trap="built, handed to the optimizer, never called",
    ),
    Case(
        name="stuck-gate",
        build=stuck_gate,
        twin=lambda seed: stuck_gate(seed, 0.5),
        rule="dead",
        steps=150,
        reaches=0.5,
        proof="starved",
        blame=("branch.*", "gate"),
        trap="a gate that is clamped at 0",
    ),
    Case(
        name="zero-filled",
        build=_kept_at_zero,
        twin=lambda seed: _kept_at_zero(seed, kept=False),
        rule="dead",
        steps=200,
        reaches=0.5,
        onset=100,
        proof="starved",
        blame=("body.*",),
        trap="cut off midway; gradients are zero instead of missing",
    ),
]
