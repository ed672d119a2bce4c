"""Generative and self-supervised models: diffusion, flows, quantisation, adversaries, contrasts."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.programs.catalogue import Catalogue

CASES = Catalogue()


class Timed(nn.Module):
    """Images and a time to something of the images' shape."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64 + 16, width), nn.Linear(width, 64)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        nn.init.zeros_(self.leave.weight)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        waves = time * 2.0 ** torch.arange(8) * math.pi / 8
        stream = F.silu(self.enter(torch.cat([images, waves.sin(), waves.cos()], 1)))
        for layer in self.hidden:
            stream = stream + F.silu(layer(stream))
        out: Tensor = self.leave(stream)
        return out


@CASES.healthy(250, 0.75, "noise is predicted at every level; an averaged copy follows", "dead")
def diffusion_with_average(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = Timed(), data.digits(seed)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        images = next(batches)[0] * 2 - 1
        kept = torch.cos(torch.rand(64, 1) * math.pi / 2)
        noise = torch.randn_like(images)
        loss = F.mse_loss(model(kept * images + (1 - kept**2).clamp_min(0).sqrt() * noise, kept), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        return float(loss.detach())

    return Training(nn.ModuleDict({"model": model, "average": average}), step)


@CASES.healthy(250, 0.95, "a velocity is learned; its loss has a high floor")
def flow_matching(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = Timed(), data.digits(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        images = next(batches)[0] * 2 - 1
        noise, time = torch.randn_like(images), torch.rand(64, 1)
        loss = F.mse_loss(model(time * images + (1 - time) * noise, time), images - noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


class Quantised(nn.Module):
    """An autoencoder whose code is the nearest row of a table; rows that are never nearest never get a gradient."""

    def __init__(self, rows: int = 128) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(64, 64, 32), perceptron(32, 64, 64)
        self.codes = nn.Parameter(torch.randn(rows, 8) * 0.3)

    def forward(self, images: Tensor, *, straight: bool = True) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(images).view(len(images), 4, 8)
        nearest = self.codes[torch.cdist(hidden.detach().flatten(0, 1), self.codes.detach()).argmin(1)]
        nearest = nearest.view_as(hidden)
        pull = F.mse_loss(nearest, hidden.detach()) + 0.25 * F.mse_loss(hidden, nearest.detach())
        code = hidden + (nearest - hidden).detach() if straight else nearest
        return self.decoder(code.flatten(1)), pull


@CASES.healthy(300, 0.09, "most rows of the raw table are never chosen", "dead")
def vector_quantised(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = Quantised(), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        images, _ = next(batches)
        drawn, pull = model(images)
        loss = F.mse_loss(drawn, images) + pull
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(F.mse_loss(drawn, images).detach())

    return Training(model, step)


class Draws(nn.Sequential):
    """Noise to points."""


class Judges(nn.Sequential):
    """Points to a score."""


def _ring(count: int = 64) -> Tensor:
    turn = torch.rand(count) * 2 * math.pi
    return torch.stack([turn.cos(), turn.sin()], 1) + 0.05 * torch.randn(count, 2)


def _off_the_ring(points: Tensor) -> float:
    return float((points.detach().norm(dim=1) - 1).abs().mean())


@CASES.healthy(300, 0.6, "the bias of the last layer has no gradient by nature", "dead")
def adversary_spectral_norm(seed: int) -> Training:
    torch.manual_seed(seed)
    draws = Draws(*perceptron(8, 48, 48, 2))
    judges = Judges(
        spectral_norm(nn.Linear(2, 48)), nn.LeakyReLU(0.2), spectral_norm(nn.Linear(48, 48)), nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(48, 1)),
    )  # fmt: skip
    draw, judge = (torch.optim.Adam(each.parameters(), lr=2e-3, betas=(0.0, 0.9)) for each in (draws, judges))

    def step(_number: int) -> float:
        points = draws(torch.randn(64, 8))
        judge.zero_grad()
        (judges(points.detach()).mean() - judges(_ring()).mean()).backward()
        judge.step()
        draw.zero_grad()
        (-judges(points).mean()).backward()
        draw.step()
        return _off_the_ring(points)

    return Training([draws, judges], step)


@CASES.healthy(60, 0.6, "weights are clamped, and the judge is trained twenty times before each draw", "dead")
def adversary_clamped(seed: int) -> Training:
    torch.manual_seed(seed)
    draws, judges = Draws(*perceptron(8, 48, 48, 2)), Judges(*perceptron(2, 48, 48, 1))
    draw, judge = (torch.optim.RMSprop(each.parameters(), lr=2e-3) for each in (draws, judges))

    def step(number: int) -> float:
        for _ in range(20 if number <= 6 else 5):
            with torch.no_grad():
                for parameter in judges.parameters():
                    parameter.clamp_(-0.1, 0.1)
            judge.zero_grad()
            (judges(draws(torch.randn(64, 8)).detach()).mean() - judges(_ring()).mean()).backward()
            judge.step()
        points = draws(torch.randn(64, 8))
        draw.zero_grad()
        (-judges(points).mean()).backward()
        draw.step()
        return _off_the_ring(points)

    return Training([draws, judges], step)


@CASES.healthy(250, 0.5, "the judge starts with weights that are clamped from far larger ones", "exploding")
def adversary_relativistic(seed: int) -> Training:
    """Both losses hover about log 2 for as long as it runs."""
    torch.manual_seed(seed)
    draws, judges = Draws(*perceptron(8, 48, 48, 2)), Judges(*perceptron(2, 48, 48, 1))
    draw, judge = (torch.optim.Adam(each.parameters(), lr=1e-3, betas=(0.0, 0.9)) for each in (draws, judges))

    def step(_number: int) -> float:
        noise = torch.randn(64, 8)
        judge.zero_grad()
        F.softplus(judges(draws(noise).detach()) - judges(_ring())).mean().backward()
        judge.step()
        points = draws(noise)
        draw.zero_grad()
        F.softplus(judges(_ring()) - judges(points)).mean().backward()
        draw.step()
        return _off_the_ring(points)

    return Training([draws, judges], step)


class Coupling(nn.Module):
    """Half of the numbers scale and move the other half."""

    def __init__(self, width: int, *, swap: bool) -> None:
        super().__init__()
        self.net = perceptron(width // 2, 48, width)
        self.swap = swap
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        first, second = values.chunk(2, 1)
        first, second = (second, first) if self.swap else (first, second)
        scale, move = self.net(first).chunk(2, 1)
        scale = torch.tanh(scale)
        second = second * scale.exp() + move
        return torch.cat([second, first] if self.swap else [first, second], 1), scale.sum(1)


@CASES.healthy(250, -0.2, "the loss is a likelihood that passes through zero", "exploding")
def normalising_flow(seed: int) -> Training:
    torch.manual_seed(seed)
    layers = nn.ModuleList(Coupling(4, swap=bool(index % 2)) for index in range(4))
    optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
    flowers = data.standardised(data.table("iris")[0])
    batches = data.endless(flowers, flowers, 50, seed)

    def step(_number: int) -> float:
        values, total = next(batches)[0], torch.zeros(50)
        for layer in layers:
            values, volume = layer(values)
            total = total + volume
        loss = (0.5 * values.square().sum(1) - total).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(layers, step)


@CASES.healthy(300, 32.0, "the weight of the divergence ramps up: the loss rises by design", "exploding")
def divergence_annealed(seed: int) -> Training:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"encoder": perceptron(64, 64, 16), "decoder": perceptron(8, 64, 64)})
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed)

    def step(number: int) -> float:
        images, _ = next(batches)
        mean, log_variance = model["encoder"](images).chunk(2, 1)
        drawn = model["decoder"](mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
        divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1).mean()
        error = F.binary_cross_entropy_with_logits(drawn, images, reduction="none").sum(1).mean()
        loss = error + min(4.0, number / 50) * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(error.detach())

    return Training(model, step)


@CASES.healthy(300, 0.45, "the second stage of the decoder joins at step 80", "dead")
def progressive_growing(seed: int) -> Training:
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {"encoder": perceptron(64, 48, 16), "coarse": perceptron(16, 32, 16), "fine": perceptron(16, 64, 64)}
    )
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed)

    def step(number: int) -> float:
        images, _ = next(batches)
        small = F.avg_pool2d(images.view(-1, 1, 8, 8), 2).flatten(1)
        coarse = model["coarse"](model["encoder"](images))
        loss = F.mse_loss(coarse, small)
        if number > 80:
            loss = loss + F.mse_loss(model["fine"](coarse), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(F.mse_loss(model["fine"](coarse), images).detach())

    return Training(model, step)


@CASES.healthy(300, 0.8, "a difference of energies: its loss is about zero by construction", "exploding")
def energy_based(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(2, 64, 64, 1, activation=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    found = torch.randn(64, 2)

    def step(_number: int) -> float:
        nonlocal found
        for _ in range(5):
            found = found.detach().requires_grad_()
            slope = torch.autograd.grad(model(found).sum(), found)[0]
            found = found - 0.1 * slope + 0.05 * torch.randn_like(found)
        found = found.detach().clamp(-3, 3)
        low, high = model(_ring()), model(found)
        loss = (low - high).mean() + 0.1 * (low**2 + high**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return _off_the_ring(found)

    return Training(model, step)


def _views(images: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(images + 0.15 * torch.randn_like(images) for _ in range(2))  # type: ignore[return-value]


@CASES.healthy(250, 0.55, "two towers and a temperature that is learned")
def contrast_two_towers(seed: int) -> Training:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"left": perceptron(32, 64, 32), "right": perceptron(32, 64, 32)})
    temperature = nn.Parameter(torch.tensor(math.log(10.0)))
    model.register_parameter("temperature", temperature)
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=2e-3), data.digits(seed)

    def step(_number: int) -> float:
        images, _ = next(batches)
        left = F.normalize(model["left"](images[:, :32]), dim=1)
        right = F.normalize(model["right"](images[:, 32:]), dim=1)
        logits = left @ right.T * temperature.exp()
        target = torch.arange(64)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float((logits.argmax(1) != target).float().mean())

    return Training(model, step)


@CASES.healthy(250, -0.9, "negative by construction; the slow network is held by no optimizer", "dead")
def bootstrap_without_negatives(seed: int) -> Training:
    torch.manual_seed(seed)
    online, predictor = perceptron(64, 96, 32), perceptron(32, 48, 32)
    slow = copy.deepcopy(online)
    model = nn.ModuleDict({"online": online, "predictor": predictor, "slow": slow})
    optimizer = torch.optim.Adam([*online.parameters(), *predictor.parameters()], lr=2e-3)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        first, second = _views(next(batches)[0])
        with torch.no_grad():
            wanted = slow(second)
        loss = -F.cosine_similarity(predictor(online(first)), wanted, dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(slow.parameters(), online.parameters(), strict=True):
                kept.lerp_(new, 0.02)
        return float(loss.detach())

    return Training(model, step)


class Mixer(nn.Module):
    """Normalises what it embeds, so that redundancy can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 24))

    def forward(self, images: Tensor) -> Tensor:
        found = self.net(images)
        out: Tensor = (found - found.mean(0)) / (found.std(0) + 1e-4)
        return out


@CASES.healthy(250, 12.0, "a sum over pairs of features, and no labels", "exploding")
def redundancy_reduced(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = Mixer(), data.digits(seed, 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        first, second = _views(next(batches)[0])
        alike = model(first).T @ model(second) / 128
        off = alike - torch.diag(alike.diagonal())
        loss = ((1 - alike.diagonal()) ** 2).sum() + 0.05 * (off**2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


def _parts(model: nn.Module) -> Sequence[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@CASES.healthy(250, 0.9, "nine tenths of the pixels are masked; the mask's token is a parameter of its own")
def masked_images(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 96, 96, 64, activation=nn.GELU)
    token = nn.Parameter(torch.zeros(64))
    model.register_parameter("token", token)
    optimizer, batches = torch.optim.AdamW(_parts(model), lr=2e-3), data.digits(seed)
    images_mean = data.all_digits()[0].var(0).mean()

    def step(_number: int) -> float:
        images, _ = next(batches)
        masked = torch.rand_like(images) < 0.7
        error = (model(torch.where(masked, token, images)) - images).square()
        loss = error[masked].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach() / images_mean)

    return Training(model, step)
