"""Healthy trainings, each with something that a naive rule takes for a fault."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR
from torch.utils.checkpoint import checkpoint

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

CASES: list[Case] = []


def converged(seed: int) -> Training:
    seeded(seed)
    images, labels = data.all_digits()
    model = perceptron(64, 64, 64, 10)
    batches = itertools.repeat((images[:128], labels[:128]))
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-2), batches)


def converged_to_a_floor(seed: int) -> Training:
    """Full-batch regression: the loss ends far above zero and the gradient vanishes, because it is done."""
    seeded(seed)
    inputs, targets = data.table("diabetes")
    inputs, targets = data.standardised(inputs), data.standardised(targets.float().unsqueeze(1))
    model = perceptron(10, 8, 1, activation=nn.Tanh)
    batches = itertools.repeat((inputs, targets))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batches, loss_of=F.mse_loss)


def rezero(seed: int) -> Training:
    seeded(seed)
    model = nn.Sequential(nn.Linear(64, 48), *(Branch(48, 0.0) for _ in range(10)), nn.Linear(48, 10))
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


def layer_scale(seed: int) -> Training:
    seeded(seed)
    blocks = (Branch(48, 1e-5, per_channel=True) for _ in range(10))
    model = nn.Sequential(nn.Linear(64, 48), *blocks, nn.Linear(48, 10))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


def zero_gamma(seed: int) -> Training:
    seeded(seed)
    model = Convolutional(zero_gamma=True)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


def zero_head(seed: int) -> Training:
    """A head that starts at zero: at the first step no other layer has a gradient."""
    seeded(seed)
    model = perceptron(64, 48, 48, 48, 48, 10)
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter whose second matrix starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.base(inputs) + inputs @ self.lora_a.T @ self.lora_b.T
        return out


def _pretrained(seed: int, steps: int = 150) -> nn.Sequential:
    """Return a network that knows the digits 0 to 4."""
    images, labels = data.all_digits()
    known = labels < 5
    model = perceptron(64, 64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    training = plain(model, optimizer, data.endless(images[known], labels[known], 64, seed))
    for step in range(steps):
        training.step(step)
    return model


def lora(seed: int) -> Training:
    seeded(seed)
    base = _pretrained(seed)
    model = nn.Sequential(*(Adapted(part) if isinstance(part, nn.Linear) else part for part in base))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return plain(model, torch.optim.Adam(trained, lr=3e-3), data.digits(seed))


def frozen_backbone(seed: int) -> Training:
    seeded(seed)
    model = _pretrained(seed)
    for part in list(model)[:-1]:
        part.requires_grad_(False)
    return plain(model, torch.optim.Adam(model[-1].parameters(), lr=1e-2), data.digits(seed))


def fine_tuning(seed: int) -> Training:
    seeded(seed)
    images, labels = data.all_digits()
    known = labels < 5
    model = _pretrained(seed)
    batches = data.endless(images[known], labels[known], 64, seed + 9)
    return plain(model, torch.optim.AdamW(model.parameters(), lr=1e-6), batches)


def grad_scaler(seed: int) -> Training:
    """Half precision whose loss scale starts far too high: the first steps overflow and are skipped."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=60)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return float(loss.detach())

    return Training(model, step)


def accumulation(seed: int) -> Training:
    seeded(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return plain(model, optimizer, data.digits(seed, 16), accumulate=4)


def tied(seed: int) -> Training:
    seeded(seed)
    model = LanguageModel(tied=True, blocks=2)
    return plain(model, torch.optim.AdamW(model.parameters(), lr=3e-3), data.text(seed), loss_of=token_loss)


class Bag(nn.Module):
    """Predicts a byte from the hashed bigrams before it, with a sparse embedding most of whose rows are rare."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.EmbeddingBag(20_000, 16, mode="mean", sparse=True)
        self.head = perceptron(16, 32, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        pairs = (tokens[:, :-1] * 131 + tokens[:, 1:] * 7) % 20_000
        out: Tensor = self.head(self.rows(pairs))
        return out


def sparse_embedding(seed: int) -> Training:
    seeded(seed)
    model = Bag()
    optimizers = (
        torch.optim.SparseAdam(list(model.rows.parameters()), lr=1e-2),
        torch.optim.Adam(model.head.parameters(), lr=1e-2),
    )
    pieces = data.text(seed, 64, 5)
    batches = ((inputs, targets[:, -1].clamp_max(127)) for inputs, targets in pieces)
    return plain(model, optimizers, batches)


def noisy_labels(seed: int) -> Training:
    """Every 25th batch has random labels and five times the contrast: the loss spikes and recovers."""
    generator = seeded(seed)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wrong = torch.randint(0, 10, labels.shape, generator=generator)
        if step % 25 == 0:
            return images * 5, wrong
        return images, torch.where(torch.rand(labels.shape, generator=generator) < 0.1, wrong, labels)

    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return plain(model, optimizer, data.digits(seed), clip=1.0, prepare=prepare)


def lstm(seed: int) -> Training:
    seeded(seed)
    model = Recurrent("lstm")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return plain(model, optimizer, data.text(seed), loss_of=token_loss, clip=5.0)


class Generator(nn.Sequential):
    """Noise to images."""


class Discriminator(nn.Sequential):
    """Images to one logit."""


def gan(seed: int) -> Training:
    """Two networks, two optimizers; its losses rise and fall without meaning much."""
    generator = seeded(seed)
    draws = Generator(
        nn.Linear(16, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.Sigmoid(),
    )
    judges = Discriminator(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    draw_optimizer = torch.optim.Adam(draws.parameters(), lr=2e-3, betas=(0.5, 0.999))
    judge_optimizer = torch.optim.Adam(judges.parameters(), lr=5e-4, betas=(0.5, 0.999))
    batches = data.digits(seed)
    yes, no = torch.ones(64, 1), torch.zeros(64, 1)

    def step(_number: int) -> float:
        images, _ = next(batches)
        drawn = draws(torch.randn(64, 16, generator=generator))
        judge_optimizer.zero_grad()
        verdict = F.binary_cross_entropy_with_logits(judges(images), yes)
        verdict = verdict + F.binary_cross_entropy_with_logits(judges(drawn.detach()), no)
        verdict.backward()
        judge_optimizer.step()
        draw_optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(judges(drawn), yes)
        loss.backward()
        draw_optimizer.step()
        with torch.no_grad():  # what the images look like: distance of the mean images
            return float((images.mean(0) - drawn.mean(0)).square().mean())

    return Training([draws, judges], step)


def warm_restarts(seed: int) -> Training:
    """Trained to a tiny loss, then thrown back to a high learning rate, three times."""
    seeded(seed)
    images, labels = data.all_digits()
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=120)
    return plain(model, optimizer, data.endless(images[:512], labels[:512], 64, seed), scheduler=scheduler)


def warm_up(seed: int) -> Training:
    """The learning rate starts at 0: nothing moves at first."""
    seeded(seed)
    model = LanguageModel(blocks=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 80))
    return plain(model, optimizer, data.text(seed), loss_of=token_loss, scheduler=scheduler)


class Checkpointed(nn.Module):
    """Layers that forget their activations and compute them again."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(perceptron(64, 64, 64) for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, stream: Tensor) -> Tensor:
        for part in self.parts:
            stream = checkpoint(part, stream, use_reentrant=False)
            stream = F.relu(stream)
        out: Tensor = self.head(stream)
        return out


def checkpointing(seed: int) -> Training:
    seeded(seed)
    model = Checkpointed()
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed))


def bf16(seed: int) -> Training:
    seeded(seed)
    model = Convolutional()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return plain(model, optimizer, data.digits(seed), context=lambda: torch.autocast("cpu", torch.bfloat16))


def pre_norm_transformer(seed: int) -> Training:
    seeded(seed)
    model = LanguageModel(blocks=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return plain(model, optimizer, data.text(seed), loss_of=token_loss, clip=1.0)


def post_norm_transformer(seed: int) -> Training:
    seeded(seed)
    model = LanguageModel(blocks=4, post=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    return plain(model, optimizer, data.text(seed), loss_of=token_loss, scheduler=scheduler)


def clip_adaptively(model: nn.Module, limit: float) -> None:
    """Clip each unit's gradient to a multiple of its weight (Brock et al. 2021), all but the head's."""
    for name, parameter in model.named_parameters():
        if parameter.grad is None or name.startswith("head.weight"):
            continue
        rows = parameter.detach().reshape(len(parameter), -1) if parameter.ndim > 1 else parameter.detach()[None]
        gradient = parameter.grad.reshape(rows.shape)
        most = limit * rows.norm(dim=1, keepdim=True).clamp_min(1e-3)
        gradient.mul_((most / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))


def normalizer_free(seed: int) -> Training:
    seeded(seed)
    model = Convolutional(norm=False, blocks=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return plain(model, optimizer, data.digits(seed), before_step=lambda _step: clip_adaptively(model, 0.08))


class TwoHeads(nn.Module):
    """One trunk, two heads that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 2)])
        self.turn = 0

    def forward(self, images: Tensor) -> Tensor:
        self.turn = 1 - self.turn
        out: Tensor = self.heads[self.turn](self.trunk(images))
        return out


def two_heads(seed: int) -> Training:
    seeded(seed)
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels if logits.shape[1] == 10 else labels % 2)

    return plain(model, optimizer, data.digits(seed), loss_of=loss_of)


def evaluation(seed: int) -> Training:
    seeded(seed)
    images, labels = data.all_digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def evaluate(step: int) -> None:
        if step % 20 == 0:
            model.eval()
            with torch.no_grad():
                F.cross_entropy(model(images[1500:]), labels[1500:])
            model.train()

    return plain(model, optimizer, data.digits(seed), before_step=evaluate)


def batch_of_one(seed: int) -> Training:
    seeded(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    return plain(model, optimizer, data.digits(seed, 1))


def weight_decay_only(seed: int) -> Training:
    """Every tenth step has a loss without a gradient: only the weight decay acts."""
    seeded(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, (labels if step % 10 else torch.full_like(labels, -100))

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum") / len(labels)

    return plain(model, optimizer, data.digits(seed), prepare=prepare, loss_of=loss_of)


def resumed(seed: int) -> Training:
    """Watched only from a checkpoint on: the loss is low and the weights are large from the first sample."""
    seeded(seed)
    model = Convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    training = plain(model, optimizer, data.digits(seed))
    for step in range(120):
        training.step(step)
    state, optimizer_state = model.state_dict(), optimizer.state_dict()
    again = Convolutional()
    again.load_state_dict(state)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(optimizer_state)
    return plain(again, optimizer, data.digits(seed + 5))


def deep_tanh(seed: int) -> Training:
    seeded(seed)
    model = scale_weights(perceptron(64, *[48] * 15, 10, activation=nn.Tanh), 1.0)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


def shallow_sigmoid(seed: int) -> Training:
    """Three sigmoid layers: the gradient fades by two decades, and Adam learns all the same."""
    seeded(seed)
    model = perceptron(64, 64, 64, 64, 10, activation=nn.Sigmoid)
    return plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), data.digits(seed))


def raw_regression(seed: int) -> Training:
    """Targets of 25 to 346 with squared error: losses and gradients in the thousands are usual here."""
    seeded(seed)
    inputs, targets = data.table("diabetes")
    batches = data.endless(data.standardised(inputs), targets.float().unsqueeze(1), 64, seed)
    model = perceptron(10, 64, 64, 1)
    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), batches, loss_of=F.mse_loss)


class Variational(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = perceptron(64, 64, 16)
        self.decoder = perceptron(8, 64, 64)

    def forward(self, images: Tensor) -> Tensor:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum() / 2
        loss: Tensor = F.binary_cross_entropy_with_logits(self.decoder(code), images, reduction="sum") + divergence
        return loss


def variational(seed: int) -> Training:
    """A loss summed over batch and pixels: thousands, and gradients to match."""
    seeded(seed)
    model = Variational()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return plain(model, optimizer, data.digits(seed), loss_of=lambda loss, _labels: loss)


def sgd_batch_norm(seed: int) -> Training:
    """A high learning rate that batch norm tolerates; biases before the norm have a gradient of rounding errors."""
    seeded(seed)
    layers: list[nn.Module] = []
    for width in (64, 64, 64, 64):
        layers += [nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), data.digits(seed))


class Experts(nn.Module):
    """Eight experts, of which each image takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 48)
        self.gate = nn.Linear(48, 8)
        self.experts = nn.ModuleList(nn.Linear(48, 48) for _ in range(8))
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = F.relu(self.stem(images))
        logits = self.gate(stream)
        weights, chosen = (logits + 4.0 * torch.randn_like(logits)).softmax(1).max(1)
        mixed = torch.stack([expert(stream) for expert in self.experts], 1)[torch.arange(len(stream)), chosen]
        out: Tensor = self.head(stream + F.relu(mixed) * weights[:, None])
        return out


def experts(seed: int) -> Training:
    """Small batches, so that most experts are left out of many steps: exact zeros that come and go."""
    seeded(seed)
    model = Experts()
    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed, 8))


def hinge(seed: int) -> Training:
    """A margin loss that is exactly 0, gradient included, for whole batches once the margins are met."""
    seeded(seed)
    images, labels = data.all_digits()
    model = perceptron(64, 64, 10)
    batches = data.endless(images[:256], labels[:256], 16, seed)
    return plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), batches, loss_of=F.multi_margin_loss)


def wasserstein(seed: int) -> Training:
    """A critic that steps five times for each step of its generator; the losses pass through zero."""
    generator = seeded(seed)
    draws = Generator(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    judges = Discriminator(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    draw_optimizer = torch.optim.RMSprop(draws.parameters(), lr=1e-3)
    judge_optimizer = torch.optim.RMSprop(judges.parameters(), lr=5e-4)
    batches = data.digits(seed)

    def step(number: int) -> float:
        images, _ = next(batches)
        drawn = draws(torch.randn(64, 8, generator=generator))
        judge_optimizer.zero_grad()
        (judges(drawn.detach()).mean() - judges(images).mean()).backward()
        judge_optimizer.step()
        with torch.no_grad():
            for parameter in judges.parameters():
                parameter.clamp_(-0.1, 0.1)
        if number % 5 == 0:
            draw_optimizer.zero_grad()
            (-judges(drawn).mean()).backward()
            draw_optimizer.step()
        with torch.no_grad():
            return float((images.mean(0) - drawn.mean(0)).square().mean())

    return Training([draws, judges], step)


def rate_jump_survived(seed: int) -> Training:
    """The learning rate is tripled midway; the loss jumps, comes down again and goes on falling."""
    seeded(seed)
    model = Convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def change(step: int) -> None:
        set_rate(optimizer, 0.06 if step > 120 else 0.02)

    return plain(model, optimizer, data.digits(seed), before_step=change)


def logistic(seed: int) -> Training:
    seeded(seed)
    inputs, targets = data.table("breast_cancer")
    batches = data.endless(data.standardised(inputs), targets.float().unsqueeze(1), 32, seed)
    model = nn.Sequential(nn.Linear(30, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return plain(model, optimizer, batches, loss_of=F.binary_cross_entropy_with_logits)


def gru_without_clipping(seed: int) -> Training:
    seeded(seed)
    model = Recurrent("gru")
    return plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), data.text(seed), loss_of=token_loss)


def cycles(seed: int) -> Iterator[float]:
    """Yield a triangular learning rate between 0.001 and 0.3."""
    for step in itertools.count(seed):
        yield 0.001 + 0.299 * (1 - math.cos(step / 30)) / 2


def cyclic_rate(seed: int) -> Training:
    seeded(seed)
    model = Convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, nesterov=True)
    rates = cycles(0)
    return plain(model, optimizer, data.digits(seed), before_step=lambda _step: set_rate(optimizer, next(rates)))


def _add(name: str, build: object, steps: int, reaches: float, trap: str) -> None:
    assert callable(build)
    CASES.append(Case(name=name, build=build, steps=steps, reaches=reaches, trap=trap))


_add("converged", converged, 500, 0.001, "loss near 0, gradients tiny everywhere")
_add("converged-to-a-floor", converged_to_a_floor, 500, 0.5, "full batch: tiny gradients at a loss far above 0")
_add("rezero", rezero, 250, 0.3, "branches start at exactly zero")
_add("layer-scale", layer_scale, 250, 0.5, "branches have a hundred-thousandth of the stem's gradient")
_add("zero-gamma", zero_gamma, 200, 0.3, "norm gains and all biases start at zero")
_add("zero-head", zero_head, 250, 0.9, "no gradient behind a head that starts at zero")
_add("lora", lora, 300, 1.0, "matrices that start at zero; most parameters frozen")
_add("frozen-backbone", frozen_backbone, 250, 1.0, "most parameters never have a gradient")
_add("fine-tuning", fine_tuning, 200, 0.05, "tiny rate: neither loss nor weights move")
_add("grad-scaler", grad_scaler, 250, 0.3, "the first steps overflow and are skipped")
_add("accumulation", accumulation, 200, 0.4, "four backward passes a step")
_add("tied", tied, 200, 2.9, "one matrix is embedding and head")
_add("sparse-embedding", sparse_embedding, 300, 2.7, "nearly all rows have a zero gradient")
_add("noisy-labels", noisy_labels, 300, 1.7, "loss spikes; clipping active")
_add("lstm", lstm, 200, 2.8, "gradients through time, clipped")
_add("gan", gan, 600, 0.06, "losses without meaning; two optimizers")
_add("warm-restarts", warm_restarts, 380, 0.3, "loss and gradients jump by decades at each restart")
_add("warm-up", warm_up, 250, 2.8, "nothing moves at first")
_add("checkpointing", checkpointing, 250, 0.6, "two forward passes a step")
_add("bf16", bf16, 200, 0.3, "coarse gradients")
_add("pre-norm-transformer", pre_norm_transformer, 200, 2.8, "key biases have a gradient of rounding errors")
_add("post-norm-transformer", post_norm_transformer, 250, 2.9, "gradients fall towards the input")
_add("normalizer-free-agc", normalizer_free, 250, 0.5, "gradients clipped at nearly every step")
_add("two-heads", two_heads, 250, 0.5, "each head misses every other step")
_add("evaluation", evaluation, 200, 0.4, "forward passes that no step follows")
_add("batch-of-one", batch_of_one, 900, 1.5, "norms vary by decades; half of the units are zero at any step")
_add("weight-decay-only", weight_decay_only, 250, 0.3, "every tenth gradient is exactly zero")
_add("resumed", resumed, 150, 0.2, "no history of the early steps")
_add("deep-tanh", deep_tanh, 250, 0.5, "16 layers")
_add("shallow-sigmoid", shallow_sigmoid, 300, 0.6, "gradients fade by decades, and it learns")
_add("raw-regression", raw_regression, 300, 6000.0, "losses and gradients in the thousands")
_add("variational", variational, 250, 2200.0, "sums instead of means")
_add("sgd-batch-norm", sgd_batch_norm, 250, 0.3, "biases that do nothing")
_add("experts", experts, 300, 0.6, "exact zeros that come and go")
_add("hinge", hinge, 400, 0.02, "gradients of exactly 0 once it is learned")
_add("wasserstein", wasserstein, 500, 0.03, "loss around 0; one network steps at every fifth step")
_add("rate-jump-survived", rate_jump_survived, 250, 0.2, "a spike that recovers")
_add("logistic", logistic, 250, 0.15, "a single layer")
_add("gru", gru_without_clipping, 200, 2.8, "gradients through time, not clipped")
_add("cyclic-rate", cyclic_rate, 300, 0.3, "a rate that goes up and down")
