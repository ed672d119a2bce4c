"""One sample as the rules see it, over the run's parameters as arrays."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gradwatch.wire import MISSING, Event, Parameter, Statistic, Vector

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

EPS = 1e-3
"""The eps of ``ratio = grad_norm / (weight_norm + eps)``."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The parameters of a run, in the order of its vectors."""

    names: list[str]
    depth: NDArray[np.int64]
    elements: Floats
    matrix: Flags
    """Weights of two or more dimensions: where signals are multiplied from layer to layer."""
    trainable: Flags

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> Self:
        """Return the layout of a registered run."""
        depth = [index if entry.depth is None else entry.depth for index, entry in enumerate(parameters)]
        return cls(
            names=[entry.name for entry in parameters],
            depth=np.array(depth, np.int64),
            elements=np.array([float(math.prod(entry.shape)) for entry in parameters]),
            matrix=np.array([len(entry.shape) >= 2 for entry in parameters], np.bool_),
            trainable=np.array([entry.trainable for entry in parameters], np.bool_),
        )


@dataclass(frozen=True, eq=False)
class Profile:
    """What the rules share of one sample, computed once; all of shape (parameters,)."""

    gradient: Floats
    weight: Floats
    present: Flags
    """True where there was a gradient."""
    finite: Flags
    """True where the gradient was there and finite."""
    ratio: Floats
    """``gradient / (weight + EPS)``; NaN where the gradient is missing or not finite."""
    rms: Floats
    """``gradient / sqrt(elements)``; likewise."""
    matrices: NDArray[np.intp]
    """Indices of weight matrices with a finite gradient, from input to output."""
    vectors: NDArray[np.intp]
    """Indices of biases and gains with a finite gradient, from input to output."""

    @property
    def global_gradient(self) -> float:
        """L2 norm over all finite gradients."""
        return float(np.sqrt(np.square(self.gradient[self.finite]).sum()))

    @property
    def global_weight(self) -> float:
        """L2 norm over the weights of the parameters with a finite gradient."""
        weights = self.weight[self.finite]
        return float(np.sqrt(np.square(weights[np.isfinite(weights)]).sum()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One sample."""

    step: int
    at: float
    """Unix seconds."""
    statistics: Mapping[Statistic, Vector]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Scalars of the run at this step, the loss among them."""
    events: Sequence[Event] = ()

    def vector(self, name: Statistic, size: int) -> Floats:
        """Return a statistic, shape (size,), float64; all missing where it was not measured."""
        found = self.statistics.get(name)
        vector = np.full(size, MISSING)
        if found is not None:
            vector[: len(found)] = found
        return vector

    def profile(self, layout: Layout) -> Profile:
        """Return what the rules share."""
        size = len(layout.names)
        gradient, weight = self.vector("grad_norm", size), self.vector("weight_norm", size)
        present = gradient != MISSING
        finite = present & np.isfinite(gradient)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(finite, gradient / (np.maximum(weight, 0.0) + EPS), np.nan)
            rms = np.where(finite, gradient / np.sqrt(np.maximum(layout.elements, 1.0)), np.nan)
        order = np.argsort(layout.depth, kind="stable")
        usable = finite & np.isfinite(weight) & layout.trainable & (layout.elements > 0)
        matrices = order[(usable & layout.matrix)[order]]
        vectors = order[(usable & ~layout.matrix)[order]]
        return Profile(gradient, weight, present, finite, ratio, rms, matrices, vectors)
