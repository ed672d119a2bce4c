"""A case of the zoo: a training, its label, and the outcome that proves the label."""

import fnmatch
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

Step = Callable[[int], float]
"""Does one whole training step, numbered from 1, and returns the loss on its batch."""


NEIGHBOURS = {
    "nonfinite": ("exploding",),
    "exploding": ("nonfinite",),
    "vanishing": ("dead",),
    "dead": ("vanishing",),
    "throttled": (),
    "unmoved": (),
    "slow": ("unmoved",),
}
"""Rule -> rules that are right about the same fault: what explodes overflows, what vanishes reaches zero."""


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
    also: tuple[str, ...] | None = None
    """Other rules that are also right, which the lenient count accepts; None: ``NEIGHBOURS`` of the rule."""
    looks_like: str = ""
    """Of a healthy run: the rule whose fault it resembles from outside; empty for one that resembles none."""
    trap: str = ""
    """Why a naive rule would be wrong about it, or what the fault is."""

    @property
    def right_rules(self) -> tuple[str, ...]:
        """The rules that the lenient count accepts; none for a healthy run."""
        if self.rule is None:
            return ()
        return (self.rule, *(NEIGHBOURS[self.rule] if self.also is None else self.also))

    def blames(self, name: str) -> bool:
        """Return whether it is right to blame this parameter first."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.blame)


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    losses: list[float] = field(repr=False)
    moved: dict[str, bool]
    """Whether each parameter changed after the onset."""
    onset_at: float = 0.0
    """Unix seconds at which the step of the onset began."""

    @property
    def last_loss(self) -> float:
        """Mean of the last 20 losses."""
        last = self.losses[-20:]
        return sum(last) / len(last)


class Counter(Protocol):
    """Something that wants to know which step is being done."""

    step: int


def train(
    training: Training, steps: int, onset: int, counter: Counter | None = None, *, least_seconds: float = 0.0
) -> Result:
    """Run a training to its end; each step takes at least ``least_seconds``."""
    losses: list[float] = []
    onset_at = 0.0
    before: dict[str, torch.Tensor] = {}
    parameters = training.parameters()
    for step in range(1, steps + 1):
        if counter is not None:
            counter.step = step
        began = time.time()
        losses.append(training.step(step))
        time.sleep(max(0.0, began + least_seconds - time.time()))
        if step == max(onset, 1):
            onset_at = began
            before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moved = {name: not torch.equal(before[name], parameter.detach()) for name, parameter in parameters.items()}
    return Result(losses, moved, onset_at)


def holds(case: Case, result: Result, *, repaired: bool = False) -> bool:
    """Return whether the outcome of a run is the one that its label promises."""
    if case.proof == "starved":
        blamed = [name for name in result.moved if case.blames(name)]
        learns = all(result.moved[name] for name in blamed)
        return bool(blamed) and (learns if repaired else not any(result.moved[name] for name in blamed))
    learned = result.last_loss <= case.reaches  # False where the loss is NaN
    return learned == (repaired or case.rule is None)
