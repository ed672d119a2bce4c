"""Trainings whose gradients vanish."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Case, Training
from benchmarks.zoo.networks import LanguageModel, perceptron, scale_weights, token_loss
from benchmarks.zoo.training import plain, seeded, set_rate


def deep_sigmoid(seed: int, activation: type[nn.Module] = nn.Sigmoid) -> Training:
    seeded(seed)
    model = perceptron(64, *[48] * 12, 10, activation=activation)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


def deep_tanh(seed: int, gain: float = 0.2) -> Training:
    seeded(seed)
    model = scale_weights(perceptron(64, *[48] * 12, 10, activation=nn.Tanh), gain)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


def deep_relu(seed: int, gain: float | None = None) -> Training:
    """PyTorch's default initialisation passes on 0.41 of the gradient a layer; He's passes on all of it."""
    seeded(seed)
    model: nn.Module = perceptron(64, *[48] * 24, 10)
    if gain is not None:
        scale_weights(model, gain)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), data.digits(seed))


def post_norm(seed: int, *, post: bool = True) -> Training:
    """Post-norm without warm-up: at this rate the lower blocks lose their gradient and never get it back."""
    seeded(seed)
    model = LanguageModel(width=24, blocks=14, post=post)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    return plain(model, optimizer, data.text(seed, 12, 24), loss_of=token_loss)


def saturated_outputs(seed: int, gain: float = 30.0) -> Training:
    """Squared error on sigmoids that start saturated: the error is large, its gradient is not."""
    seeded(seed)
    model = perceptron(64, 48, 48, 48, 10, activation=nn.Tanh)
    head = model[-1]
    assert isinstance(head, nn.Linear)
    nn.init.constant_(head.bias, gain)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.sigmoid() - F.one_hot(labels, 10)).square().sum(1).mean()

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.2), data.digits(seed), loss_of=loss_of)


def saturated_midway(seed: int, rate: float = 1000.0) -> Training:
    """Three steps at a thousand times the rate drive the sigmoids into their flat ends."""
    seeded(seed)
    model = perceptron(64, 48, 48, 48, 48, 10, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def change(step: int) -> None:
        set_rate(optimizer, rate if 120 <= step < 123 else 1.0)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.sigmoid() - F.one_hot(labels, 10)).square().sum(1).mean()

    return plain(model, optimizer, data.digits(seed), loss_of=loss_of, before_step=change)


class HalfPrecision(nn.Module):
    """Layers that run in fp16, weights in fp32."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            out: Tensor = self.body(images)
        return out.float()


def underflow(seed: int, scale: float = 1.0) -> Training:
    """The loss is divided by the batch and a constant, as multi-task weights do: in fp16 nothing is left of it."""
    seeded(seed)
    model = HalfPrecision(perceptron(64, 64, 64, 64, 64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-16)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels) * 2e-7
        (loss * scale).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(scale)
        optimizer.step()
        return float(loss.detach()) / 2e-7

    return Training(model, step)


class Fading(nn.Module):
    """Residual blocks that shrink the stream instead of the branch."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 48)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(16))
        self.keep = keep
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images)
        for layer in self.layers:
            stream = self.keep * stream + 0.3 * torch.tanh(layer(stream))
        out: Tensor = self.head(stream)
        return out


def shrinking_stream(seed: int, keep: float = 0.1) -> Training:
    seeded(seed)
    model = Fading(keep)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


def _rnn(seed: int, gain: float = 0.2) -> Training:
    """The label is told by the first row of the image only, and the recurrent weights forget it."""
    generator = seeded(seed)
    cell = nn.RNN(2, 24, num_layers=6, batch_first=True)
    for name, weight in cell.named_parameters():
        if "weight" in name:
            with torch.no_grad():
                weight.mul_(gain * 24**0.5 / weight.shape[1] ** 0.5)
        else:
            nn.init.zeros_(weight)

    class Recall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell
            self.head = nn.Linear(24, 2)

        def forward(self, rows: Tensor) -> Tensor:
            states, _ = self.cell(rows)
            out: Tensor = self.head(states[:, -1])
            return out

    model = Recall()

    def batches() -> object:
        while True:
            labels = torch.randint(0, 2, (32,), generator=generator)
            rows = torch.randn(32, 8, 2, generator=generator) * 0.05
            rows[:, 0, 0] = labels * 2.0 - 1.0
            yield rows, labels

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batches())  # type: ignore[arg-type]


CASES = [
    Case(
        name="deep-sigmoid",
        build=deep_sigmoid,
        twin=lambda seed: deep_sigmoid(seed, nn.ReLU),
        rule="vanishing",
        steps=250,
        reaches=1.6,
        blame=("0.*", "2.*", "4.*", "6.*"),
        trap="12 sigmoids, each passing on a tenth",
    ),
    Case(
        name="deep-tanh-small-init",
        build=deep_tanh,
        twin=lambda seed: deep_tanh(seed, 1.0),
        rule="vanishing",
        steps=250,
        reaches=1.0,
        trap="weights a fifth of Xavier's: every matrix's gradient has the same tiny factor",
    ),
    Case(
        name="deep-relu-default-init",
        build=deep_relu,
        twin=lambda seed: deep_relu(seed, math.sqrt(2)),
        rule="vanishing",
        steps=300,
        reaches=1.6,
        blame=("0.*", "2.*", "4.*", "6.*", "8.*", "10.*", "12.*", "14.*"),
        trap="25 layers",
    ),
    Case(
        name="post-norm-without-warm-up",
        build=post_norm,
        twin=lambda seed: post_norm(seed, post=False),
        rule="vanishing",
        steps=150,
        reaches=2.6,
        blame=("blocks.*",),
        trap="14 post-norm blocks, full rate from the first step",
    ),
    Case(
        name="saturated-outputs",
        build=saturated_outputs,
        twin=lambda seed: saturated_outputs(seed, 0.0),
        rule="vanishing",
        steps=400,
        reaches=0.75,
        trap="the error is large, its gradient is not: tiny everywhere, as if it had converged",
    ),
    Case(
        name="saturated-midway",
        build=saturated_midway,
        twin=lambda seed: saturated_midway(seed, 1.0),
        rule="vanishing",
        steps=300,
        reaches=0.5,
        onset=120,
        trap="a jump of the learning rate",
    ),
    Case(
        name="fp16-underflow",
        build=underflow,
        twin=lambda seed: underflow(seed, 2.0**20),
        rule="vanishing",
        steps=200,
        reaches=0.5,
        trap="no loss scaling: what is below 6e-8 is zero",
    ),
    Case(
        name="shrinking-stream",
        build=shrinking_stream,
        twin=lambda seed: shrinking_stream(seed, 1.0),
        rule="vanishing",
        steps=250,
        reaches=0.9,
        blame=("stem.*", "layers.[0-7].*"),
        trap="the residual stream, not the branch, is scaled down",
    ),
    Case(
        name="stacked-rnn-small-init",
        build=_rnn,
        twin=lambda seed: _rnn(seed, 1.0),
        rule="vanishing",
        steps=250,
        reaches=0.3,
        trap="six layers and eight steps in time, each passing on a fifth",
    ),
]
