"""The parameters of a run as arrays: their depth, their sizes, and which of them belong together by their names."""

import math
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gradwatch.wire import Parameter

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

_EMBEDDINGS = ("Embedding", "EmbeddingBag")


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
    layer: Flags
    """True for the weights of layers, by their names. Of a raw table of features few rows are used, as of an
    embedding."""
    modules: NDArray[np.int64]
    """Number of the module that owns each parameter: equal for a weight and its bias."""
    parts: NDArray[np.int64]
    """Number of the part of the model that each parameter belongs to by the beginning of its name, such as ``actor``;
    -1 for parts with fewer than two weight matrices, which go together."""
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
            layer=np.array(["weight" in entry.name.lower() for entry in parameters], np.bool_),
            modules=_set_numbers([_module_of(entry.name) for entry in parameters]),
            parts=_parts(parameters),
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
    """Return the module of a parameter; each layer and direction of a recurrent module counts as a module.

    ``fc.parametrizations.weight.original`` belongs to ``fc``, as ``fc.weight`` would without the parametrization.
    """
    path, _, own = name.rpartition(".")
    owner, parametrized, rest = path.rpartition(".parametrizations.")
    if parametrized:
        path, own = owner, rest
    return f"{path}.{own.partition('_l')[2]}"


def _set_numbers(keys: Sequence[object]) -> NDArray[np.int64]:
    """Return a number for each key, equal for equal keys; -1 for None."""
    numbers: dict[object, int] = {}
    return np.array([-1 if key is None else numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _parts(parameters: Sequence[Parameter]) -> NDArray[np.int64]:
    """Return the number of each parameter's part: what follows the beginning that all names share tells it."""
    names = [entry.name.split(".") for entry in parameters]
    shared = 0
    while names and all(len(parts) > shared + 1 for parts in names) and len({parts[shared] for parts in names}) == 1:
        shared += 1
    keys = [parts[shared] if len(parts) > shared + 1 else None for parts in names]
    matrices = Counter(
        key for key, entry in zip(keys, parameters, strict=True) if sum(size > 1 for size in entry.shape) >= 2
    )
    return _set_numbers([key if matrices[key] >= 2 else None for key in keys])


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
