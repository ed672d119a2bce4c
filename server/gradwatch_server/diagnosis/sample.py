"""One sample of a run, and the run's parameters, as arrays over the parameters for the rules of the diagnosis."""

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gradwatch.statistics import RATIO_EPS
from gradwatch.wire import MISSING, Parameter, Statistic, Vector

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

TINY = 1e-45
"""The smallest positive float32. It stands for zero on a logarithmic scale."""
_UNDERFLOW_DECADES = 2.5
"""A gradient that has faded so far before it reaches zero has underflowed."""
_SETTLED_LOSSES = 5
_EMBEDDINGS = ("Embedding", "EmbeddingBag")


def median(values: Sequence[float] | Floats) -> float:
    """Return the same as ``np.median`` to the last bit, five times as fast on a few hundred numbers."""
    ordered = np.array(values)
    ordered.sort()
    middle = len(ordered) // 2
    if math.isnan(ordered[-1]) or len(ordered) % 2:
        return float(ordered[-1] if math.isnan(ordered[-1]) else ordered[middle])
    return (float(ordered[middle - 1]) + float(ordered[middle])) / 2


def extended(vector: NDArray[Any] | None, size: int, value: float) -> NDArray[Any]:
    """Return a stored vector, filled up to ``size`` with ``value``: a run may append parameters."""
    if vector is not None and len(vector) == size:
        return vector
    existing = np.zeros(0, type(value)) if vector is None else vector
    return np.concatenate([existing, np.full(size - len(existing), value, existing.dtype)])


@dataclass(frozen=True, eq=False)
class RunParameters:
    """The parameters of a run, in the order of its vectors; all arrays have the shape (parameters,)."""

    names: list[str]
    depth: NDArray[np.int64]
    order: Indices
    """Indices from input to output."""
    elements: Floats
    units: Floats
    matrix: Flags
    """True for weights with two or more dimensions above 1: they multiply the signal from layer to layer."""
    embedding: Flags
    """True for embeddings: few inputs use a row, so that most rows have no gradient at any step."""
    trainable: Flags
    modules: NDArray[np.int64]
    """Number of the module that owns each parameter: equal for a weight and its bias."""
    peers: Sequence[NDArray[np.int64]]
    """Numbers of sets of parameters whose names differ in one index only, an array for each index that names have.
    ``experts.3.0.weight`` and ``experts.7.0.weight`` are peers by the first one; -1 where a name has no such index."""
    experts: NDArray[np.int64]
    """Number of the set of experts that a parameter belongs to by its name; -1 where it belongs to none."""

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> Self:
        """Return the parameters of a registered run."""
        depth = [index if entry.depth is None else entry.depth for index, entry in enumerate(parameters)]
        return cls(
            names=[entry.name for entry in parameters],
            depth=np.array(depth, np.int64),
            order=np.argsort(np.array(depth, np.int64), kind="stable"),
            elements=np.array([float(math.prod(entry.shape)) for entry in parameters]),
            units=np.array([float(entry.units) for entry in parameters]),
            matrix=np.array([sum(size > 1 for size in entry.shape) >= 2 for entry in parameters], np.bool_),
            embedding=np.array([entry.kind in _EMBEDDINGS for entry in parameters], np.bool_),
            trainable=np.array([entry.trainable for entry in parameters], np.bool_),
            modules=_set_numbers([_module_of(entry.name) for entry in parameters]),
            peers=_peers(parameters),
            experts=_set_numbers([_expert_set_of(entry.name) for entry in parameters]),
        )

    @cached_property
    def pickled(self) -> bytes:
        """The parameters for another process."""
        return pickle.dumps(self, 5)

    @cached_property
    def matrices(self) -> Indices:
        """Indices of trainable weight matrices without embeddings, from input to output."""
        return self.by_depth(self.trainable & (self.elements > 0) & self.matrix & ~self.embedding)

    @cached_property
    def vectors(self) -> Indices:
        """Indices of trainable biases and gains, from input to output."""
        return self.by_depth(self.trainable & (self.elements > 0) & ~self.matrix)

    @cached_property
    def root_elements(self) -> Floats:
        """Square root of the number of elements, at least 1."""
        return np.sqrt(np.maximum(self.elements, 1.0))

    @cached_property
    def least_weight(self) -> Floats:
        """A tenth of the norm of an orthonormal matrix with as many units."""
        return 0.1 * np.sqrt(self.units)

    def by_depth(self, flags: Flags) -> Indices:
        """Return the indices of the flagged parameters, from input to output."""
        return self.order[flags[self.order]]


def _module_of(name: str) -> str:
    """Return the module of a parameter; each layer and direction of a recurrent module counts as a module."""
    path, _, own = name.rpartition(".")
    return f"{path}.{own.partition('_l')[2]}"


def _set_numbers(keys: Sequence[object]) -> NDArray[np.int64]:
    """Return a number for each key, equal for equal keys; -1 for None."""
    numbers: dict[object, int] = {}
    return np.array([-1 if key is None else numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _peers(parameters: Sequence[Parameter]) -> list[NDArray[np.int64]]:
    names = [entry.name.split(".") for entry in parameters]
    indices = [[place for place, part in enumerate(parts) if part.isdecimal()] for parts in names]
    return [
        _set_numbers(
            [
                (*parts[: found[rank]], *parts[found[rank] + 1 :], tuple(entry.shape)) if rank < len(found) else None
                for parts, found, entry in zip(names, indices, parameters, strict=True)
            ]
        )
        for rank in range(max(map(len, indices), default=0))
    ]


def _expert_set_of(name: str) -> str | None:
    """Return the path of the set of experts, such as ``blocks.2.experts`` for ``blocks.2.experts.3.weight``."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if "expert" in part.lower():
            return ".".join([*parts[:place], part.rstrip("0123456789_")])
    return None


def any_in_set(sets: NDArray[np.int64], flags: Flags) -> Flags:
    """Return for each parameter whether a flag of its set is True; False where it is in no set."""
    flagged = np.zeros(int(sets.max(initial=-1)) + 2, np.bool_)
    flagged[sets[flags]] = True
    flagged[-1] = False  # -1 addresses the last place, which belongs to those in no set
    return flagged[sets]


def largest_in_set(sets: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each parameter the largest count in its set; 0 where it is in no set."""
    largest = np.zeros(int(sets.max(initial=-1)) + 2, np.int64)
    np.maximum.at(largest, sets, counts)
    largest[-1] = 0  # likewise
    return largest[sets]


def rank_correlation(values: Floats) -> float:
    """Return Spearman's rank correlation of values with their position; 0 where all are equal."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)
    if np.ptp(values) == 0.0:
        return 0.0
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])


def log10(values: Floats) -> Floats:
    """Return log10 of norms, that of ``TINY`` for smaller ones."""
    logs: Floats = np.log10(np.maximum(values, TINY))
    return logs


def attenuation(logs: Floats) -> float:
    """Return by how many decades the first third of logarithms lies below the last third, by their medians."""
    third = max(1, len(logs) // 3)
    return median(logs[-third:]) - median(logs[:third])


@dataclass(frozen=True, eq=False)
class Profile:
    """Numbers of one sample that several rules and ``/metrics`` use; all arrays have the shape (parameters,)."""

    gradient: Floats
    weight: Floats
    present: Flags
    """True where there was a gradient."""
    finite: Flags
    """True where there was a gradient and it was finite."""
    nonfinite: Flags
    """True where there was a gradient with a NaN or an infinity in it; its norm may be finite."""
    ratio: Floats
    """``gradient / (weight + RATIO_EPS)``; NaN where the gradient is missing or not finite."""
    rms: Floats
    """Root mean square of the gradient, ``gradient / sqrt(elements)``; NaN likewise."""
    leverage: Floats
    """``gradient * weight / |loss|``: the relative change of the loss for a relative change of the parameter.

    It is free of every scale (of the loss, of the weights). NaN where no loss is known. The weight counts as at least a
    tenth of an orthonormal matrix's norm, so that matrices that start at zero do not look useless.
    """
    matrices: Indices
    """Indices of weight matrices with a finite gradient, without embeddings, from input to output."""
    vectors: Indices
    """Indices of biases and gains with a finite gradient, from input to output."""
    loss: float
    """NaN where the loss is not known or not finite."""
    global_gradient: float
    """L2 norm over all finite gradients, before any clipping."""
    first_weight: Floats | None
    """Weight norms at the first sample, NaN for a parameter that came later; None at the first sample."""

    @cached_property
    def zero(self) -> Flags:
        """True where there was a gradient of exactly zero."""
        zero: Flags = self.present & (self.gradient == 0.0)
        return zero

    @cached_property
    def nonzero(self) -> Flags:
        """True where there was a gradient other than zero, finite or not."""
        nonzero: Flags = self.present & (self.gradient != 0.0)
        return nonzero

    @cached_property
    def alive(self) -> Flags:
        """True where there was a finite gradient other than zero."""
        return self.finite & (self.gradient > 0.0)

    @cached_property
    def all_alive(self) -> bool:
        """Whether every parameter is alive, as at nearly every sample of most runs."""
        return bool(self.alive.all())

    @cached_property
    def overflowed(self) -> bool:
        """Whether the norm of some gradient is not finite."""
        return not np.array_equal(self.finite, self.present)

    @cached_property
    def growth(self) -> Floats:
        """Log10 of the growth of each weight matrix since the first sample, from input to output.

        The growth is 0 for a matrix that began below a hundredth: a matrix that began at zero grows without limit.
        """
        members = self.matrices
        if not members.size or self.first_weight is None:
            return np.zeros(len(members))
        now, first = self.weight[members], self.first_weight[members]
        began = np.maximum(np.where(np.isnan(first), now, first), TINY)
        grew: Floats = np.log10(np.maximum(now, TINY) / began)
        grew[began < 10 * RATIO_EPS] = 0.0
        return grew

    @cached_property
    def typical_growth(self) -> float:
        """Median of ``growth``; 0 without matrices or at the first sample."""
        return median(self.growth) if self.matrices.size and self.first_weight is not None else 0.0

    @property
    def growth_times(self) -> Floats:
        """How many times over each weight matrix has grown, shape (parameters,); 1 for other parameters."""
        times = np.ones(len(self.weight))
        times[self.matrices] = 10.0**self.growth
        return times

    @cached_property
    def leverages(self) -> Floats:
        """Leverage of each weight matrix, from input to output."""
        return self.leverage[self.matrices]

    @cached_property
    def typical_leverage(self) -> float:
        """Median of ``leverages``; NaN without matrices."""
        return median(self.leverages) if self.matrices.size else math.nan

    def typical(self, values: Floats) -> float:
        """Return the median of ``values`` over the weight matrices; NaN without matrices."""
        return median(values[self.matrices]) if self.matrices.size else math.nan

    def decades_per_layer(self, members: Indices) -> float:
        """Return the slope of log10 of the gradient's RMS over ``members``; NaN for fewer than two.

        The slope is positive where the gradient fades on its way from the output to the input. The chain rule's factor
        of one layer is ``10 ** -slope``.

        Args:
            members: indices of parameters from input to output.
        """
        if len(members) < 2:
            return math.nan
        places = np.arange(len(members)) - (len(members) - 1) / 2
        return float(places @ log10(self.rms[members]) / (places @ places))

    def underflows(self, members: Indices) -> bool:
        """Return whether the gradient fades over ``members`` so far that a zero nearer to the input is an underflow.

        Args:
            members: indices of parameters with a gradient other than zero, from input to output.
        """
        if len(members) < 3:
            return False
        logs = log10(self.rms[members])
        return median(logs[-(len(logs) // 3) :]) - float(logs[0]) > _UNDERFLOW_DECADES


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Everything measured at one step."""

    step: int
    at: float
    """Unix seconds."""
    statistics: Mapping[Statistic, Vector]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Scalars of the run at this step, the loss among them."""
    losses: Sequence[tuple[int, float]] = ()
    """(step, loss) of every step since the last sample, this one included, as far as the agent reported them."""

    def every_loss(self) -> list[float]:
        """Return the losses since the last sample: of every step if known, else of this step, else none."""
        losses = [loss for _, loss in self.losses]
        return losses or ([self.scalars["loss"]] if "loss" in self.scalars else [])

    def settled_loss(self, loss: float) -> float:
        """Return the median of the losses of the last five steps, which no single spike moves; ``loss`` if unknown."""
        last = [loss if math.isfinite(loss) else math.inf for _, loss in self.losses[-_SETTLED_LOSSES:]]
        return median(last) if len(last) == _SETTLED_LOSSES else loss

    def vector(self, name: Statistic, size: int) -> Floats:
        """Return a statistic as float64, shape (size,), with MISSING where it was not measured."""
        found = self.statistics.get(name)
        if found is not None and len(found) == size:
            return found.astype(np.float64)
        vector = np.full(size, MISSING)
        if found is not None:
            vector[: len(found)] = found
        return vector

    def clipped_share(self, size: int) -> Floats:
        """Return the share of clipped units among those with a gradient, shape (size,); MISSING if not measured.

        Clipping never scales a unit without a gradient, such as a ReLU that no input of the batch activates.
        """
        clipped, silent = self.vector("clipped_unit_share", size), self.vector("zero_unit_share", size)
        living = 1.0 - np.clip(silent, 0.0, 1.0)
        return np.where(clipped > 0.0, np.minimum(clipped / np.maximum(living, 1e-6), 1.0), clipped)

    def profile(self, parameters: RunParameters, first_weights: Floats | None = None) -> Profile:
        """Return the numbers that the rules share; ``first_weights`` are the weight norms at the run's first sample."""
        size = len(parameters.names)
        gradient, weight = self.vector("grad_norm", size), self.vector("weight_norm", size)
        present = gradient != MISSING
        finite = present & np.isfinite(gradient)
        loss = self.scalars.get("loss", math.nan)
        loss = loss if math.isfinite(loss) else math.nan
        everything = bool(finite.all())
        known = gradient if everything else np.where(finite, gradient, np.nan)
        usable = finite & np.isfinite(weight)
        whole = bool(usable.all())
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return Profile(
                gradient=gradient,
                weight=weight,
                present=present,
                finite=finite,
                nonfinite=present & (~finite | (self.vector("nonfinite_count", size) > 0.0)),
                ratio=known / (np.maximum(weight, 0.0) + RATIO_EPS),
                rms=known / parameters.root_elements,
                leverage=_leverage(known, np.maximum(weight, parameters.least_weight), loss),
                matrices=parameters.matrices if whole else parameters.matrices[usable[parameters.matrices]],
                vectors=parameters.vectors if whole else parameters.vectors[usable[parameters.vectors]],
                loss=loss,
                global_gradient=math.sqrt(np.square(gradient if everything else gradient[finite]).sum()),
                first_weight=None if first_weights is None else extended(first_weights, size, np.nan),
            )


def _leverage(gradient: Floats, weight: Floats, loss: float) -> Floats:
    return np.full(len(gradient), np.nan) if math.isnan(loss) else gradient * weight / max(abs(loss), 1e-30)
