"""Residual networks without normalisation layers (Brock, De, Smith, ICLR 2021), and one with BatchNorm."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BRANCH_SCALE = 0.2
"""The paper's alpha: what a branch adds to the variance of its stream, as a deviation."""
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
"""Keeps the variance of what goes through a ReLU (He et al. with the mean taken into account)."""


def standardised(weight: Tensor, gain: Tensor) -> Tensor:
    """Return scaled, standardised weights: each output row has mean 0 and the norm of its gain."""
    rows = weight.flatten(1)
    fan_in = rows.shape[1]
    scale = gain * fan_in**-0.5
    out: Tensor = (F.layer_norm(rows, (fan_in,), eps=1e-6) * scale.unsqueeze(1)).view_as(weight)
    return out


class ScaledConv(nn.Conv2d):
    """A 3 x 3 convolution with scaled weight standardisation."""

    def __init__(self, wide: int, next_wide: int) -> None:
        super().__init__(wide, next_wide, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(next_wide))
        _start(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name is torch's
        out: Tensor = self._conv_forward(input, standardised(self.weight, self.gain), self.bias)
        return out


class ScaledLinear(nn.Linear):
    """A linear layer with scaled weight standardisation."""

    def __init__(self, wide: int, next_wide: int) -> None:
        super().__init__(wide, next_wide)
        self.gain = nn.Parameter(torch.ones(next_wide))
        _start(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name is torch's
        return F.linear(input, standardised(self.weight, self.gain), self.bias)


def _start(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


class Gained(nn.Module):
    """A ReLU that keeps the variance of a stream of the expected deviation, and brings that to 1."""

    def __init__(self, expected: float = 1.0) -> None:
        super().__init__()
        self.scale = RELU_GAIN / expected

    def forward(self, stream: Tensor) -> Tensor:
        return F.relu(stream) * self.scale


class ScaledBlock(nn.Module):
    """``stream + alpha * branch(stream / beta)``, beta the deviation that the stream is expected to have here."""

    def __init__(self, branch: nn.Module, expected: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(Gained(expected), branch)

    def forward(self, stream: Tensor) -> Tensor:
        return torch.add(stream, self.branch(stream), alpha=BRANCH_SCALE)


class NormalisedBlock(nn.Module):
    """The same with BatchNorm before each ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.branch = nn.Sequential(*layers)

    def forward(self, stream: Tensor) -> Tensor:
        out: Tensor = stream + self.branch(stream)
        return out


class Classified(nn.Module):
    """A body, which adaptive clipping takes, and the classifier, which it leaves alone."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Linear(width, 10)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.body(images))
        return out


def convolutional(*, normalised: bool, blocks: int = 3, width: int = 8) -> Classified:
    """Return a residual convolutional network for the digits, shape (images, 64), of two convolutions a block."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    layers += [nn.Conv2d(1, width, 3, padding=1) if normalised else ScaledConv(1, width)]
    for index in range(blocks):
        if index == blocks // 2:
            layers.append(nn.AvgPool2d(2))
        if normalised:
            layers.append(NormalisedBlock(width))
            continue
        branch = nn.Sequential(ScaledConv(width, width), Gained(), ScaledConv(width, width))
        layers.append(ScaledBlock(branch, _expected(index)))
    layers += [nn.BatchNorm2d(width), nn.ReLU()] if normalised else [Gained()]
    return Classified(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width)


def deep(layers: int, width: int = 32) -> Classified:
    """Return a normalizer-free residual network of so many linear layers, one a block, for the digits."""
    stem = ScaledLinear(64, width)
    blocks = [ScaledBlock(ScaledLinear(width, width), _expected(index)) for index in range(layers - 2)]
    return Classified(nn.Sequential(stem, *blocks, Gained(_expected(layers - 2))), width)


def _expected(block: int) -> float:
    """Return the deviation of the stream before a block: each block before it has added alpha squared."""
    return math.sqrt(1 + block * BRANCH_SCALE**2)
