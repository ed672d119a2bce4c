"""Cases that were written after the thresholds: other widths, depths, optimizers, losses and faults."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

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


def rmsprop(seed: int) -> Training:
    seeded(seed)
    model = perceptron(64, 200, 100, 50, 10, activation=nn.ELU)
    return plain(model, torch.optim.RMSprop(model.parameters(), lr=1e-3), data.digits(seed, 32))


def adagrad(seed: int) -> Training:
    seeded(seed)
    model = perceptron(64, 24, 10)
    return plain(model, torch.optim.Adagrad(model.parameters(), lr=0.05), data.digits(seed, 16))


def lbfgs(seed: int) -> Training:
    seeded(seed)
    inputs, targets = data.table("wine")
    inputs, labels = data.standardised(inputs), targets.long()
    model = perceptron(13, 16, 3, activation=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4)

    def step(_number: int) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss = loss + 1e-3 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return float(F.cross_entropy(model(inputs), labels))

    return Training(model, step)


class Hourglass(nn.Module):
    """A convolutional autoencoder with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down_1 = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.down_2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up_1 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.up_2 = nn.ConvTranspose2d(8, 1, 2, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        images = images.view(-1, 1, 8, 8)
        first = F.gelu(self.down_1(images))
        out: Tensor = self.up_2(F.gelu(self.up_1(F.gelu(self.down_2(first))) + first))
        return out.flatten(1)


def hourglass(seed: int) -> Training:
    seeded(seed)
    model = Hourglass()
    batches = ((images, images) for images, _ in data.digits(seed))
    return plain(model, torch.optim.NAdam(model.parameters(), lr=3e-3), batches, loss_of=F.mse_loss)


def deep_linear(seed: int) -> Training:
    """Leaves a saddle: the loss stands still for long while the gradient grows by decades."""
    seeded(seed)
    model = scale_weights(perceptron(64, 32, 32, 32, 10, activation=nn.Identity), 0.45)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


def token_sum(seed: int) -> Training:
    """The loss is summed over all bytes of the batch: hundreds of times the usual one."""
    seeded(seed)
    model = LanguageModel(blocks=2, width=48)

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return token_loss(logits, targets) * targets.numel()

    return plain(model, torch.optim.AdamW(model.parameters(), lr=2e-3), data.text(seed), loss_of=loss_of)


def negative_likelihood(seed: int) -> Training:
    """A Gaussian likelihood: the loss passes through zero and goes on falling."""
    seeded(seed)
    inputs, targets = data.table("diabetes")
    batches = data.endless(data.standardised(inputs), (targets.float().unsqueeze(1) - 150) / 770, 32, seed)
    model = perceptron(10, 32, 2)

    def loss_of(outputs: Tensor, wanted: Tensor) -> Tensor:
        return F.gaussian_nll_loss(outputs[:, :1], wanted, outputs[:, 1:].exp())

    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), batches, loss_of=loss_of)


def reinforce(seed: int) -> Training:
    """Policy gradient on a bandit of digits: the loss is around zero, of either sign, and means nothing."""
    generator = seeded(seed)
    model = perceptron(64, 64, 10, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        log_odds = model(images).log_softmax(1)
        action = torch.multinomial(log_odds.detach().exp(), 1, generator=generator)
        reward = (action[:, 0] == labels).float()
        optimizer.zero_grad()
        (-(reward - reward.mean()) * log_odds.gather(1, action)[:, 0]).mean().backward()
        optimizer.step()
        return 1.0 - float(reward.mean())

    return Training(model, step)


def new_task(seed: int) -> Training:
    """The labels are permuted midway: the loss jumps far above where it began, and comes down again."""
    seeded(seed)
    model = Convolutional()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, (order[labels] if step > 150 else labels)

    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed), prepare=prepare)


def unfreezing(seed: int) -> Training:
    """The body is frozen for the first half."""
    seeded(seed)
    model = perceptron(64, 64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)

    def before_step(step: int) -> None:
        if step == 100:
            model.requires_grad_(True)

    return plain(model, optimizer, data.digits(seed), before_step=before_step)


class Stochastic(nn.Module):
    """Residual blocks of which each is left out at half of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 48)
        self.blocks = nn.ModuleList(Branch(48, None) for _ in range(8))
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images)
        for block in self.blocks:
            if not self.training or torch.rand(()) < 0.5:
                stream = block(stream)
        out: Tensor = self.head(stream)
        return out


def stochastic_depth(seed: int) -> Training:
    seeded(seed)
    model = Stochastic()
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


def exact_fit(seed: int) -> Training:
    """Squared error to the last bit: the loss goes to 1e-12, gradients with it, noise on top."""
    seeded(seed)
    images, labels = data.all_digits()
    wanted = F.one_hot(labels[:32], 10).float()
    model = perceptron(64, 128, 128, 10, activation=nn.GELU)

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield images[:32], wanted

    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), forever(), loss_of=F.mse_loss)


def bf16_weights(seed: int) -> Training:
    seeded(seed)
    model = perceptron(64, 128, 128, 10).to(torch.bfloat16)
    batches = ((images.bfloat16(), labels) for images, labels in data.digits(seed))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batches)


def gradient_penalty(seed: int) -> Training:
    generator = seeded(seed)
    draws = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    judges = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    both = nn.ModuleDict({"draws": draws, "judges": judges})
    draw_optimizer = torch.optim.Adam(draws.parameters(), lr=1e-3, betas=(0.0, 0.9))
    judge_optimizer = torch.optim.Adam(judges.parameters(), lr=1e-3, betas=(0.0, 0.9))
    batches = data.digits(seed)

    def step(number: int) -> float:
        images, _ = next(batches)
        drawn = draws(torch.randn(64, 8, generator=generator))
        mixed = (images + torch.rand(64, 1, generator=generator) * (drawn.detach() - images)).requires_grad_(True)
        (slope,) = torch.autograd.grad(judges(mixed).sum(), mixed, create_graph=True)
        judge_optimizer.zero_grad()
        penalty = 10 * (slope.norm(dim=1) - 1).square().mean()
        (judges(drawn.detach()).mean() - judges(images).mean() + penalty).backward()
        judge_optimizer.step()
        if number % 3 == 0:
            draw_optimizer.zero_grad()
            (-judges(drawn).mean()).backward()
            draw_optimizer.step()
        with torch.no_grad():
            return float((images.mean(0) - drawn.mean(0)).square().mean())

    return Training(both, step)


def wide_rates(seed: int) -> Training:
    seeded(seed)
    model = perceptron(64, 400, 10, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return plain(model, optimizer, data.digits(seed, 128), scheduler=CosineAnnealingLR(optimizer, 200))


def contrastive(seed: int) -> Training:
    """Triplets whose margins are soon met: most gradients are exactly zero."""
    seeded(seed)
    model = perceptron(64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = data.digits(seed, 48)

    def step(_number: int) -> float:
        images, labels = next(batches)
        codes = F.normalize(model(images), dim=1)
        apart = (1 - codes @ codes.T).clamp_min(0)
        same = labels[:, None] == labels[None]
        hardest = (apart * same).amax(1) - (apart + 9 * same).amin(1) + 0.2
        loss = hardest.clamp_min(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


def rare_task(seed: int) -> Training:
    """A second head that is trained at every seventh step, with zeros kept in between."""
    seeded(seed)
    trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model = nn.ModuleDict({"trunk": trunk, "often": nn.Linear(64, 10), "rarely": nn.Linear(64, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = data.digits(seed)

    def step(number: int) -> float:
        images, labels = next(batches)
        optimizer.zero_grad(set_to_none=False)
        stream = model["trunk"](images)
        loss = F.cross_entropy(model["often"](stream), labels)
        if number % 7 == 0:
            loss = loss + F.cross_entropy(model["rarely"](stream), labels % 2)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


def tiny_norm_transformer(seed: int) -> Training:
    seeded(seed)
    model = LanguageModel(width=64, blocks=3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 40))
    return plain(model, optimizer, data.text(seed), loss_of=token_loss, scheduler=scheduler, clip=1.0)


def small_conv_plain(seed: int) -> Training:
    seeded(seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for index in range(6):
        layers += [nn.Conv2d(1 if index == 0 else 24, 24, 3, padding=1), nn.ReLU()]
    model = scale_weights(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 64, 10)), math.sqrt(2))
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-3), data.digits(seed))


# Sick ones


def deep_hardsigmoid(seed: int, activation: type[nn.Module] = nn.Hardsigmoid) -> Training:
    seeded(seed)
    model = perceptron(64, *[100] * 9, 10, activation=activation)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data.digits(seed))


def deep_plain_conv(seed: int, *, norm: bool = False) -> Training:
    seeded(seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for index in range(18):
        layers += [nn.Conv2d(1 if index == 0 else 12, 12, 3, padding=1), nn.ReLU()]
        layers += [nn.BatchNorm2d(12)] if norm else []
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), data.digits(seed))


def deep_tanh_default(seed: int, gain: float | None = None) -> Training:
    seeded(seed)
    model: nn.Module = perceptron(64, *[32] * 20, 10, activation=nn.Tanh)
    if gain is not None:
        scale_weights(model, gain)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), data.digits(seed))


def lora_stuck(seed: int, value: float = 0.0) -> Training:
    """Both matrices of each adapter start at zero: neither ever moves. The head does."""
    seeded(seed)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 64).requires_grad_(False)
            self.a = nn.Parameter(torch.randn(4, 64) * value)
            self.b = nn.Parameter(torch.zeros(64, 4))

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.base(inputs) + inputs @ self.a.T @ self.b.T
            return out

    model = nn.Sequential(Pair(), nn.ReLU(), Pair(), nn.ReLU(), nn.Linear(64, 10))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return plain(model, torch.optim.Adam(trained, lr=2e-3), data.digits(seed))


def frozen_encoder(seed: int, *, cut: bool = True) -> Training:
    """An encoder called under no_grad by accident, in an autoencoder."""
    seeded(seed)
    encoder, decoder = perceptron(64, 32, 8), perceptron(8, 32, 64)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, _ = next(batches)
        with torch.set_grad_enabled(not cut):
            code = encoder(images)
        optimizer.zero_grad()
        loss = F.mse_loss(decoder(code), images)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


def relu_kill(seed: int, rate: float = 60.0) -> Training:
    """Five steps at an enormous rate, then the old one again."""
    seeded(seed)
    model = perceptron(64, 48, 48, 48, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def change(step: int) -> None:
        set_rate(optimizer, rate if 90 <= step < 95 else 1e-3)

    return plain(model, optimizer, data.digits(seed), before_step=change)


def adam_rate(seed: int, rate: float = 0.5) -> Training:
    seeded(seed)
    model = perceptron(64, 64, 64, 64, 64, 10)
    return plain(model, torch.optim.Adam(model.parameters(), lr=rate), data.digits(seed))


def lstm_rate(seed: int, rate: float = 300.0) -> Training:
    seeded(seed)
    model = Recurrent("lstm")
    return plain(model, torch.optim.SGD(model.parameters(), lr=rate), data.text(seed), loss_of=token_loss)


def unscaled_inputs(seed: int, scale: float = 1000.0) -> Training:
    seeded(seed)
    model = perceptron(64, 64, 64, 10)

    def prepare(_step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images * scale, labels

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1), data.digits(seed), prepare=prepare)


def adam_jump(seed: int, factor: float = 1000.0) -> Training:
    seeded(seed)
    model = LanguageModel(blocks=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def change(step: int) -> None:
        set_rate(optimizer, 2e-3 * (factor if step > 100 else 1.0))

    return plain(model, optimizer, data.text(seed), loss_of=token_loss, before_step=change)


def tall_residual(seed: int, gain: float = 2.0) -> Training:
    """Forty residual blocks, each of which doubles the stream."""
    seeded(seed)
    model = nn.Sequential(nn.Linear(64, 32), *(Branch(32, None) for _ in range(40)), nn.Linear(32, 10))
    scale_weights(model, gain)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), data.digits(seed), clip=1.0)


def loss_weight(seed: int, rate: float = 0.05) -> Training:
    """The loss is multiplied by 10,000, and the learning rate knows nothing of it."""
    seeded(seed)
    model = Convolutional()

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return 1e4 * F.cross_entropy(logits, labels)

    return plain(model, torch.optim.SGD(model.parameters(), lr=rate), data.digits(seed), loss_of=loss_of)


def exponential(seed: int, *, guarded: bool = False) -> Training:
    """exp() of a growing logit in a hand-written softmax."""
    seeded(seed)
    model = perceptron(64, 64, 10)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits * 300
        if guarded:
            return F.cross_entropy(logits, labels)
        odds = logits.exp()
        return -(odds.gather(1, labels[:, None])[:, 0] / odds.sum(1)).log().mean()

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.01), data.digits(seed), loss_of=loss_of)


CASES = [
    Case(name="rmsprop", build=rmsprop, steps=200, reaches=0.5, trap="another optimizer"),
    Case(name="adagrad", build=adagrad, steps=250, reaches=0.9, trap="another optimizer"),
    Case(name="lbfgs", build=lbfgs, steps=60, reaches=0.5, trap="a closure that is evaluated many times a step"),
    Case(name="hourglass", build=hourglass, steps=200, reaches=0.05, trap="transposed convolutions and a skip"),
    Case(
        name="deep-linear",
        build=deep_linear,
        steps=300,
        reaches=1.0,
        trap="leaves a saddle: the gradient grows by decades",
    ),
    Case(name="token-sum", build=token_sum, steps=200, reaches=1700.0, trap="a sum over all bytes of the batch"),
    Case(
        name="negative-likelihood",
        build=negative_likelihood,
        steps=300,
        reaches=-1.0,
        trap="the loss passes through zero",
    ),
    Case(name="reinforce", build=reinforce, steps=400, reaches=0.75, trap="a loss around zero that means nothing"),
    Case(
        name="new-task",
        build=new_task,
        steps=300,
        reaches=0.5,
        trap="labels permuted midway: the loss jumps above its beginning",
    ),
    Case(name="unfreezing", build=unfreezing, steps=250, reaches=0.5, trap="the body has no gradient for 100 steps"),
    Case(
        name="stochastic-depth",
        build=stochastic_depth,
        steps=300,
        reaches=0.6,
        trap="each block misses every other step",
    ),
    Case(name="exact-fit", build=exact_fit, steps=600, reaches=0.0001, trap="squared error to the last bit"),
    Case(name="bf16-weights", build=bf16_weights, steps=250, reaches=0.6, trap="weights of 8 bits"),
    Case(
        name="gradient-penalty",
        build=gradient_penalty,
        steps=400,
        reaches=0.06,
        trap="second derivatives; two networks",
    ),
    Case(name="wide-rates", build=wide_rates, steps=250, reaches=0.3, trap="a learning rate of 1"),
    Case(name="contrastive", build=contrastive, steps=300, reaches=0.2, trap="most gradients exactly zero"),
    Case(
        name="rare-task", build=rare_task, steps=300, reaches=1.5, trap="a head that is trained at every seventh step"
    ),
    Case(
        name="small-init-transformer",
        build=tiny_norm_transformer,
        steps=250,
        reaches=2.8,
        trap="weights of 0.02, as GPT-2's",
    ),
    Case(name="plain-conv", build=small_conv_plain, steps=200, reaches=0.6, trap="neither norm nor skip"),
    Case(
        name="deep-hardsigmoid",
        build=deep_hardsigmoid,
        twin=lambda seed: deep_hardsigmoid(seed, nn.Tanh),
        rule="vanishing",
        steps=250,
        reaches=1.5,
        onset=1,
        blame=("0.*", "2.*", "4.*"),
        proof="loss",
    ),
    Case(
        name="deep-plain-conv",
        build=deep_plain_conv,
        twin=lambda seed: deep_plain_conv(seed, norm=True),
        rule="vanishing",
        steps=200,
        reaches=1.8,
        onset=1,
        blame=("[0-9].*", "1[0-9].*"),
        proof="loss",
    ),
    Case(
        name="deep-tanh-default",
        build=deep_tanh_default,
        twin=lambda seed: deep_tanh_default(seed, 1.1),
        rule="vanishing",
        steps=400,
        reaches=1.6,
        onset=1,
        blame=("?.*", "1?.*", "2?.*"),
        proof="loss",
    ),
    Case(
        name="lora-stuck",
        build=lora_stuck,
        twin=lambda seed: lora_stuck(seed, 0.1),
        rule="dead",
        steps=150,
        reaches=1.0,
        onset=1,
        blame=("*.a", "*.b"),
        proof="starved",
    ),
    Case(
        name="frozen-encoder",
        build=frozen_encoder,
        twin=lambda seed: frozen_encoder(seed, cut=False),
        rule="dead",
        steps=150,
        reaches=1.0,
        onset=1,
        blame=("encoder.*",),
        proof="starved",
    ),
    Case(
        name="relu-kill",
        build=relu_kill,
        twin=lambda seed: relu_kill(seed, 1e-3),
        rule="dead",
        steps=200,
        reaches=1.0,
        onset=91,
        blame=("*",),
        proof="loss",
    ),
    Case(
        name="adam-rate",
        build=adam_rate,
        twin=lambda seed: adam_rate(seed, 1e-3),
        rule="exploding",
        steps=150,
        reaches=1.0,
        onset=1,
        blame=("*",),
        proof="loss",
    ),
    Case(
        name="lstm-rate",
        build=lstm_rate,
        twin=lambda seed: lstm_rate(seed, 1.0),
        rule="exploding",
        steps=150,
        reaches=2.9,
        onset=1,
        blame=("*",),
        proof="loss",
    ),
    Case(
        name="unscaled-inputs",
        build=unscaled_inputs,
        twin=lambda seed: unscaled_inputs(seed, 1.0),
        rule="exploding",
        steps=150,
        reaches=1.6,
        onset=1,
        blame=("*",),
        proof="loss",
    ),
    Case(
        name="adam-jump",
        build=adam_jump,
        twin=lambda seed: adam_jump(seed, 1.0),
        rule="exploding",
        steps=180,
        reaches=2.8,
        onset=102,
        blame=("*",),
        proof="loss",
    ),
    Case(
        name="tall-residual",
        build=tall_residual,
        twin=lambda seed: tall_residual(seed, 0.5),
        rule="exploding",
        steps=200,
        reaches=2.2,
        onset=1,
        blame=("*",),
        proof="loss",
    ),
    Case(
        name="loss-weight",
        build=loss_weight,
        twin=lambda seed: loss_weight(seed, 2e-5),
        rule="exploding",
        steps=150,
        reaches=8000.0,
        onset=1,
        blame=("*",),
        proof="loss",
    ),
    Case(
        name="exponential",
        build=exponential,
        twin=lambda seed: exponential(seed, guarded=True),
        rule="nonfinite",
        steps=150,
        reaches=1000.0,
        onset=1,
        blame=("*",),
        proof="loss",
    ),
]
