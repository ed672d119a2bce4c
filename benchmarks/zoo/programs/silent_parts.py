"""Trainings in which a loss is zero, or a gradient is, or a sum, without a fault."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.programs.catalogue import Catalogue
from benchmarks.zoo.training import plain, set_rate

CASES = Catalogue()


@CASES.healthy(400, 0.02, "separated with a margin: loss and gradient are exactly zero at most steps", "vanishing")
def margin_reached(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10)
    images, labels = data.all_digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return plain(model, optimizer, data.endless(images[:256], labels[:256], 64, seed), loss_of=F.multi_margin_loss)


@CASES.healthy(250, 0.6, "the rate is thrown back up by a hundred midway, and the run holds", "exploding")
def rate_thrown_up(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def before_step(number: int) -> None:
        if number == 80:
            set_rate(optimizer, 0.1)

    return plain(model, optimizer, data.digits(seed), before_step=before_step)


@CASES.healthy(200, 250.0, "a summed squared error in raw units", "exploding")
def summed_regression(seed: int) -> Training:
    torch.manual_seed(seed)
    inputs, targets = data.table("diabetes")
    inputs, targets = data.standardised(inputs), data.standardised(targets.float().unsqueeze(1)) * 2
    model = perceptron(10, 32, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = data.endless(inputs, targets, 100, seed)
    return plain(model, optimizer, batches, loss_of=lambda found, wanted: F.mse_loss(found, wanted, reduction="sum"))


class Gated(nn.Module):
    """A recurrence with a gate at each position, and no activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(8, 48), nn.Linear(8, 48), nn.Linear(48, 10)
        nn.init.constant_(self.gate.bias, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        state = torch.zeros(len(images), 48)
        for row in images.view(-1, 8, 8).unbind(1):
            kept = torch.sigmoid(self.gate(row))
            state = kept * state + (1 - kept) * self.enter(row)
        out: Tensor = self.leave(state)
        return out


@CASES.healthy(250, 1.1, "a linear recurrence with gates")
def gated_recurrence(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Gated()
    return plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), data.digits(seed))


class Passing(nn.Module):
    """Pixels pass messages to their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(1, 16), nn.Linear(16 * 4, 10)
        self.pass_on = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        nodes = self.enter(images.view(-1, 8, 8, 1))
        for layer in self.pass_on:
            around = (nodes.roll(1, 1) + nodes.roll(-1, 1) + nodes.roll(1, 2) + nodes.roll(-1, 2)) / 4
            nodes = nodes + F.relu(layer(torch.cat([nodes, around], 3)))
        pooled = F.adaptive_avg_pool2d(nodes.permute(0, 3, 1, 2), 2)
        out: Tensor = self.leave(pooled.flatten(1))
        return out


@CASES.healthy(200, 1.5, "a first matrix with one input")
def messages(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Passing()
    return plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), data.digits(seed))


@CASES.healthy(250, 0.6, "most of the head's rows are unused: two hundred classes, ten of which occur", "dead")
def unused_classes(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 200)

    def sampled(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :16], labels)

    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed), loss_of=sampled)


@CASES.healthy(250, 0.7, "nine in ten hidden units are silenced by design, others at every step", "dead")
def winners_only(seed: int) -> Training:
    torch.manual_seed(seed)
    first, second = nn.Linear(64, 128), nn.Linear(128, 10)
    model = nn.Sequential(first, Winners(), second)
    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed))


class Winners(nn.Module):
    """Keeps the twelve largest units of each input."""

    def forward(self, values: Tensor) -> Tensor:
        least = values.topk(12, 1).values[:, -1:]
        return values * (values >= least)


@CASES.healthy(300, 0.6, "a regulariser far larger than the error at first", "exploding")
def penalty_dominates(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 64, 64, 10), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(number: int) -> float:
        images, labels = next(batches)
        error = F.cross_entropy(model(images), labels)
        size = torch.stack([weight.square().sum() for weight in model.parameters()]).sum()
        loss = error + (0.05 if number < 60 else 0.0001) * size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(error.detach())

    return Training(model, step)
