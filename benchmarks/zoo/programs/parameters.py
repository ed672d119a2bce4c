"""Parameters of unusual size or use: tiny initial weights, adapters, raw tables, scalars, networks of few matrices."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.programs.catalogue import Catalogue
from benchmarks.zoo.training import plain

CASES = Catalogue()


def _tiny(seed: int, deviation: float, rate: float, *widths: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(*widths)
    for part in model:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=deviation)
            nn.init.zeros_(part.bias)
    return plain(model, torch.optim.Adam(model.parameters(), lr=rate), data.digits(seed))


@CASES.healthy(250, 0.7, "weights of 0.001 grow a hundredfold, as they should", "exploding")
def tiny_weights(seed: int) -> Training:
    return _tiny(seed, 0.001, 2e-3, 64, 64, 10)


@CASES.healthy(250, 0.9, "three matrices of 0.001", "exploding")
def tiny_weights_deeper(seed: int) -> Training:
    return _tiny(seed, 0.001, 2e-3, 64, 64, 64, 10)


@CASES.healthy(200, 0.5, "weights of 0.01 and a rate of 0.01", "exploding")
def small_weights_fast(seed: int) -> Training:
    return _tiny(seed, 0.01, 1e-2, 64, 64, 10)


class Adapter(nn.Module):
    """Adds next to nothing to a frozen layer at first."""

    def __init__(self, width: int, deviation: float) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 8), nn.Linear(8, width)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, stream: Tensor) -> Tensor:
        hidden = F.relu(self.base(stream))
        out: Tensor = hidden + self.up(F.gelu(self.down(hidden)))
        return out


def _adapted(seed: int, deviation: float, rate: float) -> Training:
    torch.manual_seed(seed)
    model = nn.Sequential(Adapter(64, deviation), Adapter(64, deviation), Adapter(64, deviation), nn.Linear(64, 10))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return plain(model, torch.optim.AdamW(trained, lr=rate), data.digits(seed))


@CASES.healthy(300, 1.2, "adapters near the identity grow a hundredfold", "exploding")
def adapters_near_identity(seed: int) -> Training:
    return _adapted(seed, 1e-3, 3e-3)


@CASES.healthy(300, 1.3, "adapters of 1e-4 get no gradient to speak of at first", "vanishing")
def adapters_tiny(seed: int) -> Training:
    return _adapted(seed, 1e-4, 3e-3)


class Tokens(nn.Module):
    """Predicts a byte from the three before it."""

    def __init__(self, deviation: float, *, raw: bool) -> None:
        super().__init__()
        table = torch.randn(128, 24) * deviation
        self.raw = nn.Parameter(table) if raw else None
        self.table = None if raw else nn.Embedding.from_pretrained(table, freeze=False)
        self.head = perceptron(72, 64, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        last = tokens[:, -3:].clamp_max(127)
        rows = self.raw[last] if self.table is None and self.raw is not None else self.table(last)  # type: ignore[misc]
        out: Tensor = self.head(rows.flatten(1))
        return out


def _tokens(seed: int, deviation: float, rate: float, *, raw: bool) -> Training:
    torch.manual_seed(seed)
    model = Tokens(deviation, raw=raw)
    batches = ((tokens, targets[:, -1].clamp_max(127)) for tokens, targets in data.text(seed, 64, 3))
    return plain(model, torch.optim.Adam(model.parameters(), lr=rate), batches)


@CASES.healthy(250, 3.0, "an embedding that starts at 1e-4", "exploding")
def tiny_embedding(seed: int) -> Training:
    return _tokens(seed, 1e-4, 3e-3, raw=False)


@CASES.healthy(250, 3.0, "a raw table, most of whose rows are rare", "dead")
def raw_table(seed: int) -> Training:
    return _tokens(seed, 0.5, 3e-3, raw=True)


class HashGrid(nn.Module):
    """Points to colours: tables of features at four sizes, most of whose rows no point of a batch meets."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(torch.rand(2048, 2) * 2e-4 - 1e-4 for _ in range(4))
        self.head = perceptron(8, 32, 1)

    def forward(self, points: Tensor) -> Tensor:
        found = []
        for level, table in enumerate(self.tables):
            size = 8 * 2**level
            corner = (points * size).floor().long()
            weight = points * size - corner
            total = torch.zeros(len(points), 2)
            for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
                place = ((corner[:, 0] + x) * 73 ^ (corner[:, 1] + y) * 2_654_435) % len(table)
                share = (weight[:, :1] if x else 1 - weight[:, :1]) * (weight[:, 1:] if y else 1 - weight[:, 1:])
                total = total + share * table[place]
            found.append(total)
        out: Tensor = self.head(torch.cat(found, 1))
        return out


@CASES.healthy(300, 0.06, "raw tables that start at 1e-4 and grow a thousandfold; rows that are never met", "exploding")
def hash_grid(seed: int) -> Training:
    torch.manual_seed(seed)
    model = HashGrid()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-15)

    def step(_number: int) -> float:
        points = torch.rand(128, 2)
        wanted = (torch.sin(9 * points[:, :1]) * torch.cos(7 * points[:, 1:])) * 0.7
        loss = F.mse_loss(model(points), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(400, 0.05, "one number to one number: matrices with one input or one output")
def scalar_to_scalar(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(1, 48, 48, 1, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def step(_number: int) -> float:
        inputs = torch.rand(64, 1) * 4 - 2
        loss = F.mse_loss(model(inputs), torch.sin(3 * inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(400, 0.1, "derivatives of the network are in its loss; two terms of very different size", "exploding")
def differential_equation(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(1, 32, 32, 1, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def step(_number: int) -> float:
        time = (torch.rand(64, 1) * 2).requires_grad_()
        value = model(time)
        slope = torch.autograd.grad(value.sum(), time, create_graph=True)[0]
        start = (model(torch.zeros(1, 1)) - 1).square().sum()
        loss = (slope + 2 * value).square().mean() + 20 * start
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            return float((value - (-2 * time).exp()).square().mean())

    return Training(model, step)


class Sine(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.sin(values)


@CASES.healthy(300, 0.1, "sines at a frequency of 30: large first weights by design", "exploding")
def sine_network(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(2, 64, 64, 1, activation=Sine)
    with torch.no_grad():
        model[0].weight.mul_(20)  # type: ignore[operator]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(_number: int) -> float:
        points = torch.rand(128, 2) * 2 - 1
        wanted = torch.sin(6 * points[:, :1]) * torch.sin(5 * points[:, 1:])
        loss = F.mse_loss(model(points), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


class Flow(nn.Module):
    """A state that follows a learned differential equation."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64, 24), nn.Linear(24, 10)
        self.field = perceptron(24, 32, 24, activation=nn.Tanh)
        self.decay = decay

    def forward(self, images: Tensor) -> Tensor:
        state = self.enter(images)
        for _ in range(20):
            state = state + 0.1 * (self.field(state) - self.decay * state)
        out: Tensor = self.leave(state)
        return out


@CASES.healthy(200, 0.7, "one small network is used twenty times in a row")
def differential_flow(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Flow(0.0)
    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed))


class Highway(nn.Module):
    """Layers that choose between what they make and what they were given; bias of the choice, weight of the rest."""

    def __init__(self, layers: int, bias: float, carried: float) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64, 32), nn.Linear(32, 10)
        self.made = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.carried = carried
        for gate in self.gates:
            assert isinstance(gate, nn.Linear)
            nn.init.constant_(gate.bias, bias)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.enter(images)
        for made, gate in zip(self.made, self.gates, strict=True):
            share = torch.sigmoid(gate(stream))
            stream = share * torch.tanh(made(stream)) + self.carried * (1 - share) * stream
        out: Tensor = self.leave(stream)
        return out


@CASES.healthy(200, 0.7, "eight layers that pass on nine tenths at first")
def highway(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Highway(8, -2.0, 1.0)
    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed))


class Mixture(nn.Module):
    """Each input goes to one expert; an expert may get none of a batch. A penalty keeps them all busy."""

    def __init__(self, experts: int, bias: float = 0.0) -> None:
        super().__init__()
        self.enter, self.router, self.leave = nn.Linear(64, 32), nn.Linear(32, experts), nn.Linear(32, 10)
        self.experts = nn.ModuleList(perceptron(32, 48, 32) for _ in range(experts))
        self.penalty = torch.zeros(())
        with torch.no_grad():
            self.router.bias[-3:] -= bias

    def forward(self, images: Tensor) -> Tensor:
        stream = F.relu(self.enter(images))
        shares = self.router(stream).softmax(1)
        chosen = shares.argmax(1)
        out = torch.zeros_like(stream)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, expert(stream[mine]) * shares[mine, number, None])
        usage = F.one_hot(chosen, shares.shape[1]).float().mean(0)
        self.penalty = shares.shape[1] * (usage * shares.mean(0)).sum()
        named: Tensor = self.leave(stream + out)
        return named


@CASES.healthy(250, 0.6, "experts get no token of many a batch", "dead")
def mixture_balanced(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Mixture(12)
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed, 32)

    def step(_number: int) -> float:
        images, labels = next(batches)
        error = F.cross_entropy(model(images), labels)
        loss = error + 0.05 * model.penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(error.detach())

    return Training(model, step)


@CASES.healthy(300, 0.5, "nothing but two raw tables; a batch meets few of their rows", "dead")
def factorised_ratings(seed: int) -> Training:
    torch.manual_seed(seed)
    model = nn.ParameterDict({"people": torch.randn(200, 8) * 0.3, "things": torch.randn(150, 8) * 0.3})
    true = torch.randn(200, 3) @ torch.randn(3, 150) / math.sqrt(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)

    def step(_number: int) -> float:
        who, what = torch.randint(0, 200, (256,)), torch.randint(0, 150, (256,))
        loss = F.mse_loss((model["people"][who] * model["things"][what]).sum(1), true[who, what])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


class Generated(nn.Module):
    """A network whose weights are the output of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(4))
        self.maker = perceptron(4, 32, 64 * 10)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = images @ (self.maker(self.code).view(64, 10) * self.scale)
        return out


@CASES.healthy(250, 1.0, "weights that another network makes; one scalar scales all")
def hypernetwork(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Generated()
    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed))


@CASES.healthy(250, -0.9, "a mixture of densities: its likelihood rises above one, so that the loss is negative")
def mixture_of_densities(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(1, 48, 48, 9, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(_number: int) -> float:
        inputs = torch.rand(64, 1) * 2 - 1
        wanted = torch.sin(3 * inputs) + 0.05 * torch.randn(64, 1)
        logits, mean, spread = model(inputs).chunk(3, 1)
        each = torch.distributions.Normal(mean, spread.clamp(-4, 2).exp()).log_prob(wanted)
        loss = -torch.logsumexp(logits.log_softmax(1) + each, 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)
