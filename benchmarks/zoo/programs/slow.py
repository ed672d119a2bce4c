"""Trainings whose rate is too small to learn anything, and healthy ones that look like them from outside."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import Convolutional
from benchmarks.zoo.programs.catalogue import Catalogue
from benchmarks.zoo.programs.digits import classifier, scheduled
from benchmarks.zoo.training import plain

CASES = Catalogue()


@CASES.sick("slow", 250, 0.5, "plain SGD at a rate of 1e-7", {"rate": 0.2})
def descent_at_a_tiny_rate(seed: int, rate: float = 1e-7) -> Training:
    model = classifier(seed)
    return plain(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), data.digits(seed))


@CASES.sick("slow", 250, 0.5, "Adam at a rate of 1e-9", {"rate": 3e-3})
def adam_at_a_tiny_rate(seed: int, rate: float = 1e-9) -> Training:
    model = classifier(seed, 64, 96, 96, 96, 10)
    return plain(model, torch.optim.Adam(model.parameters(), lr=rate), data.digits(seed))


@CASES.sick("slow", 250, 0.5, "the rate is divided by the number of samples squared", {"divisor": 1.0})
def rate_divided_twice(seed: int, divisor: float = 1797.0**2) -> Training:
    model = classifier(seed)
    return plain(model, torch.optim.AdamW(model.parameters(), lr=3e-3 / divisor), data.digits(seed))


@CASES.sick("slow", 300, 0.5, "the rate is halved at each step, where each epoch was meant", {"decay": 0.999}, onset=12)
def halved_at_each_step(seed: int, decay: float = 0.5) -> Training:
    model = classifier(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return plain(model, optimizer, data.digits(seed), scheduler=ExponentialLR(optimizer, decay))


@CASES.sick("slow", 250, 0.6, "gradients are divided by a million before plain SGD steps", {"scale": 1.0})
def gradients_scaled_away(seed: int, scale: float = 1e6) -> Training:
    model = classifier(seed)

    def before_step(_number: int) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)

    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1), data.digits(seed), before_step=before_step)


@CASES.sick("slow", 120, 1.0, "a convolutional net whose rate was given in percent of percent", {"rate": 0.1})
def convolutions_at_a_tiny_rate(seed: int, rate: float = 1e-8) -> Training:
    torch.manual_seed(seed)
    model = Convolutional()
    images, labels = data.all_digits()
    batches = data.endless(images.view(-1, 1, 8, 8), labels, 64, seed)
    return plain(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), batches)


# Healthy


@CASES.healthy(250, 0.5, "a warm-up that doubles a rate of 1e-12 until it is 3e-3", "slow")
def warmed_up_by_doubling(seed: int) -> Training:
    return scheduled(seed, lambda number: min(1.0, 3e-10 * 1.25**number))


@CASES.healthy(300, 0.4, "a rate that falls by decades once the loss is low", "slow")
def cooled_down_by_decades(seed: int) -> Training:
    return scheduled(seed, lambda number: 10.0 ** -max(0.0, (number - 150) / 12))


@CASES.healthy(250, 0.5, "layers whose weights are a thousand times larger than what is trained of them", "slow")
def small_part_of_large_weights(seed: int) -> Training:
    model = classifier(seed)

    class Scaled(nn.Module):
        """A network whose stored weights are a thousand times those that it computes with."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = model
            with torch.no_grad():
                for layer in self.linear_layers():
                    layer.weight.mul_(1000.0)

        def linear_layers(self) -> list[nn.Linear]:
            return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

        def forward(self, images: Tensor) -> Tensor:
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    images = nn.functional.linear(images, layer.weight / 1000.0, layer.bias)
                else:
                    images = layer(images)
            return images

    scaled = Scaled()
    weights = {id(layer.weight) for layer in scaled.linear_layers()}
    groups = [
        {"params": [layer.weight for layer in scaled.linear_layers()], "lr": 3.0},
        {"params": [each for each in scaled.parameters() if id(each) not in weights], "lr": 3e-3},
    ]
    return plain(scaled, torch.optim.Adam(groups), data.digits(seed))


@CASES.healthy(250, 1.0, "a body at a tiny rate under a head that learns", "slow")
def body_at_a_tiny_rate(seed: int) -> Training:
    model = classifier(seed, 64, 256, 256, 10)
    body = list(chain(model[0].parameters(), model[2].parameters()))
    groups = [{"params": body, "lr": 1e-9}, {"params": list(model[4].parameters()), "lr": 3e-2}]
    return plain(model, torch.optim.Adam(groups), data.digits(seed))


@CASES.healthy(250, 0.6, "plain SGD whose first forty steps go at a hundred-thousandth of the rate", "slow")
def held_back_at_first(seed: int) -> Training:
    model = classifier(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda number: 1.0 if number >= 40 else 1e-5)
    return plain(model, optimizer, data.digits(seed), scheduler=scheduler)


@CASES.healthy(200, 0.2, "a network that was trained before and is averaged on at a small rate", "slow")
def trained_before(seed: int) -> Training:
    model = classifier(seed)
    before = plain(model, torch.optim.Adam(model.parameters(), lr=3e-3), data.digits(seed))
    for number in range(1, 301):
        before.step(number)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-5), data.digits(seed + 1))
