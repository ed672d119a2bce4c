"""Tables of ticks: a small network whose numbers a test writes by hand, looked at sample by sample."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradwatch.wire import MISSING, Parameter, Statistic, Vector
from gradwatch_server.diagnosis import Finding, History, RunParameters, Sample, Thresholds, diagnose

LAYERS = 8


def network(layers: int = LAYERS, *, bias: bool = True) -> list[Parameter]:
    """Return linear layers of 32 units each, from input to output."""
    parameters = []
    for index in range(layers):
        parameters.append(Parameter(f"{index}.weight", [32, 32], units=32, kind="Linear"))
        if bias:
            parameters.append(Parameter(f"{index}.bias", [32], kind="Linear"))
    return parameters


@dataclass
class Watch:
    """Runs the rules over samples, moving the step by hand."""

    parameters: Sequence[Parameter] = field(default_factory=network)
    thresholds: Thresholds = field(default_factory=Thresholds)
    every: int = 1

    def __post_init__(self) -> None:
        self.run_parameters = RunParameters.of(self.parameters)
        self.history = History()
        self.step = 0

    def tick(
        self,
        gradients: float | Sequence[float],
        *,
        weights: float | Sequence[float] = 3.0,
        loss: float | None = None,
        losses: Sequence[tuple[int, float]] = (),
        zero_unit_share: Sequence[float] | None = None,
        update: float | Sequence[float] | None = None,
        clipped: float | None = None,
        **scalars: float,
    ) -> dict[str, Finding]:
        """Look at one more sample; return the findings by rule."""
        self.step += self.every
        size = len(self.parameters)
        statistics: dict[Statistic, Vector] = {
            "grad_norm": np.broadcast_to(np.array(gradients, np.float32), size).copy(),
            "weight_norm": np.broadcast_to(np.array(weights, np.float32), size).copy(),
        }
        if zero_unit_share is not None:
            statistics["zero_unit_share"] = np.array(zero_unit_share, np.float32)
        if update is not None:
            statistics["update_norm"] = np.broadcast_to(np.array(update, np.float32), size).copy()
        if clipped is not None:
            statistics["clipped_grad_norm"] = np.full(size, clipped, np.float32)
        if loss is not None:
            scalars["loss"] = loss
        sample = Sample(step=self.step, at=0.0, statistics=statistics, scalars=scalars, losses=losses)
        self.history, findings = diagnose(self.run_parameters, self.history, sample, self.thresholds)
        return {finding.rule: finding for finding in findings}

    def learn(self, samples: int, gradient: float = 0.1, loss: float = 2.3, rate: float = 0.97) -> None:
        """A healthy stretch: the loss comes down, nothing is found."""
        for index in range(samples):
            found = self.tick(gradient, loss=loss * rate**index)
            assert not found, found


def fading(decades_a_layer: float, layers: int = LAYERS, first: float = 0.1) -> list[float]:
    """Return gradients of weights and biases that fade by so many decades from each layer to the one before."""
    return [first * 10 ** (-decades_a_layer * (layers - 1 - index)) for index in range(layers) for _ in range(2)]


def held(found: Iterable[dict[str, Finding]], rule: str) -> list[bool]:
    """Return at which samples a rule held."""
    return [rule in each for each in found]


__all__ = ["LAYERS", "MISSING", "Watch", "fading", "held", "network"]
