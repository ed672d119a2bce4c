"""Cases that were written and run once before the rules were changed again: docs/diagnosis.md has that result."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from benchmarks.zoo import data
from benchmarks.zoo.case import Case, Training
from benchmarks.zoo.networks import (
    Branch,
    Convolutional,
    LanguageModel,
    Recurrent,
    perceptron,
    scale_weights,
    token_loss,
)
from benchmarks.zoo.training import plain, seeded, set_rate


class Lion(torch.optim.Optimizer):
    """Steps by the sign of a blend of momentum and gradient: every element moves by the learning rate."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002  # the signature is the base class's
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.add_((0.9 * momentum + 0.1 * parameter.grad).sign(), alpha=-group["lr"])
                momentum.mul_(0.99).add_(parameter.grad, alpha=0.01)


def lion(seed: int) -> Training:
    seeded(seed)
    model = perceptron(64, 96, 96, 96, 10, activation=nn.SiLU)
    return plain(model, Lion(model.parameters(), lr=5e-4), data.digits(seed))


def cosine_to_zero(seed: int) -> Training:
    seeded(seed)
    model = LanguageModel(width=24, blocks=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return plain(
        model, optimizer, data.text(seed), loss_of=token_loss, scheduler=CosineAnnealingLR(optimizer, T_max=250)
    )


def half_dropped(seed: int) -> Training:
    seeded(seed)
    layers: list[nn.Module] = []
    for index in range(5):
        layers += [nn.Linear(64 if index == 0 else 128, 128), nn.ReLU(), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


def big_batch(seed: int) -> Training:
    seeded(seed)
    model = nn.Sequential(
        nn.Linear(64, 80),
        nn.BatchNorm1d(80),
        nn.ReLU(),
        nn.Linear(80, 80),
        nn.BatchNorm1d(80),
        nn.ReLU(),
        nn.Linear(80, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8, momentum=0.9, nesterov=True)
    return plain(model, optimizer, data.digits(seed, 1024))


class ManyExperts(nn.Module):
    """Twenty experts of which each image goes to one: some are asked rarely."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 20)
        self.experts = nn.ModuleList(perceptron(64, 24, 24) for _ in range(20))
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        odds = (self.router(images) + 0.5 * torch.randn(len(images), 20)).softmax(1)
        weight, chosen = odds.max(1)
        mixed = torch.zeros(len(images), 24)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                mixed = mixed.index_add(0, rows, weight[rows, None] * expert(images[rows]))
        out: Tensor = self.head(mixed)
        return out


def many_experts(seed: int) -> Training:
    seeded(seed)
    model = ManyExperts()
    return plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), data.digits(seed, 48))


class ThreeHeads(nn.Module):
    """A shared body with three heads: the digit, whether it is even, and how much ink it has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(64, 64, 64)
        self.digit, self.even, self.ink = nn.Linear(64, 10), nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.body(images).relu()
        return self.digit(shared), self.even(shared), self.ink(shared)


def three_heads(seed: int, ink_weight: float = 1e-4) -> Training:
    seeded(seed)
    model = ThreeHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        digit, even, ink = model(images)
        loss = F.cross_entropy(digit, labels) + 0.03 * F.cross_entropy(even, labels % 2)
        loss = loss + ink_weight * F.mse_loss(ink[:, 0], images.sum(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(F.cross_entropy(digit.detach(), labels))

    return Training(model, step)


class Vae(nn.Module):
    """A variational autoencoder of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = perceptron(64, 64, 16), perceptron(8, 64, 64)

    def forward(self, images: Tensor) -> Tensor:
        mean, spread = self.encode(images).chunk(2, 1)
        drawn = mean + (0.5 * spread).exp() * torch.randn_like(mean)
        rebuilt = F.binary_cross_entropy_with_logits(self.decode(drawn), images, reduction="none").sum(1)
        loss: Tensor = (rebuilt + 0.5 * (mean.square() + spread.exp() - spread - 1).sum(1)).mean()
        return loss


def vae(seed: int) -> Training:
    seeded(seed)
    model = Vae()
    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed), loss_of=lambda loss, _: loss)


def denoise(seed: int) -> Training:
    """Predicts the noise in an image from the noised image and how noisy it is, as diffusion models do."""
    generator = seeded(seed)
    model = perceptron(65, 160, 160, 64, activation=nn.SiLU)

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for images, _ in data.digits(seed, 128):
            level = torch.rand(len(images), 1, generator=generator)
            noise = torch.randn(images.shape, generator=generator)
            yield torch.cat([(1 - level).sqrt() * (2 * images - 1) + level.sqrt() * noise, level], 1), noise

    return plain(model, torch.optim.AdamW(model.parameters(), lr=2e-3), iter(batches()), loss_of=F.mse_loss)


class Taught(nn.Module):
    """A student and its teacher, which is the running mean of the student and has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.student = perceptron(64, 64, 64, 10)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.student(images)
        return out


def mean_teacher(seed: int) -> Training:
    generator = seeded(seed)
    model = Taught()
    optimizer = torch.optim.Adam(model.student.parameters(), lr=2e-3)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        noised = images + 0.1 * torch.randn(images.shape, generator=generator)
        logits = model(noised)
        loss = F.cross_entropy(logits, labels)
        agree = F.mse_loss(logits.softmax(1), model.teacher(images).softmax(1))
        optimizer.zero_grad()
        (loss + agree).backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                old.lerp_(new, 0.02)
        return float(loss.detach())

    return Training(model, step)


def gradient_noise(seed: int) -> Training:
    generator = seeded(seed)
    model = perceptron(64, 48, 48, 10, activation=nn.Tanh)

    def shake(step: int) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.02 * step**-0.5 * torch.randn(parameter.shape, generator=generator)

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.2), data.digits(seed), before_step=shake)


class Rounded(nn.Linear):
    """A linear layer whose weights are rounded to three values; the gradient passes straight through."""

    def forward(self, inputs: Tensor) -> Tensor:
        step = self.weight.abs().mean()
        rounded = (self.weight / step).round().clamp(-1, 1) * step
        return F.linear(inputs, self.weight + (rounded - self.weight).detach(), self.bias)


def rounded_weights(seed: int) -> Training:
    seeded(seed)
    model = nn.Sequential(Rounded(64, 96), nn.ReLU(), Rounded(96, 96), nn.ReLU(), Rounded(96, 10))
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed))


def weight_normed(seed: int) -> Training:
    seeded(seed)
    layers = [weight_norm(nn.Linear(wide, 50)) for wide in (64, 50, 50, 50, 50)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())), nn.Linear(50, 10))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data.digits(seed))


def triplets(seed: int) -> Training:
    """A margin that more and more batches keep wholly: their gradient is exactly zero everywhere."""
    seeded(seed)
    model = perceptron(64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = data.all_digits()
    ones, sevens = images[labels == 0], images[labels == 7]
    generator = torch.Generator().manual_seed(seed)

    def step(_number: int) -> float:
        anchor, like = (ones[torch.randint(len(ones), (12,), generator=generator)] for _ in range(2))
        other = sevens[torch.randint(len(sevens), (12,), generator=generator)]
        loss = F.triplet_margin_loss(model(anchor), model(like), model(other), margin=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


def thirty_blocks(seed: int) -> Training:
    seeded(seed)
    model = nn.Sequential(
        nn.Linear(64, 40), *(NormedBranch(40) for _ in range(30)), nn.LayerNorm(40), nn.Linear(40, 10)
    )
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


class NormedBranch(nn.Module):
    """A residual block with its norm before the branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width), perceptron(width, 2 * width, width, activation=nn.GELU)

    def forward(self, stream: Tensor) -> Tensor:
        out: Tensor = stream + self.branch(self.norm(stream))
        return out


def clipped_gru(seed: int) -> Training:
    seeded(seed)
    model = Recurrent("gru", 64)
    return plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), data.text(seed), loss_of=token_loss, clip=0.25)


def sharpness_aware(seed: int) -> Training:
    """Two backward passes a step; the second is the one that counts."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        with torch.no_grad():
            slopes = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            length = torch.stack([slope.norm() for slope in slopes]).norm() + 1e-12
            climbs = [0.05 * slope / length for slope in slopes]
            for parameter, climb in zip(model.parameters(), climbs, strict=True):
                parameter.add_(climb)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for parameter, climb in zip(model.parameters(), climbs, strict=True):
                parameter.sub_(climb)
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


def one_cycle(seed: int) -> Training:
    seeded(seed)
    model = Convolutional(width=12, blocks=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-3)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    schedule = OneCycleLR(optimizer, max_lr=0.3, total_steps=250)
    return plain(model, optimizer, data.digits(seed), loss_of=loss_of, scheduler=schedule)


def outlier_batch(seed: int) -> Training:
    """One batch is twenty times too large; Adam hardly notices."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images * (20.0 if step == 100 else 1.0), labels

    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed), prepare=prepare)


def leaky_tiny(seed: int, gain: float = 0.05) -> Training:
    seeded(seed)
    model = scale_weights(perceptron(64, *[48] * 10, 10, activation=nn.LeakyReLU), gain)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


def deep_softsign(seed: int, gain: float = 0.3) -> Training:
    seeded(seed)
    model = scale_weights(perceptron(64, *[40] * 14, 10, activation=nn.Softsign), gain)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-4), data.digits(seed))


def softmax_scale(seed: int, scale: float = 1e6) -> Training:
    """Squared error on the odds of logits that are far too large."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss((scale * logits).softmax(1), F.one_hot(labels, 10).float()) * 10

    scale_weights(model, 2.0)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.3 / scale), data.digits(seed), loss_of=loss_of)


def gru_rate(seed: int, rate: float = 200.0) -> Training:
    seeded(seed)
    model = Recurrent("gru", 40)
    return plain(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), data.text(seed), loss_of=token_loss)


class Scaled(nn.Module):
    """A residual block that multiplies the stream on its way."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.branch, self.factor = Branch(width, None), factor

    def forward(self, stream: Tensor) -> Tensor:
        out: Tensor = self.factor * self.branch(stream)
        return out


def growing_stream(seed: int, factor: float = 3.0) -> Training:
    seeded(seed)
    model = nn.Sequential(nn.Linear(64, 36), *(Scaled(36, factor) for _ in range(16)), nn.Linear(36, 10))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.01), data.digits(seed), clip=5.0)


def adam_hundredfold(seed: int, factor: float = 100.0) -> Training:
    seeded(seed)
    model = LanguageModel(width=48, blocks=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def change(step: int) -> None:
        set_rate(optimizer, 3e-3 * (factor if step > 80 else 1.0))

    return plain(model, optimizer, data.text(seed), loss_of=token_loss, before_step=change)


def nesterov_rate(seed: int, rate: float = 3.0) -> Training:
    seeded(seed)
    inputs, targets = data.table("wine")
    batches = data.endless(data.standardised(inputs), targets.long(), 32, seed)
    model = perceptron(13, 40, 40, 3)
    return plain(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.95, nesterov=True), batches)


def never_zeroed(seed: int, *, zeroed: bool = False) -> Training:
    """zero_grad() was forgotten: each step is taken along the sum of all gradients so far."""
    seeded(seed)
    model = perceptron(64, 100, 100, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        if zeroed:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


class Late(nn.Module):
    """A body that runs without gradients until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = perceptron(64, 48, 48, 48), nn.Linear(48, 10)
        self.released = False

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.released):
            features = self.body(images)
        out: Tensor = self.head(features.relu())
        return out


def never_released(seed: int, *, released: bool = False) -> Training:
    seeded(seed)
    model = Late()
    model.released = released
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1), data.digits(seed))


class TwoBranches(nn.Module):
    """Upper and lower half of the image, each with its own layers; one of them may be cut off."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.upper, self.lower = perceptron(32, 32, 32), perceptron(32, 32, 32)
        self.head = perceptron(64, 48, 10)
        self.cut = cut

    def forward(self, images: Tensor) -> Tensor:
        upper, lower = self.upper(images[:, :32]), self.lower(images[:, 32:])
        out: Tensor = self.head(torch.cat([upper, lower.detach() if self.cut else lower], 1).relu())
        return out


def cut_branch(seed: int, *, cut: bool = True) -> Training:
    seeded(seed)
    model = TwoBranches(cut=cut)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


def dead_norm(seed: int, shift: float = -8.0) -> Training:
    """The shift of a batch norm keeps every unit behind it below zero."""
    seeded(seed)
    norm = nn.BatchNorm1d(64)
    nn.init.constant_(norm.bias, shift)
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        norm,
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05), data.digits(seed))


def worthless_task(seed: int) -> Training:
    """The weight of one task's loss is zero."""
    return three_heads(seed, 0.0)


def log_of_negative(seed: int, *, guarded: bool = False) -> Training:
    """The logarithm of an output that nothing keeps above zero."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10)

    def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
        if guarded:
            return F.cross_entropy(outputs, labels)
        return -outputs.gather(1, labels[:, None]).log().mean()

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.5), data.digits(seed), loss_of=loss_of)


class Standardised(nn.Module):
    """Divides each feature by its deviation over the batch."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        return (features - features.mean(0)) / (features.std(0) + self.eps)


def zero_variance(seed: int, eps: float = 0.0) -> Training:
    """From step 60 on all images of a batch are the same one, once."""
    seeded(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), Standardised(eps), nn.Linear(48, 10))

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images[:1].expand_as(images), labels[:1].expand_as(labels)) if step == 60 else (images, labels)

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05), data.digits(seed), prepare=prepare)


def nothing_to_learn(seed: int, *, skipped: bool = False) -> Training:
    """At step 40 the mask of the batch is empty: a mean over nothing."""
    seeded(seed)
    model = perceptron(64, 80, 80, 10, activation=nn.GELU)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.full_like(labels, -100) if step == 40 and not skipped else labels

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        mask = (labels >= 0).float()
        return (mask * F.cross_entropy(logits, labels.clamp_min(0), reduction="none")).sum() / mask.sum()

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return plain(model, optimizer, data.digits(seed), prepare=prepare, loss_of=loss_of)


def _healthy(name: str, build: Callable[[int], Training], steps: int, reaches: float, trap: str) -> Case:
    return Case(name=name, build=build, steps=steps, reaches=reaches, trap=trap)


CASES = [
    _healthy("lion", lion, 200, 0.5, "every element moves as far, whatever its gradient"),
    _healthy("cosine-to-zero", cosine_to_zero, 250, 2.6, "the learning rate ends at zero"),
    _healthy("half-dropped", half_dropped, 300, 1.2, "half of all units are silent at any step"),
    _healthy("big-batch", big_batch, 150, 0.3, "hardly any noise"),
    _healthy("many-experts", many_experts, 300, 1.0, "experts that are rarely asked"),
    _healthy("three-heads", three_heads, 250, 0.6, "a task with a ten-thousandth of the weight"),
    _healthy("vae", vae, 250, 30.0, "a loss of sums with a floor"),
    _healthy("denoise", denoise, 250, 0.6, "noise is what is learned"),
    _healthy("mean-teacher", mean_teacher, 250, 0.5, "a copy without gradients that moves"),
    _healthy("gradient-noise", gradient_noise, 250, 0.8, "noise on every gradient"),
    _healthy("rounded-weights", rounded_weights, 250, 0.6, "three values a weight"),
    _healthy("weight-normed", weight_normed, 250, 0.5, "length and direction apart"),
    _healthy("triplets", triplets, 250, 0.05, "most batches have no gradient at all"),
    _healthy("thirty-blocks", thirty_blocks, 120, 0.5, "deep, and well"),
    _healthy("clipped-gru", clipped_gru, 200, 2.6, "clipped at every step"),
    _healthy("sharpness-aware", sharpness_aware, 200, 0.5, "two backward passes a step"),
    _healthy("one-cycle", one_cycle, 250, 0.9, "the learning rate rises thirtyfold and falls to nothing"),
    _healthy("outlier-batch", outlier_batch, 200, 0.6, "one wild batch, and nothing is lost"),
    Case(
        name="leaky-tiny",
        build=leaky_tiny,
        twin=lambda seed: leaky_tiny(seed, 1.4),
        rule="vanishing",
        steps=200,
        reaches=1.8,
    ),
    Case(
        name="deep-softsign",
        build=deep_softsign,
        twin=lambda seed: deep_softsign(seed, 1.5),
        rule="vanishing",
        steps=200,
        reaches=2.2,
    ),
    Case(
        name="softmax-scale",
        build=softmax_scale,
        twin=lambda seed: softmax_scale(seed, 1.0),
        rule="vanishing",
        steps=200,
        reaches=0.6,
    ),
    Case(
        name="gru-rate", build=gru_rate, twin=lambda seed: gru_rate(seed, 0.5), rule="exploding", steps=150, reaches=3.2
    ),
    Case(
        name="growing-stream",
        build=growing_stream,
        twin=lambda seed: growing_stream(seed, 1.0),
        rule="exploding",
        steps=200,
        reaches=1.8,
    ),
    Case(
        name="adam-hundredfold",
        build=adam_hundredfold,
        twin=lambda seed: adam_hundredfold(seed, 1.0),
        rule="exploding",
        onset=82,
        steps=180,
        reaches=2.6,
    ),
    Case(
        name="nesterov-rate",
        build=nesterov_rate,
        twin=lambda seed: nesterov_rate(seed, 0.02),
        rule="exploding",
        steps=120,
        reaches=0.5,
    ),
    Case(
        name="never-zeroed",
        build=never_zeroed,
        twin=lambda seed: never_zeroed(seed, zeroed=True),
        rule="exploding",
        onset=5,
        steps=200,
        reaches=1.0,
    ),
    Case(
        name="never-released",
        build=never_released,
        twin=lambda seed: never_released(seed, released=True),
        rule="dead",
        steps=120,
        reaches=1.0,
        blame=("body.*",),
        proof="starved",
    ),
    Case(
        name="cut-branch",
        build=cut_branch,
        twin=lambda seed: cut_branch(seed, cut=False),
        rule="dead",
        steps=120,
        reaches=1.0,
        blame=("lower.*",),
        proof="starved",
    ),
    Case(
        name="dead-norm",
        build=dead_norm,
        twin=lambda seed: dead_norm(seed, 0.0),
        rule="dead",
        steps=120,
        reaches=1.5,
        blame=("0.*", "2.*", "3.*"),
        proof="starved",
    ),
    Case(
        name="worthless-task",
        build=worthless_task,
        twin=three_heads,
        rule="dead",
        steps=120,
        reaches=1.0,
        blame=("ink.*",),
        proof="starved",
    ),
    Case(
        name="log-of-negative",
        build=log_of_negative,
        twin=lambda seed: log_of_negative(seed, guarded=True),
        rule="nonfinite",
        steps=200,
        reaches=1.0,
    ),
    Case(
        name="zero-variance",
        build=zero_variance,
        twin=lambda seed: zero_variance(seed, 1e-3),
        rule="nonfinite",
        onset=60,
        steps=150,
        reaches=1.0,
        blame=("2.*", "0.*", "4.*"),
    ),
    Case(
        name="nothing-to-learn",
        build=nothing_to_learn,
        twin=lambda seed: nothing_to_learn(seed, skipped=True),
        rule="nonfinite",
        onset=40,
        steps=150,
        reaches=1.0,
    ),
]
