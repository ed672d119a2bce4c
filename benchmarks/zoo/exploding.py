"""Trainings whose gradients or weights explode."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Case, Training
from benchmarks.zoo.healthy import clip_adaptively
from benchmarks.zoo.networks import Convolutional, LanguageModel, Recurrent, perceptron, scale_weights, token_loss
from benchmarks.zoo.training import plain, seeded, set_rate


def large_init(seed: int, gain: float = 6.0, clip: float | None = None) -> Training:
    seeded(seed)
    model = scale_weights(perceptron(64, *[64] * 8, 10), gain)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.02), data.digits(seed), clip=clip)


def large_init_adam(seed: int, gain: float = 6.0) -> Training:
    """Adam keeps the steps small; the loss starts at millions and comes down, but never to anything useful."""
    seeded(seed)
    model = scale_weights(perceptron(64, *[64] * 10, 10), gain)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


def recurrent(seed: int, radius: float = 8.0, clip: float | None = None) -> Training:
    """A plain recurrent network whose recurrent matrix has a spectral radius above 1."""
    seeded(seed)
    model = Recurrent("rnn")
    weight = model.cell.weight_hh_l0
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight) * radius / len(weight) ** 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return plain(model, optimizer, data.text(seed, 16, 48), loss_of=token_loss, clip=clip)


class LinearRecurrent(nn.Module):
    """Sums a sequence in a linear state: without a squashing function the state grows by the radius each step."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.cell = nn.RNN(8, 32, nonlinearity="relu", batch_first=True)
        weight = self.cell.weight_hh_l0
        assert isinstance(weight, Tensor)
        nn.init.orthogonal_(weight, gain=radius)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.view(-1, 8, 8).repeat(1, 4, 1)
        states, _ = self.cell(rows)
        out: Tensor = self.head(states[:, -1])
        return out


def relu_recurrent(seed: int, radius: float = 2.5, clip: float | None = None) -> Training:
    seeded(seed)
    model = LinearRecurrent(radius)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return plain(model, optimizer, data.digits(seed), clip=clip)


def rate_too_high_sgd(seed: int, rate: float = 3.0) -> Training:
    seeded(seed)
    model = Convolutional(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return plain(model, optimizer, data.digits(seed))


def rate_too_high_adam(seed: int, rate: float = 1.0) -> Training:
    seeded(seed)
    model = LanguageModel(blocks=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    return plain(model, optimizer, data.text(seed), loss_of=token_loss)


def schedule_jump(seed: int, factor: float = 1000.0) -> Training:
    seeded(seed)
    model = Convolutional(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def change(step: int) -> None:
        set_rate(optimizer, 0.02 * factor if step >= 120 else 0.02)

    return plain(model, optimizer, data.digits(seed), before_step=change)


def bad_batch(seed: int, contrast: float = 255.0) -> Training:
    """One batch that nobody divided by 255."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10, activation=nn.LeakyReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images * contrast if step == 120 else images), labels

    return plain(model, optimizer, data.digits(seed), prepare=prepare)


def negative_decay(seed: int, decay: float = -0.5) -> Training:
    seeded(seed)
    model = perceptron(64, 64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.param_groups[0]["weight_decay"] = decay
    return plain(model, optimizer, data.digits(seed))


def normalizer_free(seed: int, clip: float | None = None) -> Training:
    """A rate at which the same network needs adaptive clipping."""
    seeded(seed)
    model = Convolutional(norm=False, blocks=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.6, momentum=0.9)

    def before_step(_step: int) -> None:
        if clip is not None:
            clip_adaptively(model, clip)

    return plain(model, optimizer, data.digits(seed), before_step=before_step)


def growing_depth(seed: int, gain: float = 3.0, clip: float | None = None) -> Training:
    """Tanh in its chaotic regime: the gradient grows from the output to the input."""
    seeded(seed)
    model = scale_weights(perceptron(64, *[64] * 20, 10, activation=nn.Tanh), gain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return plain(model, optimizer, data.digits(seed), clip=clip)


def hidden_rate(seed: int, rate: float = 30.0) -> Training:
    """A rate far too high with the usual clip: every step has the same, too large, length."""
    seeded(seed)
    model = Convolutional(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return plain(model, optimizer, data.digits(seed), clip=1.0)


def regression(seed: int, rate: float = 3.0) -> Training:
    """Raw targets and plain SGD: the error feeds the gradient, the gradient the error."""
    seeded(seed)
    inputs, targets = data.table("diabetes")
    batches = data.endless(data.standardised(inputs), targets.float().unsqueeze(1) / 100, 64, seed)
    model = perceptron(10, 64, 64, 1)
    return plain(model, torch.optim.SGD(model.parameters(), lr=rate), batches, loss_of=F.mse_loss)


CASES = [
    Case(
        name="large-init",
        build=large_init,
        twin=lambda seed: large_init(seed, math.sqrt(2)),
        rule="exploding",
        steps=200,
        reaches=1.5,
        trap="weights four times He's",
    ),
    Case(
        name="large-init-adam",
        build=large_init_adam,
        twin=lambda seed: large_init_adam(seed, math.sqrt(2)),
        rule="exploding",
        steps=250,
        reaches=0.5,
        trap="the loss comes down from millions, but never to anything useful",
    ),
    Case(
        name="rnn-radius",
        build=recurrent,
        twin=lambda seed: recurrent(seed, 0.5),
        rule="exploding",
        steps=200,
        reaches=2.2,
        trap="spectral radius 8",
    ),
    Case(
        name="relu-rnn-radius",
        build=relu_recurrent,
        twin=lambda seed: relu_recurrent(seed, 1.0),
        rule="exploding",
        steps=300,
        reaches=1.7,
        trap="spectral radius 2, nothing that squashes",
    ),
    Case(
        name="rate-sgd-conv",
        build=rate_too_high_sgd,
        twin=lambda seed: rate_too_high_sgd(seed, 0.02),
        rule="exploding",
        steps=150,
        reaches=1.0,
        trap="learning rate",
    ),
    Case(
        name="rate-adam-transformer",
        build=rate_too_high_adam,
        twin=lambda seed: rate_too_high_adam(seed, 0.002),
        rule="exploding",
        steps=150,
        reaches=2.8,
        trap="learning rate; Adam's gradients say little about it",
    ),
    Case(
        name="schedule-jump",
        build=schedule_jump,
        twin=lambda seed: schedule_jump(seed, 1.0),
        rule="exploding",
        steps=200,
        reaches=1.0,
        onset=121,
        trap="the schedule multiplies the rate by 1,000",
    ),
    Case(
        name="bad-batch",
        build=bad_batch,
        twin=lambda seed: bad_batch(seed, 1.0),
        rule="exploding",
        steps=200,
        reaches=0.5,
        onset=120,
        trap="one batch that nobody divided by 255, from which the run does not recover",
    ),
    Case(
        name="negative-weight-decay",
        build=negative_decay,
        twin=lambda seed: negative_decay(seed, 0.0),
        rule="exploding",
        steps=250,
        reaches=0.5,
        trap="a sign: weights grow from the first step",
    ),
    Case(
        name="normalizer-free",
        build=normalizer_free,
        twin=lambda seed: normalizer_free(seed, 0.02),
        rule="exploding",
        steps=200,
        reaches=1.0,
        trap="no norm, no clipping, high rate",
    ),
    Case(
        name="chaotic-tanh",
        build=growing_depth,
        twin=lambda seed: growing_depth(seed, 1.0),
        rule="exploding",
        steps=200,
        reaches=1.0,
        trap="gradient grows from output to input",
    ),
    Case(
        name="squared-error-rate",
        build=regression,
        twin=lambda seed: regression(seed, 0.01),
        rule="exploding",
        steps=150,
        reaches=0.6,
        trap="learning rate",
    ),
    Case(
        name="hidden-large-init",
        build=lambda seed: large_init(seed, clip=1.0),
        twin=lambda seed: large_init(seed, math.sqrt(2), clip=1.0),
        rule="exploding",
        steps=200,
        reaches=1.9,
        trap="clip_grad_norm_(1.0) hides gradients of millions",
    ),
    Case(
        name="hidden-relu-rnn",
        build=lambda seed: relu_recurrent(seed, clip=1.0),
        twin=lambda seed: relu_recurrent(seed, 1.0, clip=1.0),
        rule="exploding",
        steps=300,
        reaches=1.7,
        trap="clip_grad_norm_(1.0) hides gradients of millions",
    ),
    Case(
        name="hidden-chaotic-tanh",
        build=lambda seed: growing_depth(seed, clip=1.0),
        twin=lambda seed: growing_depth(seed, 1.0, clip=1.0),
        rule="exploding",
        steps=200,
        reaches=1.0,
        trap="clip_grad_norm_(1.0) hides the growth",
    ),
    Case(
        name="hidden-rate",
        build=hidden_rate,
        twin=lambda seed: hidden_rate(seed, 0.02),
        rule="exploding",
        steps=200,
        reaches=1.0,
        trap="clip_grad_norm_(1.0) at a rate of 30",
    ),
]
