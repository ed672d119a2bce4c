"""Sick programs of the same kinds, each with one planted fault; called with the repair, each is its own twin."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import LanguageModel, perceptron, scale_weights, token_loss
from benchmarks.zoo.programs.catalogue import Catalogue
from benchmarks.zoo.programs.generative import Draws, Judges, Quantised, Timed
from benchmarks.zoo.programs.late import train_by_muon
from benchmarks.zoo.programs.parameters import Flow, Highway, Mixture
from benchmarks.zoo.third import Lion
from benchmarks.zoo.training import plain, set_rate

CASES = Catalogue()


def _adam(model: nn.Module, seed: int, rate: float = 2e-3) -> Training:
    return plain(model, torch.optim.Adam(model.parameters(), lr=rate), data.digits(seed))


@CASES.sick("vanishing", 250, 1.2, "the state decays at a rate of 10: four matrices", {"decay": 0.0})
def decaying_flow(seed: int, decay: float = 9.5) -> Training:
    torch.manual_seed(seed)
    return _adam(Flow(decay), seed)


@CASES.sick("vanishing", 250, 1.5, "three matrices of 0.0003 under plain SGD: nothing gets through", {"gain": 1.4})
def three_tiny_matrices(seed: int, gain: float = 0.002) -> Training:
    torch.manual_seed(seed)
    model = scale_weights(perceptron(64, 64, 64, 10, activation=nn.Tanh), gain)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1), data.digits(seed))


@CASES.sick("vanishing", 250, 0.8, "four matrices whose tanh units are driven flat by inputs of 500", {"scale": 1.0})
def four_flat_layers(seed: int, scale: float = 500.0) -> Training:
    torch.manual_seed(seed)
    model = scale_weights(perceptron(64, 64, 64, 64, 10, activation=nn.Tanh), 1.2)
    with torch.no_grad():
        for layer in (0, 2, 4):
            model[layer].weight.mul_(scale)  # type: ignore[index]
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), data.digits(seed))


@CASES.sick("vanishing", 250, 1.2, "a highway whose carry was forgotten: two chains side by side", {"carried": 1.0},
            blame=("enter.*", "made.?.*", "gates.?.*"))  # fmt: skip
def highway_without_carry(seed: int, carried: float = 0.0) -> Training:
    torch.manual_seed(seed)
    return _adam(Highway(10, -2.0, carried), seed)


@CASES.sick("vanishing", 300, 1.2, "decay of the weights a thousand times too strong: chance, and all gradients fade",
            {"decay": 1e-4}, also=("dead",))  # fmt: skip
def decayed_to_chance(seed: int, decay: float = 40.0) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 64, 10)
    with torch.no_grad():
        model[-1].weight.mul_(30)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=decay)
    return plain(model, optimizer, data.digits(seed))


@CASES.sick("vanishing", 300, 0.9, "the generator's loss is flat where the judge is sure, and the judge is far ahead",
            {"flat": False}, also=("dead",), blame=("Draws.*", "0.*"))  # fmt: skip
def generator_starved(seed: int, flat: bool = True) -> Training:
    torch.manual_seed(seed)
    draws, judges = Draws(*perceptron(8, 48, 48, 2)), Judges(*perceptron(2, 48, 48, 1))
    with torch.no_grad():
        draws[-1].bias.add_(4.0)  # type: ignore[operator]
    draw = torch.optim.SGD(draws.parameters(), lr=0.02) if flat else torch.optim.Adam(draws.parameters(), lr=2e-3)
    judge = torch.optim.Adam(judges.parameters(), lr=1e-2 if flat else 2e-3)

    def step(_number: int) -> float:
        turn = torch.rand(64) * 2 * math.pi
        real, points = torch.stack([turn.cos(), turn.sin()], 1), draws(torch.randn(64, 8))
        judge.zero_grad()
        (F.softplus(-judges(real)) + F.softplus(judges(points.detach()))).mean().backward()
        judge.step()
        draw.zero_grad()
        score = judges(points)
        (-F.softplus(score) if flat else F.softplus(-score)).mean().backward()
        draw.step()
        return float((points.detach().norm(dim=1) - 1).abs().mean())

    return Training([draws, judges], step)


@CASES.sick("dead", 260, 0.35, "fifteen in sixteen units of a layer are pushed below zero midway", {"push": 0.0},
            onset=100, blame=("2.*", "0.*", "4.*"), also=("vanishing",))  # fmt: skip
def units_gone_midway(seed: int, push: float = 60.0) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10)
    inner = _adam(model, seed, 3e-3)

    def step(number: int) -> float:
        if number == 100 and push:
            with torch.no_grad():
                model[2].bias[:60] -= push  # type: ignore[operator,index]
                model[2].weight[60:] *= 0.01  # type: ignore[operator,index]
        return inner.step(number)

    return Training(model, step)


@CASES.sick("dead", 250, 1.0, "three of eight experts are never chosen", {"bias": 0.0}, proof="starved",
            blame=("experts.[567].*",))  # fmt: skip
def experts_never_chosen(seed: int, bias: float = 50.0) -> Training:
    torch.manual_seed(seed)
    model = Mixture(8, bias)
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed, 64)

    def step(_number: int) -> float:
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels) + 0.05 * model.penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.sick("dead", 200, 0.075, "the code passes no gradient on: the encoder gets only the pull", {"straight": True},
            proof="starved", blame=("encoder.*",))  # fmt: skip
def quantised_without_passage(seed: int, straight: bool = False) -> Training:
    torch.manual_seed(seed)
    model, batches = Quantised(32), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        images, _ = next(batches)
        drawn, pull = model(images, straight=straight)
        loss = F.mse_loss(drawn, images) + (pull if straight else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.sick("dead", 200, 0.3, "the generator's images are detached in its own step", {"cut": False}, proof="starved",
            blame=("Draws.*", "0.*"))  # fmt: skip
def generator_detached(seed: int, cut: bool = True) -> Training:
    torch.manual_seed(seed)
    draws, judges = Draws(*perceptron(8, 48, 48, 2)), Judges(*perceptron(2, 48, 48, 1))
    draw, judge = (torch.optim.Adam(each.parameters(), lr=1e-3) for each in (draws, judges))

    def step(_number: int) -> float:
        points = draws(torch.randn(64, 8))
        judge.zero_grad()
        (F.softplus(-judges(torch.randn(64, 2))) + F.softplus(judges(points.detach()))).mean().backward()
        judge.step()
        draw.zero_grad()
        F.softplus(-judges(points.detach() if cut else points)).mean().backward()
        draw.step()
        return float(points.detach().norm(dim=1).mean())

    return Training([draws, judges], step)


@CASES.sick("dead", 200, 0.3, "the policy's action is detached on its way to the value", {"cut": False},
            proof="starved", blame=("actor.*",))  # fmt: skip
def policy_detached(seed: int, cut: bool = True) -> Training:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"actor": perceptron(3, 48, 48, 1), "critic": perceptron(4, 48, 48, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        state = torch.rand(64, 3) * 2 - 1
        action = model["actor"](state)
        taken = action.detach() + 0.3 * torch.randn(64, 1)
        reward = -((taken - state[:, :1]) ** 2)
        value = model["critic"](torch.cat([state, action.detach() if cut else action], 1)).mean()
        loss = F.mse_loss(model["critic"](torch.cat([state, taken], 1)), reward) - 0.1 * value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float((action.detach() - state[:, :1]).square().mean())

    return Training(model, step)


@CASES.sick("dead", 200, 1.0, "an adapter's ReLU has a bias of -20: it never answers", {"bias": 0.0}, proof="starved",
            blame=("1.*",))  # fmt: skip
def adapter_never_answers(seed: int, bias: float = -20.0) -> Training:
    torch.manual_seed(seed)

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(64, 16), nn.Linear(16, 64, bias=False)
            nn.init.constant_(self.down.bias, bias)

        def forward(self, stream: Tensor) -> Tensor:
            out: Tensor = stream + self.up(F.relu(self.down(stream)))
            return out

    return _adam(nn.Sequential(nn.Linear(64, 64), Bottleneck(), nn.Linear(64, 10)), seed)


@CASES.sick("exploding", 200, 1.0, "a critic without any bound: its loss runs to minus infinity", {"bound": 1.0})
def critic_without_bound(seed: int, bound: float = 0.0) -> Training:
    torch.manual_seed(seed)
    model = perceptron(8, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3 if bound else 3e-2)

    def step(_number: int) -> float:
        low, high = model(torch.randn(64, 8) - 0.3), model(torch.randn(64, 8) + 0.3)
        loss = low.mean() - high.mean() + bound * (low.square().mean() + high.square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float((high - low).detach().abs().mean())  # a score without a scale means nothing

    return Training(model, step)


@CASES.sick("exploding", 200, 0.2, "a network of one input and one output at a rate a thousand times too high",
            {"rate": 3e-3}, also=("dead", "nonfinite"))  # fmt: skip
def scalar_rate(seed: int, rate: float = 5.0) -> Training:
    torch.manual_seed(seed)
    model = perceptron(1, 48, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def step(_number: int) -> float:
        inputs = torch.rand(64, 1) * 4 - 2
        loss = F.mse_loss(model(inputs), torch.sin(3 * inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.sick("exploding", 200, 1.0, "Muon at a rate two hundred times too high", {"rate": 0.005}, also=("dead",))
def muon_rate(seed: int, rate: float = 1.0) -> Training:
    torch.manual_seed(seed)
    return train_by_muon(perceptron(64, 64, 64, 64, 10), rate, data.digits(seed))


@CASES.sick("exploding", 160, 3.1, "Lion at a rate three hundred times too high", {"rate": 3e-4}, also=("dead",))
def lion_rate(seed: int, rate: float = 0.1) -> Training:
    torch.manual_seed(seed)
    model = LanguageModel(blocks=2)
    return plain(model, Lion(model.parameters(), lr=rate), data.text(seed), loss_of=token_loss)


@CASES.sick("exploding", 220, 1.0, "the loss is summed instead of averaged from step 100 on", {"summed": False},
            onset=100, also=("dead",))  # fmt: skip
def summed_midway(seed: int, summed: bool = True) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 64, 64, 64, 10), data.digits(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(number: int) -> float:
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        (loss * 64 if summed and number >= 100 else loss).backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.sick("exploding", 300, 5.0, "values feed on themselves: a discount above one", {"discount": 0.9})
def values_feed_on_themselves(seed: int, discount: float = 1.3) -> Training:
    torch.manual_seed(seed)
    model = perceptron(1, 48, 48, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)

    def step(_number: int) -> float:
        place, action = torch.rand(64, 1) * 2 - 1, torch.randint(0, 2, (64, 1))
        with torch.no_grad():
            best = model((place + (action * 2 - 1) * 0.2).clamp(-1, 1)).max(1).values
        value = model(place).gather(1, action)[:, 0]
        loss = F.mse_loss(value, 1 - place.abs()[:, 0] + discount * best)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.sick("exploding", 200, 0.9, "diffusion whose rate rises a thousandfold at step 80", {"factor": 1.0}, onset=81,
            also=("dead", "nonfinite"))  # fmt: skip
def diffusion_rate(seed: int, factor: float = 1000.0) -> Training:
    torch.manual_seed(seed)
    model, batches = Timed(), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(number: int) -> float:
        if number == 81:
            set_rate(optimizer, 1e-3 * factor)
        images = next(batches)[0] * 2 - 1
        kept, noise = torch.cos(torch.rand(64, 1) * 1.5), torch.randn(64, 64)
        loss = F.mse_loss(model(kept * images + (1 - kept**2).clamp_min(0).sqrt() * noise, kept), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.sick("exploding", 160, 2.05, "a residual stream of sixteen blocks, each doubling it", {"gain": 0.2},
            also=("nonfinite", "dead"))  # fmt: skip
def doubling_stream(seed: int, gain: float = 2.5) -> Training:
    torch.manual_seed(seed)

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 48)

        def forward(self, stream: Tensor) -> Tensor:
            return stream + gain * F.relu(self.layer(stream))

    model = nn.Sequential(nn.Linear(64, 48), *(Doubling() for _ in range(16)), nn.Linear(48, 10))
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.02), data.digits(seed))


@CASES.sick("nonfinite", 150, 1.0, "a time of zero: the noise is divided by nothing", {"least": 1e-2}, onset=60)
def diffusion_time_zero(seed: int, least: float = 0.0) -> Training:
    torch.manual_seed(seed)
    model, batches = Timed(), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(number: int) -> float:
        images, time = next(batches)[0] * 2 - 1, torch.rand(64, 1) * 0.9 + 0.1
        if number == 60:
            time[0] = 0.0
        time, noise = time.clamp_min(least), torch.randn(64, 64)
        seen = images + time * noise
        loss = F.mse_loss(model(seen, time), (seen - images) / time)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


class Masked(nn.Module):
    """A branch whose NaN is multiplied by a mask of zero, which does not remove it."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.leave = nn.Linear(64, 10)
        self.least, self.ill = least, False

    def forward(self, images: Tensor) -> Tensor:
        stream = F.relu(self.layers[0](images))
        stream = F.relu(self.layers[1](stream))
        inner = self.layers[2](stream)
        negative = -inner.abs() if self.ill else inner.abs()
        stream = stream + 0.1 * torch.log(negative.clamp_min(self.least) if self.least else negative)
        stream = F.relu(self.layers[3](stream))
        named: Tensor = self.leave(torch.where(torch.isfinite(stream), stream, 0.0) if self.ill else stream)
        return named


@CASES.sick("nonfinite", 150, 1.0, "the forward pass is mended after the NaN, so that the backward pass makes 0 x NaN",
            {"least": 1e-3}, onset=60, blame=("layers.[23].*",))  # fmt: skip
def mask_times_nan(seed: int, least: float = 0.0) -> Training:
    torch.manual_seed(seed)
    model = Masked(least)
    inner = _adam(model, seed)

    def step(number: int) -> float:
        model.ill = number == 60
        return inner.step(number)

    return Training(model, step)


@CASES.sick("nonfinite", 150, 0.8, "the distance between two equal images: its slope is infinite", {"guard": 1e-6},
            onset=50)  # fmt: skip
def distance_of_equals(seed: int, guard: float = 0.0) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 48, 16), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(number: int) -> float:
        images, labels = next(batches)
        first, second = images[:32], images[32:].clone()
        if number == 50:
            second[0] = first[0]
        distance = ((model(first) - model(second)).square().sum(1) + guard).sqrt()
        alike = (labels[:32] == labels[32:]).float()
        loss = (alike * distance + (1 - alike) * (1 - distance).clamp_min(0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.sick("nonfinite", 200, 1.0, "the ratio of a policy overflows after a stale log probability", {"bound": 10.0},
            onset=80, also=("exploding",))  # fmt: skip
def ratio_overflows(seed: int, bound: float = math.inf) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 64, 10), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(number: int) -> float:
        images, labels = next(batches)
        logs = model(images).log_softmax(1).gather(1, labels.unsqueeze(1))[:, 0]
        old = logs.detach() - (120.0 if number == 80 else 0.0)
        loss = -((logs - old).clamp_max(bound).exp()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return -float(logs.detach().mean())

    return Training(model, step)
