"""One sample as the rules see it, over the run's parameters as arrays."""

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gradwatch.statistics import UNIT_EPS
from gradwatch.wire import MISSING, Parameter, Statistic, Vector

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

TINY = 1e-45
"""The smallest positive float32: stands for zero on a logarithmic scale."""
_SETTLED = 5
_LOOKUPS = ("Embedding", "EmbeddingBag")


def median(values: Sequence[float] | Floats) -> float:
    """Return the median, bit for bit that of ``np.median``, in a fifth of its time on a few hundred numbers."""
    ordered = np.array(values)
    ordered.sort()
    middle = len(ordered) // 2
    if math.isnan(ordered[-1]) or len(ordered) % 2:
        return float(ordered[-1] if math.isnan(ordered[-1]) else ordered[middle])
    return (float(ordered[middle - 1]) + float(ordered[middle])) / 2


def grown(vector: NDArray[Any] | None, size: int, value: float) -> NDArray[Any]:
    """Return a remembered vector, lengthened by ``value`` to ``size``: a run may append parameters."""
    if vector is not None and len(vector) == size:
        return vector
    known = np.zeros(0, type(value)) if vector is None else vector
    return np.concatenate([known, np.full(size - len(known), value, known.dtype)])


@dataclass(frozen=True, eq=False)
class RunParameters:
    """The parameters of a run, in the order of its vectors; all arrays of shape (parameters,)."""

    names: list[str]
    depth: NDArray[np.int64]
    order: Indices
    """Indices from input to output."""
    elements: Floats
    units: Floats
    matrix: Flags
    """Weights with two or more dimensions above 1: where signals are multiplied from layer to layer."""
    lookup: Flags
    """Embeddings: each row is used by few inputs, so that most rows have no gradient at any step."""
    trainable: Flags
    owners: NDArray[np.int64]
    """Number of the module that owns each parameter: equal for a weight and its bias."""
    peers: Sequence[NDArray[np.int64]]
    """Numbers of sets of parameters that differ in one index of their names only, for each index that there is:
    ``experts.3.0.weight`` and ``experts.7.0.weight`` are peers by the first one; -1 where there is no such index."""
    choice: NDArray[np.int64]
    """Number of the set of experts that a parameter belongs to, by its name; -1: none."""

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> Self:
        """Return the layout of a registered run."""
        depth = np.array(
            [index if entry.depth is None else entry.depth for index, entry in enumerate(parameters)], np.int64
        )
        modules: dict[str, int] = {}
        owners = [modules.setdefault(_owner(entry.name), len(modules)) for entry in parameters]
        return cls(
            names=[entry.name for entry in parameters],
            depth=depth,
            order=np.argsort(depth, kind="stable"),
            elements=np.array([float(math.prod(entry.shape)) for entry in parameters]),
            units=np.array([float(entry.units) for entry in parameters]),
            matrix=np.array([sum(size > 1 for size in entry.shape) >= 2 for entry in parameters], np.bool_),
            lookup=np.array([entry.kind in _LOOKUPS for entry in parameters], np.bool_),
            trainable=np.array([entry.trainable for entry in parameters], np.bool_),
            owners=np.array(owners, np.int64),
            peers=_peers(parameters),
            choice=_numbered([_choice(entry.name) for entry in parameters]),
        )

    @cached_property
    def pickled(self) -> bytes:
        """The layout for another process."""
        return pickle.dumps(self, 5)

    @cached_property
    def matrices(self) -> Indices:
        """Indices of trainable weight matrices, embeddings apart, from input to output."""
        return self.order[(self.trainable & (self.elements > 0) & self.matrix & ~self.lookup)[self.order]]

    @cached_property
    def vectors(self) -> Indices:
        """Indices of trainable biases and gains, from input to output."""
        return self.order[(self.trainable & (self.elements > 0) & ~self.matrix)[self.order]]

    @cached_property
    def root_elements(self) -> Floats:
        """Square root of the elements, at least 1."""
        return np.sqrt(np.maximum(self.elements, 1.0))

    @cached_property
    def least_weight(self) -> Floats:
        """A tenth of the norm of an orthonormal matrix with these units."""
        return 0.1 * np.sqrt(self.units)


def _owner(name: str) -> str:
    """Return the module of a parameter; layers and directions of one recurrent module are modules of their own."""
    path, _, own = name.rpartition(".")
    return f"{path}.{own.partition('_l')[2]}"


def _numbered(keys: Sequence[object]) -> NDArray[np.int64]:
    """Return the number of each key's set, -1 where it is none."""
    numbers: dict[object, int] = {}
    return np.array([-1 if key is None else numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _peers(parameters: Sequence[Parameter]) -> list[NDArray[np.int64]]:
    names = [entry.name.split(".") for entry in parameters]
    indices = [[place for place, part in enumerate(parts) if part.isdecimal()] for parts in names]
    return [
        _numbered(
            [
                (*parts[: found[rank]], *parts[found[rank] + 1 :], tuple(entry.shape)) if rank < len(found) else None
                for parts, found, entry in zip(names, indices, parameters, strict=True)
            ]
        )
        for rank in range(max(map(len, indices), default=0))
    ]


def _choice(name: str) -> str | None:
    """Return the path of the set of experts, such as ``blocks.2.experts`` for ``blocks.2.experts.3.weight``."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if "expert" in part.lower():
            return ".".join([*parts[:place], part.rstrip("0123456789_")])
    return None


def any_of(sets: NDArray[np.int64], flags: Flags) -> Flags:
    """Return for each parameter whether the flag is up for any in its set; False where it is in none."""
    return largest_of(sets, flags.astype(np.int64)) > 0


def largest_of(sets: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each parameter the largest count in its set; 0 where it is in none."""
    largest = np.zeros(int(sets.max(initial=-1)) + 2, np.int64)
    np.maximum.at(largest, sets, counts)  # the last place, which -1 means, is for those in no set
    largest[-1] = 0
    return largest[sets]


def rank_correlation(values: Floats) -> float:
    """Return Spearman's rank correlation of values with their position; 0 where all are equal."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)
    if np.ptp(values) == 0.0:
        return 0.0
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])


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
    """``gradient / (weight + UNIT_EPS)``; NaN where the gradient is missing or not finite."""
    rms: Floats
    """``gradient / sqrt(elements)``; likewise."""
    leverage: Floats
    """``gradient * weight / |loss|``: by how many times its relative change a parameter changes the loss, relatively.

    Free of every scale (of the loss, of the weights); NaN where no loss is known. The weight counts as at least a
    tenth of an orthonormal matrix's norm, so that matrices that start at zero are not taken for useless.
    """
    matrices: Indices
    """Indices of weight matrices, embeddings apart, with a finite gradient, from input to output."""
    vectors: Indices
    """Indices of biases and gains with a finite gradient, from input to output."""
    loss: float
    """NaN where it is not known or not finite."""
    global_gradient: float
    """L2 norm over all finite gradients, before any clipping."""
    first_weight: Floats | None
    """Weight norms at the first sample, NaN where a parameter was not there; none: this is the first."""

    @property
    def global_weight(self) -> float:
        """L2 norm over the weights of the parameters with a finite gradient."""
        weights = self.weight[self.finite]
        return float(np.sqrt(np.square(weights[np.isfinite(weights)]).sum()))

    @cached_property
    def stirred(self) -> Flags:
        """True where there was a gradient other than zero, finite or not."""
        stirred: Flags = self.present & (self.gradient != 0.0)
        return stirred

    @cached_property
    def alive(self) -> Flags:
        """True where there was a finite gradient other than zero."""
        return self.finite & (self.gradient > 0.0)

    @cached_property
    def all_alive(self) -> bool:
        """Whether every parameter had one, as at nearly every sample of most runs."""
        return bool(self.alive.all())

    @cached_property
    def overflowed(self) -> bool:
        """Whether some gradient is there and not finite."""
        return not np.array_equal(self.finite, self.present)

    @cached_property
    def growth(self) -> Floats:
        """Log10 of the growth of each of the weight matrices since the first sample, from input to output.

        A matrix counts as at least a hundredth when it began: the growth of one that began at zero says nothing.
        """
        members = self.matrices
        if not members.size or self.first_weight is None:
            return np.zeros(len(members))
        now, first = self.weight[members], self.first_weight[members]
        began = np.maximum(np.where(np.isnan(first), now, first), TINY)
        grew: Floats = np.log10(np.maximum(now, TINY) / began)
        grew[began < 10 * UNIT_EPS] = 0.0
        return grew

    @cached_property
    def typical_growth(self) -> float:
        """The median of ``growth``; 0 where there is none."""
        return median(self.growth) if self.matrices.size and self.first_weight is not None else 0.0

    @cached_property
    def leverages(self) -> Floats:
        """Leverage of each of the weight matrices, from input to output."""
        return self.leverage[self.matrices]

    @cached_property
    def typical_leverage(self) -> float:
        """The median of ``leverages``; NaN where there is none."""
        return median(self.leverages) if self.matrices.size else math.nan

    def typical(self, values: Floats) -> float:
        """Return the median of ``values`` over the weight matrices; NaN where there is none."""
        return median(values[self.matrices]) if self.matrices.size else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One sample."""

    step: int
    at: float
    """Unix seconds."""
    statistics: Mapping[Statistic, Vector]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Scalars of the run at this step, the loss among them."""
    losses: Sequence[tuple[int, float]] = ()
    """Step and loss of every step since the last sample, this one included, where the agent told them."""

    def every_loss(self) -> list[float]:
        """Return the losses since the last sample, at least this step's, where any is known."""
        told = [loss for _, loss in self.losses]
        return told or ([self.scalars["loss"]] if "loss" in self.scalars else [])

    def settled_loss(self, loss: float) -> float:
        """Return the median of the last five losses where every step's are known, else ``loss``: no single spike."""
        told = [told if math.isfinite(told) else math.inf for _, told in self.losses[-_SETTLED:]]
        return median(told) if len(told) == _SETTLED else loss

    def vector(self, name: Statistic, size: int) -> Floats:
        """Return a statistic, shape (size,), float64; all missing where it was not measured."""
        found = self.statistics.get(name)
        if found is not None and len(found) == size:
            return found.astype(np.float64)
        vector = np.full(size, MISSING)
        if found is not None:
            vector[: len(found)] = found
        return vector

    def clipped_share(self, size: int) -> Floats:
        """Return the share of clipped units among those that have a gradient, shape (size,); MISSING if not measured.

        A unit without a gradient, such as a ReLU that no input of the batch activates, is never scaled down.
        """
        clipped, silent = self.vector("clipped_unit_share", size), self.vector("zero_unit_share", size)
        living = 1.0 - np.clip(silent, 0.0, 1.0)
        return np.where(clipped > 0.0, np.minimum(clipped / np.maximum(living, 1e-6), 1.0), clipped)

    def profile(self, layout: RunParameters, first_weights: Floats | None = None) -> Profile:
        """Return what the rules share; ``first_weights`` are the weight norms at the run's first sample."""
        size = len(layout.names)
        gradient, weight = self.vector("grad_norm", size), self.vector("weight_norm", size)
        present = gradient != MISSING
        finite = present & np.isfinite(gradient)
        loss = self.scalars.get("loss", math.nan)
        loss = loss if math.isfinite(loss) else math.nan
        everything = bool(finite.all())
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            known = gradient if everything else np.where(finite, gradient, np.nan)
            ratio = known / (np.maximum(weight, 0.0) + UNIT_EPS)
            rms = known / layout.root_elements
            leverage = (
                np.full(size, np.nan)
                if math.isnan(loss)
                else known * np.maximum(weight, layout.least_weight) / max(abs(loss), 1e-30)
            )
        usable = finite & np.isfinite(weight)
        norms = gradient if everything else gradient[finite]
        whole = bool(usable.all())
        return Profile(
            gradient=gradient,
            weight=weight,
            present=present,
            finite=finite,
            ratio=ratio,
            rms=rms,
            leverage=leverage,
            matrices=layout.matrices if whole else layout.matrices[usable[layout.matrices]],
            vectors=layout.vectors if whole else layout.vectors[usable[layout.vectors]],
            loss=loss,
            global_gradient=math.sqrt(np.square(norms).sum()),
            first_weight=None if first_weights is None else grown(first_weights, size, np.nan),
        )
