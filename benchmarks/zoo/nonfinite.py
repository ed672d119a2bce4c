"""Trainings that turn to NaN or Inf in a known module at a known step."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Case, Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.training import plain, seeded

ONSET = 80


def log_of_zero(seed: int, *, guarded: bool = False) -> Training:
    """A hand-written cross-entropy meets a probability of exactly zero when the logits are sharpened."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10)
    number = 0

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal number
        number += 1
        sharper = logits * (300.0 if number >= ONSET else 1.0)
        chosen = sharper.softmax(1).gather(1, labels[:, None])
        return -(chosen.clamp_min(1e-7) if guarded else chosen).log().mean()

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.02), data.digits(seed), loss_of=loss_of)


class Normed(nn.Module):
    """A network with a hand-written operation between its second and third layer."""

    def __init__(self, kind: str, *, guarded: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 10)
        self.kind = kind
        self.guarded = guarded

    def middle(self, stream: Tensor) -> Tensor:
        """Divide by a length or a spread that is zero for an empty row."""
        if self.kind == "length":
            squares = stream.square().sum(1, keepdim=True)
            return stream / ((squares + 1e-6 if self.guarded else squares).sqrt() + 1e-6)
        spread = (stream - stream.mean(1, keepdim=True)).square().mean(1, keepdim=True)
        return (stream - stream.mean(1, keepdim=True)) / (spread + (1e-5 if self.guarded else 0.0)).sqrt()

    def forward(self, images: Tensor) -> Tensor:
        stream = images
        for index, layer in enumerate(self.layers):
            stream = F.relu(layer(stream))
            if index == 1:
                keep = (images.abs().sum(1, keepdim=True) > 0).float()
                stream = self.middle(stream * keep)
        out: Tensor = self.head(stream)
        return out


def _blank(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """From the onset on, one image of each batch is empty."""
    if step >= ONSET:
        images = images.clone()
        images[0] = 0.0
    return images, labels


def root_of_zero(seed: int, *, guarded: bool = False) -> Training:
    """Forward is fine (0 / 1e-6), backward is not: the slope of a root at zero is infinite."""
    seeded(seed)
    model = Normed("length", guarded=guarded)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed), prepare=_blank)


def zero_by_zero(seed: int, *, guarded: bool = False) -> Training:
    seeded(seed)
    model = Normed("spread", guarded=guarded)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed), prepare=_blank)


class HalfAttention(nn.Module):
    """Attention over the rows of an image whose logits are computed in fp16, as a mixed-precision kernel does."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.query = nn.Linear(32, 32)
        self.key = nn.Linear(32, 32)
        self.value = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)
        self.scaled = scaled
        self.step = 0

    def forward(self, images: Tensor) -> Tensor:
        self.step += self.training
        rows = self.embed(images.view(-1, 8, 8))
        boost = 900.0 if self.step >= ONSET else 1.0
        query, key = (self.query(rows) * boost).half(), (self.key(rows) * boost).half()
        if self.scaled:
            query = query / boost
            key = key / boost
        logits = query @ key.transpose(1, 2)
        mixed = (logits - logits.amax(-1, keepdim=True)).float().softmax(-1) @ self.value(rows)
        out: Tensor = self.head(mixed.mean(1))
        return out


def half_attention(seed: int, *, scaled: bool = False) -> Training:
    seeded(seed)
    model = HalfAttention(scaled=scaled)
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed))


def bad_data(seed: int, *, cleaned: bool = False) -> Training:
    seeded(seed)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if step == ONSET:
            images = images.clone()
            images[3, 17] = torch.nan
        return (images.nan_to_num() if cleaned else images), labels

    model = perceptron(64, 64, 64, 10)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed), prepare=prepare)


class Angle(nn.Module):
    """The similarity of two views by arccos: its slope is infinite where they agree."""

    def __init__(self, *, guarded: bool) -> None:
        super().__init__()
        self.encoder = perceptron(64, 32, 16)
        self.head = nn.Linear(16, 10)
        self.guarded = guarded

    def forward(self, images: Tensor) -> Tensor:
        code = self.encoder(images)
        norm = F.normalize(code, dim=1)
        cosine = (norm * norm.roll(1, 0)).sum(1, keepdim=True).clamp(-1.0, 1.0)
        if self.guarded:
            cosine = cosine * 0.999
        out: Tensor = self.head(code) + 0.01 * cosine.acos()
        return out


def arccosine(seed: int, *, guarded: bool = False) -> Training:
    seeded(seed)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if step >= ONSET:
            images, labels = images.clone(), labels.clone()
            images[:8], labels[:8] = images[:1], labels[:1]
        return images, labels

    model = Angle(guarded=guarded)
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed), prepare=prepare)


CASES = [
    Case(
        name="log-of-zero",
        build=log_of_zero,
        twin=lambda seed: log_of_zero(seed, guarded=True),
        rule="nonfinite",
        steps=120,
        reaches=20.0,
        onset=ONSET,
        blame=("4.*",),
        trap="in the loss",
    ),
    Case(
        name="root-of-zero",
        build=root_of_zero,
        twin=lambda seed: root_of_zero(seed, guarded=True),
        rule="nonfinite",
        steps=120,
        reaches=1.5,
        onset=ONSET,
        blame=("layers.1.*",),
        trap="the forward pass is finite, the backward pass is not",
    ),
    Case(
        name="zero-by-zero",
        build=zero_by_zero,
        twin=lambda seed: zero_by_zero(seed, guarded=True),
        rule="nonfinite",
        steps=120,
        reaches=1.5,
        onset=ONSET,
        blame=("layers.1.*", "layers.2.*"),
        trap="in a normalisation between two layers; all gradients are bad at once",
    ),
    Case(
        name="fp16-attention",
        build=half_attention,
        twin=lambda seed: half_attention(seed, scaled=True),
        rule="nonfinite",
        steps=120,
        reaches=2.0,
        onset=ONSET,
        blame=("query.*", "key.*", "head.*"),
        trap="logits beyond 65,504: Inf - Inf",
    ),
    Case(
        name="bad-data",
        build=bad_data,
        twin=lambda seed: bad_data(seed, cleaned=True),
        rule="nonfinite",
        steps=120,
        reaches=1.5,
        onset=ONSET,
        blame=("0.*",),
        trap="one pixel of one image",
    ),
    Case(
        name="arccosine",
        build=arccosine,
        twin=lambda seed: arccosine(seed, guarded=True),
        rule="nonfinite",
        steps=120,
        reaches=1.5,
        onset=ONSET,
        blame=("encoder.2.*",),
        trap="an infinite slope in a side branch",
    ),
]
