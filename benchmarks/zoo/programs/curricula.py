"""What is learned changes on the way: longer sequences, larger batches, losses that join, switch or take turns."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import LanguageModel, Recurrent, perceptron, token_loss
from benchmarks.zoo.programs.catalogue import Catalogue
from benchmarks.zoo.training import plain

CASES = Catalogue()


def _longer(seed: int, model: nn.Module, rate: float, every: int) -> Training:
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=rate), data.text(seed, length=48)

    def step(number: int) -> float:
        length = min(48, 2 * 2 ** (number // every))
        tokens, targets = (part[:, :length] for part in next(batches))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.clamp_max(127).flatten(), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        return float(loss.detach()) / targets.numel()

    return Training(model, step)


@CASES.healthy(200, 3.2, "sequences grow from 2 to 48 bytes, and the loss is their sum", "exploding")
def sequences_grow(seed: int) -> Training:
    torch.manual_seed(seed)
    return _longer(seed, LanguageModel(blocks=2), 3e-3, 30)


@CASES.healthy(200, 3.2, "sequences of a recurrent network grow, and the loss is their sum", "exploding")
def recurrent_sequences_grow(seed: int) -> Training:
    torch.manual_seed(seed)
    return _longer(seed, Recurrent("gru"), 5e-3, 30)


@CASES.healthy(240, 0.5, "batches of 16, 64, then 256, with a summed loss", "exploding")
def batches_grow(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 64, 64, 10), data.digits(seed, 256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(number: int) -> float:
        count = 16 if number <= 80 else 64 if number <= 160 else 256
        images, labels = (part[:count] for part in next(batches))
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()) / count

    return Training(model, step)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.label, self.image = nn.Linear(64, 10), nn.Linear(64, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(images)
        return self.label(hidden), self.image(hidden)


def _two_losses(seed: int, weights: tuple[float, float], later: tuple[float, float], rate: float = 2e-3) -> Training:
    """Classify and draw: the weights of the two losses change after step 120."""
    torch.manual_seed(seed)
    model, batches = TwoHeads(), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def step(number: int) -> float:
        images, labels = next(batches)
        logits, drawn = model(images)
        first, second = weights if number <= 120 else later
        error, difference = F.cross_entropy(logits, labels), (drawn - images).square().sum(1).mean()
        loss = first * error + second * difference
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float((error if later[0] else difference / 10).detach())

    return Training(model, step)


@CASES.healthy(240, 0.5, "a second, larger loss joins at step 120", "exploding")
def loss_joins(seed: int) -> Training:
    return _two_losses(seed, (1.0, 0.0), (1.0, 1.0))


@CASES.healthy(240, 0.8, "a loss a hundred times as large takes the place of the first", "exploding")
def loss_switches(seed: int) -> Training:
    return _two_losses(seed, (1.0, 0.0), (0.0, 20.0))


@CASES.healthy(240, 0.5, "the loss of a head has no weight at first", "dead")
def auxiliary_later(seed: int) -> Training:
    return _two_losses(seed, (1.0, 0.0), (1.0, 0.02))


@CASES.healthy(240, 0.6, "first to draw, then to name: another loss from step 120", "dead")
def pretraining_then_fine_tuning(seed: int) -> Training:
    return _two_losses(seed, (0.0, 0.1), (1.0, 0.0))


@CASES.healthy(320, 0.5, "two tasks take turns by epochs of forty steps", "dead")
def tasks_by_epochs(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = TwoHeads(), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(number: int) -> float:
        images, labels = next(batches)
        logits, drawn = model(images)
        error = F.cross_entropy(logits, labels)
        loss = F.mse_loss(drawn, images) if number // 40 % 2 else error
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(error.detach())

    return Training(model, step)


@CASES.healthy(260, 0.5, "a task that comes at every 25th step", "dead")
def task_every_25th(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = TwoHeads(), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(number: int) -> float:
        images, labels = next(batches)
        logits, drawn = model(images)
        loss = F.cross_entropy(logits, labels)
        if number % 25 == 0:
            loss = loss + F.mse_loss(drawn, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(260, 0.35, "the margin of a hinge is ramped up: the loss rises while the errors fall", "exploding")
def margin_grows(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 64, 64, 10), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(number: int) -> float:
        images, labels = next(batches)
        scores = model(images)
        right = scores.gather(1, labels.unsqueeze(1))
        loss = (scores - right + 0.5 + number / 10).clamp_min(0).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float((scores.argmax(1) != labels).float().mean())

    return Training(model, step)


@CASES.healthy(260, 0.3, "from step 80 on only the hardest examples of a batch count", "exploding")
def hard_examples(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 64, 64, 10), data.digits(seed, 256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(number: int) -> float:
        images, labels = next(batches)
        each = F.cross_entropy(model(images), labels, reduction="none")
        loss = each.topk(16).values.sum() / 8 if number > 80 else each.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(each.detach().mean())

    return Training(model, step)


@CASES.healthy(260, 0.9, "two classes at first, a class more at every 25th step", "exploding")
def classes_arrive(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, labels = data.all_digits()

    def step(number: int) -> float:
        known = (labels < 2 + number // 25).nonzero()[:, 0]
        chosen = known[torch.randint(0, len(known), (64,))]
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(240, 1.0, "inputs get noisier, up to twice their own size", "exploding")
def noise_grows(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 96, 96, 10)

    def prepare(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images + step / 500 * torch.randn_like(images), labels

    return plain(model, torch.optim.Adam(model.parameters(), lr=2e-3), data.digits(seed), prepare=prepare)


@CASES.healthy(200, 2.9, "every fourth batch comes from another, shorter kind of data; the loss is a sum", "exploding")
def mixed_lengths(seed: int) -> Training:
    torch.manual_seed(seed)
    model = LanguageModel(blocks=2)
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=3e-3), data.text(seed)

    def step(number: int) -> float:
        length = 32 if number % 4 else 2
        tokens, targets = (part[:, :length] for part in next(batches))
        loss = token_loss(model(tokens), targets)
        optimizer.zero_grad()
        (loss * targets.numel()).backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)
