"""A case of the zoo: a training, its label, and the outcome that proves the label."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

Step = Callable[[int], float]
"""Does one whole training step, numbered from 1, and returns the loss on its batch."""


@dataclass(frozen=True)
class Training:
    """A model, its optimizers and one plain training step; it knows nothing of an agent."""

    model: nn.Module | Sequence[nn.Module]
    step: Step
    clip: float | None = None
    """By what the agent is told to clip adaptively; a twin, which is trained without an agent, is not clipped."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by the name that the agent gives them."""
        if isinstance(self.model, nn.Module):
            return dict(self.model.named_parameters())
        return {
            f"{type(part).__name__}.{name}": parameter
            for part in self.model
            for name, parameter in part.named_parameters()
        }


@dataclass(frozen=True, kw_only=True)
class Case:
    """One labelled training.

    A healthy case has to reach its loss. A sick one must not, and its repaired twin has to: with ``proof`` "loss" by
    the loss; with "starved" because the blamed parameters never move after the onset while those of the twin do.
    """

    name: str
    build: Callable[[int], Training]
    """Takes the seed."""
    steps: int
    reaches: float
    """Mean loss over the last 20 steps that a healthy run, or the twin, stays under."""
    rule: str | None = None
    """The rule that has to alert; none for a healthy run."""
    onset: int = 1
    """The first step at which the fault has an effect."""
    blame: tuple[str, ...] = ("*",)
    """Patterns of parameter names; the first parameter that is blamed has to match one."""
    twin: Callable[[int], Training] | None = None
    """The same training with the fault repaired."""
    proof: str = "loss"
    trap: str = ""
    """Why a naive rule would be wrong about it, or what the fault is."""

    def blames(self, name: str) -> bool:
        """Return whether it is right to blame this parameter first."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.blame)


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    losses: list[float] = field(repr=False)
    moved: dict[str, bool]
    """Whether each parameter changed after the onset."""

    @property
    def last_loss(self) -> float:
        """Mean of the last 20 losses."""
        last = self.losses[-20:]
        return sum(last) / len(last)


class Counter(Protocol):
    """Something that wants to know which step is being done."""

    step: int


def train(training: Training, steps: int, onset: int, counter: Counter | None = None) -> Result:
    """Run a training to its end."""
    losses: list[float] = []
    before: dict[str, torch.Tensor] = {}
    parameters = training.parameters()
    for step in range(1, steps + 1):
        if counter is not None:
            counter.step = step
        losses.append(training.step(step))
        if step == max(onset, 1):
            before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moved = {name: not torch.equal(before[name], parameter.detach()) for name, parameter in parameters.items()}
    return Result(losses, moved)


def holds(case: Case, result: Result, *, repaired: bool = False) -> bool:
    """Return whether the outcome of a run is the one that its label promises."""
    if case.proof == "starved":
        blamed = [name for name in result.moved if case.blames(name)]
        learns = all(result.moved[name] for name in blamed)
        return bool(blamed) and (learns if repaired else not any(result.moved[name] for name in blamed))
    learned = result.last_loss <= case.reaches  # False where the loss is NaN
    return learned == (repaired or case.rule is None)
