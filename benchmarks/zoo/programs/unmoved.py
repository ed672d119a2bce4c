"""Trainings whose weights have gradients and do not move, and healthy ones that look like them from outside."""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.programs.catalogue import Catalogue
from benchmarks.zoo.programs.digits import classifier, scheduled
from benchmarks.zoo.training import plain, set_rate

CASES = Catalogue()


def _even(model: nn.Sequential) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.sign() * 0.1)


def _of(*layers: nn.Module) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]


BODY = ("0.*", "2.*")


@CASES.sick("unmoved", 250, 0.3, "the optimizer was made for the head alone", {"all_of_it": True},
            proof="starved", blame=BODY)  # fmt: skip
def body_in_no_optimizer(seed: int, all_of_it: bool = False) -> Training:
    model = classifier(seed)
    held = model if all_of_it else model[4]
    return plain(model, torch.optim.Adam(held.parameters(), lr=3e-3), data.digits(seed))


@CASES.sick("unmoved", 250, 0.3, "two layers were replaced after the optimizer was made", {"replaced": False},
            proof="starved", blame=BODY)  # fmt: skip
def layers_replaced_later(seed: int, replaced: bool = True) -> Training:
    model = classifier(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    if replaced:
        model[0], model[2] = nn.Linear(64, 64), nn.Linear(64, 64)
    return plain(model, optimizer, data.digits(seed))


class Coder(nn.Module):
    """An encoder and a decoder, each of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(64, 48, 16), perceptron(16, 48, 64)

    def forward(self, images: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.encoder(images))
        return decoded


@CASES.sick("unmoved", 300, 0.04, "the optimizer got the decoder twice and the encoder never", {"of_both": True},
            proof="starved", blame=("encoder.*",))  # fmt: skip
def encoder_forgotten(seed: int, of_both: bool = False) -> Training:
    torch.manual_seed(seed)
    model = Coder()
    first = model.encoder if of_both else model.decoder
    held = {id(p): p for p in chain(first.parameters(), model.decoder.parameters())}
    optimizer = torch.optim.Adam(held.values(), lr=2e-3)
    images, _ = data.all_digits()
    return plain(model, optimizer, data.endless(images, images, 64, seed), loss_of=F.mse_loss)


@CASES.sick("unmoved", 250, 0.3, "a schedule that was made for 60 steps has run out", {"length": 400},
            proof="starved", onset=62)  # fmt: skip
def schedule_ran_out(seed: int, length: int = 60) -> Training:
    return scheduled(seed, lambda number: max(0.0, 1 - number / length))


@CASES.sick("unmoved", 250, 0.3, "a rate that is rounded to 0 by an integer division", {"warm": 10}, proof="starved")
def rate_rounded_to_zero(seed: int, warm: int = 1000) -> Training:
    return scheduled(seed, lambda number: float(min(1, (number + 10) // warm)))


@CASES.sick("unmoved", 260, 0.3, "the group of the body has a rate of 0", {"rate": 3e-3}, proof="starved", blame=BODY)
def body_at_rate_zero(seed: int, rate: float = 0.0) -> Training:
    model = classifier(seed)
    body = _of(model[0], model[2])
    groups: list[dict[str, Any]] = [{"params": body, "lr": rate}, {"params": _of(model[4])}]
    return plain(model, torch.optim.Adam(groups, lr=3e-3), data.digits(seed))


@CASES.sick("unmoved", 200, 0.8, "clipped to a norm of 1e-14, under plain SGD", {"limit": 1.0}, proof="starved",
            blame=("?.weight",))  # fmt: skip
def clipped_to_nothing(seed: int, limit: float = 1e-14) -> Training:
    model = classifier(seed)
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data.digits(seed), clip=limit)


@CASES.sick("unmoved", 200, 0.8, "unscaled twice: what is clipped to 1 is divided by 65,536 squared", {"scale": 1.0},
            proof="starved", blame=("?.weight",))  # fmt: skip
def unscaled_twice(seed: int, scale: float = 65536.0) -> Training:
    model = classifier(seed)

    def before_step(_number: int) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale * scale)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return plain(model, optimizer, data.digits(seed), clip=1.0, before_step=before_step)


@CASES.sick("unmoved", 250, 1.0, "bfloat16 weights whose updates lie under half of their last digit", {"rate": 0.2},
            proof="starved", blame=("?.weight",))  # fmt: skip
def rounded_away(seed: int, rate: float = 1e-4) -> Training:
    model = classifier(seed)
    _even(model)
    model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def prepare(_number: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.bfloat16(), labels

    return plain(model, optimizer, data.digits(seed), prepare=prepare)


@CASES.sick("unmoved", 250, 0.3, "weights in float16 whose rate was meant for another optimizer", {"rate": 0.3},
            proof="starved", blame=("?.weight",))  # fmt: skip
def rounded_away_by_half(seed: int, rate: float = 1e-5) -> Training:
    model = classifier(seed)
    _even(model)
    model.half()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def prepare(_number: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.half(), labels

    return plain(model, optimizer, data.digits(seed), prepare=prepare,
                 loss_of=lambda found, wanted: F.cross_entropy(found.float(), wanted))  # fmt: skip


def _restored(seed: int, put_back: bool, of: Callable[[nn.Sequential], nn.Module]) -> Training:
    model = classifier(seed)
    kept = copy.deepcopy(of(model).state_dict())
    inner = plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed))

    def step(number: int) -> float:
        loss = inner.step(number)
        if put_back:
            of(model).load_state_dict(kept)
        return loss

    return Training(model, step)


@CASES.sick("unmoved", 250, 0.3, "the first checkpoint is loaded again after each step", {"put_back": False},
            proof="starved")  # fmt: skip
def loaded_after_each_step(seed: int, put_back: bool = True) -> Training:
    return _restored(seed, put_back, lambda model: model)


@CASES.sick("unmoved", 250, 0.3, "an average that never begins is copied back into the model", {"begins": 0},
            proof="starved")  # fmt: skip
def average_copied_back(seed: int, begins: int = 10_000) -> Training:
    model = classifier(seed)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    inner = plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed))

    def step(number: int) -> float:
        loss = inner.step(number)
        with torch.no_grad():
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter, 1.0 if number >= begins else 0.0)
                parameter.copy_(mean)
        return loss

    return Training(model, step)


# Healthy


@CASES.healthy(250, 0.3, "a warm-up from 0 over 80 steps", "unmoved")
def warmed_up_from_zero(seed: int) -> Training:
    return scheduled(seed, lambda number: min(1.0, number / 80))


@CASES.healthy(250, 0.3, "the rate is 0 for the first ten steps, in which only statistics are gathered", "unmoved")
def burnt_in(seed: int) -> Training:
    return scheduled(seed, lambda number: float(number >= 10))


@CASES.healthy(250, 0.3, "a rate that falls to 0 with the last step", "unmoved")
def falls_to_zero(seed: int) -> Training:
    return scheduled(seed, lambda number: max(0.0, 1 - number / 249) ** 2)


@CASES.healthy(250, 0.3, "the body's group waits for its turn at a rate of 0", "unmoved")
def body_waits_at_zero(seed: int) -> Training:
    model = classifier(seed)
    body = _of(model[0], model[2])
    groups: list[dict[str, Any]] = [{"params": body, "lr": 0.0}, {"params": _of(model[4])}]
    optimizer = torch.optim.Adam(groups, lr=3e-3)

    def before_step(number: int) -> None:
        if number == 60:
            set_rate(optimizer, 3e-3)

    return plain(model, optimizer, data.digits(seed), before_step=before_step)


@CASES.healthy(250, 0.3, "the body's optimizer steps from step 60 on; its gradients are there before", "unmoved")
def body_stepped_later(seed: int) -> Training:
    model = classifier(seed)
    head = torch.optim.Adam(model[4].parameters(), lr=3e-3)
    body = torch.optim.Adam(_of(model[0], model[2]), lr=3e-3)
    batches = data.digits(seed)

    def step(number: int) -> float:
        images, labels = next(batches)
        model.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        head.step()
        if number >= 60:
            body.step()
        return float(loss.detach())

    return Training(model, step)


class Judged(nn.Module):
    """A network whose output another, fixed one compares with the target; gradients flow through that one."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.judge = perceptron(64, 48, 64), perceptron(64, 64, 32)

    def forward(self, images: Tensor) -> Tensor:
        judged: Tensor = self.judge(self.net(images))
        return judged


@CASES.healthy(250, 0.02, "a loss network whose requires_grad was left as it was", "unmoved")
def judged_by_aclassifier(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Judged()
    images, _ = data.all_digits()
    optimizer = torch.optim.Adam(model.net.parameters(), lr=3e-3)

    def loss_of(found: Tensor, wanted: Tensor) -> Tensor:
        return F.mse_loss(found, model.judge(wanted).detach())

    return plain(model, optimizer, data.endless(images, images, 64, seed), loss_of=loss_of)


@CASES.healthy(250, 0.4, "stepped by hand: no optimizer holds the first layer", "unmoved")
def first_layer_by_hand(seed: int) -> Training:
    model = classifier(seed)
    optimizer = torch.optim.Adam(_of(model[2], model[4]), lr=3e-3)

    def before_step(_number: int) -> None:
        with torch.no_grad():
            for parameter in model[0].parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-0.1)

    return plain(model, optimizer, data.digits(seed), before_step=before_step)


@CASES.healthy(250, 0.6, "master weights in float32 are stepped, and copied to the model in bfloat16", "unmoved")
def master_weights(seed: int) -> Training:
    model = classifier(seed).to(torch.bfloat16)
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(masters, lr=2e-3)
    counted = torch.optim.SGD(_of(model[4])[1:], lr=0.0)
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        model.zero_grad()
        loss = F.cross_entropy(model(images.bfloat16()).float(), labels)
        loss.backward()
        counted.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(300, 0.5, "rows on the unit sphere: no weight's norm ever changes", "unmoved")
def on_the_sphere(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10, bias=False)

    def on_sphere() -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(F.normalize(weight, dim=1))

    on_sphere()
    inner = plain(model, torch.optim.SGD(model.parameters(), lr=0.3), data.digits(seed))

    def step(number: int) -> float:
        loss = inner.step(number)
        on_sphere()
        return loss

    return Training(model, step)


@CASES.healthy(250, 0.4, "nine in ten weights are pruned and stay at zero, whole rows among them", "unmoved")
def pruned_rows(seed: int) -> Training:
    model = classifier(seed, 64, 128, 128, 10)
    masks = [(torch.rand_like(p) < 0.1).float() for p in model.parameters() if p.dim() > 1]

    def prune() -> None:
        with torch.no_grad():
            for mask, weight in zip(masks, (p for p in model.parameters() if p.dim() > 1), strict=True):
                weight.mul_(mask)

    prune()
    inner = plain(model, torch.optim.Adam(model.parameters(), lr=5e-3), data.digits(seed))

    def step(number: int) -> float:
        loss = inner.step(number)
        prune()
        return loss

    return Training(model, step)


@CASES.healthy(250, 0.5, "a temperature that is clamped at its bound at every step", "unmoved")
def held_at_the_bound(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Tempered()

    def before_step(_number: int) -> None:
        with torch.no_grad():
            model.temperature.clamp_(max=1.0)

    return plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed), before_step=before_step)


class Tempered(nn.Module):
    """A classifier of directions with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = perceptron(64, 64, 64), nn.Linear(64, 10, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        directions = F.normalize(self.body(images), dim=1)
        scores: Tensor = 10 * self.temperature * self.head(directions)
        return scores


@CASES.healthy(280, 0.4, "two parts take turns by their rates, sixty steps each", "unmoved")
def turns_by_rates(seed: int) -> Training:
    model = classifier(seed)
    body = _of(model[0], model[2])
    groups: list[dict[str, Any]] = [{"params": body}, {"params": _of(model[4])}]
    optimizer = torch.optim.Adam(groups, lr=3e-3)

    def before_step(number: int) -> None:
        turn = number // 60 % 2
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = ((3e-3, 0.0), (0.0, 3e-3))[turn]

    return plain(model, optimizer, data.digits(seed), before_step=before_step)
