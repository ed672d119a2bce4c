"""Trainings drawn at random: optimizers over parts of the model, clipping anywhere, accumulation, steps left out."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from .conftest import Server
from .truth import norm
from .watching import watch

MISSING = -1.0


class _Five(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for place in range(5):
            self.register_parameter(f"p{place}", nn.Parameter(torch.ones(3, 4) if place % 2 else torch.ones(7)))


class _Training:
    """Draws what is done, does it, and keeps what each step must show: norms before and after clipping, the loss."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.model = _Five()
        self.parameters = list(self.model.parameters())
        order = list(range(5))
        self.random.shuffle(order)
        count = self.random.choice([1, 2, 3])
        self.parts = [sorted(order[first::count]) for first in range(count)]
        self.optimizers = [torch.optim.SGD([self.parameters[place] for place in part], lr=0.0) for part in self.parts]
        self.unclipped: dict[int, float] = {}
        """Norms of gradients from before the first clipping since they were made."""
        self.before: list[dict[int, float]] = []
        self.after: list[dict[int, float]] = []
        self.losses: list[float] = []

    def norm(self, place: int) -> float:
        grad = self.parameters[place].grad
        return MISSING if grad is None else norm(grad)

    def backward(self, places: list[int]) -> float:
        chosen = [place for place in places if self.random.random() < 0.9] or places
        scaled = [
            (self.parameters[place] * torch.randn_like(self.parameters[place]) * 10 ** self.random.uniform(-3, 3)).sum()
            for place in chosen
        ]
        loss = torch.stack(scaled).sum()
        loss.backward()
        for place in chosen:
            self.unclipped.pop(place, None)
        return loss.item()

    def clip(self, places: list[int]) -> None:
        if all(self.parameters[place].grad is None for place in places):
            return
        for place in places:
            if self.parameters[place].grad is not None:
                self.unclipped.setdefault(place, self.norm(place))
        chosen = [self.parameters[place] for place in places]
        if self.random.random() < 0.3:
            clip_grad_value_(chosen, 10 ** self.random.uniform(-2, 2))
        else:
            clip_grad_norm_(
                chosen, 10 ** self.random.uniform(-2, 4), norm_type=self.random.choice([2.0, 1.0, math.inf])
            )

    def zero(self) -> None:
        to_none = self.random.choice([True, False])
        if self.random.choice([True, False]):
            self.model.zero_grad(set_to_none=to_none)
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=to_none)
        self.unclipped.clear()

    def round(self) -> None:
        """Do one step of every optimizer, or leave it out."""
        everything = list(range(5))
        self.zero()
        loss, together = 0.0, self.random.random() < 0.5
        if together:
            loss += sum(self.backward(everything) for _ in range(self.random.choice([1, 1, 2])))
            for _ in range(self.random.choice([0, 1, 1, 2])):
                self.clip(self.random.choice([everything, *self.parts]))
        if self.random.random() < 0.2:
            return
        before, after = {}, {}
        for optimizer, part in zip(self.optimizers, self.parts, strict=True):
            if not together:
                loss += self.backward(part if self.random.random() < 0.6 else everything)
            clipped = self.random.choice([part, part, everything, None, None])
            if clipped is not None:
                self.clip(clipped)
            for place in part:
                before[place], after[place] = self.unclipped.get(place, self.norm(place)), self.norm(place)
            optimizer.step()
        self.before.append(before)
        self.after.append(after)
        self.losses.append(loss)


@pytest.mark.parametrize("given", [True, False], ids=["optimizers", "model"])
@pytest.mark.parametrize("seed", range(25))
def test_every_step_shows_its_own_gradients(server: Server, seed: int, given: bool) -> None:
    training = _Training(seed)
    with watch(training.model, server, training.optimizers if given else None):
        for _ in range(6):
            training.round()
    assert len(server.samples) == len(training.before)
    places = [int(name.removeprefix("p")) for name in server.names]
    for sample, before, after in zip(server.samples, training.before, training.after, strict=True):
        found = sample.statistics["grad_norm"]
        left = sample.statistics.get("clipped_grad_norm", found)
        assert dict(zip(places, found.tolist(), strict=True)) == pytest.approx(before, rel=2e-4)
        assert dict(zip(places, left.tolist(), strict=True)) == pytest.approx(after, rel=2e-4)
    told = server.trail("loss")
    assert [told[sample.step] for sample in server.samples] == pytest.approx(training.losses, rel=1e-3, abs=0.1)
