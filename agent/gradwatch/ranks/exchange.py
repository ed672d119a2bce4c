"""Sharded training: each rank measures its part of every parameter, rank 0 puts the parts together.

Nothing of this is a collective, and nothing happens on the training thread: the parts go through the store that the
process group was opened with, and rank 0 takes them from there when they are complete. A rank that is late, gone or
disarmed costs samples, never time.
"""

import itertools
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from gradwatch.model.discovery import Watched
from gradwatch.ranks.sharding import split_of
from gradwatch.statistics import clip_coefficient
from gradwatch.wire import MISSING

Floats = NDArray[np.float64]

PATIENCE_SECONDS: Final = 30.0
"""How long rank 0 waits for the parts of a sample."""
_numbers = itertools.count()
"""Every rank attaches the same agents in the same order."""
_KEPT: Final = 64
"""Parts that a rank leaves in the store for rank 0."""

SUMMED: Final = ("zero_units", "units", "nonfinite", "clipped_units", "removed", "clipped", "gradient", "weight")
"""Rows of a part that add up over the ranks; the last four are squared norms, ``clipped`` before AGC where a unit lies
on several ranks."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one rank measured of one step, over the parameters of the run."""

    sums: Floats
    """Rows ``SUMMED``, shape (8, parameters); a part that this rank does not answer for is 0."""
    largest: Floats
    """Largest ratio of a unit, shape (parameters,); ``MISSING`` where there was no gradient."""
    totals: list[float]
    """This rank's part of the norms that clipping measured."""


@dataclass(slots=True)
class Shares:
    """What this rank answers for, each of shape (parameters,)."""

    mine: NDArray[np.bool_]
    """Its part is no copy of another rank's."""
    whole: NDArray[np.bool_]
    """Each of its units lies on one rank."""
    one_unit: NDArray[np.bool_]


def shares(watched: Sequence[Watched], rank: int) -> Shares:
    """Return what this rank answers for."""
    mine, whole = [], []
    for known in watched:
        parameter = known.parameter()
        mine.append(parameter is not None and _is_mine(parameter, rank))
        split = None if parameter is None else split_of(parameter, known.axis, known.groups, "unit")
        whole.append(split is None)
    one = [known.axis == "whole" or len(known.shape) < 2 for known in watched]
    return Shares(np.array(mine, np.bool_), np.array(whole, np.bool_), np.array(one, np.bool_))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a part of a tensor."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def _is_mine(parameter: Tensor, rank: int) -> bool:
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return rank == 0
    coordinate = cast("Any", parameter).device_mesh.get_coordinate()
    return coordinate is not None and not any(
        place for place, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )


@dataclass(slots=True)
class Ranks:
    """The way between the ranks.

    Args:
        name: the same on every rank for one agent, another one for the next.
    """

    name: str
    rank: int
    size: int
    _left: deque[str] = field(default_factory=deque)

    def offer(self, step: int, part: Part) -> None:
        """Leave this rank's part of a step for rank 0."""
        store = _store()
        content = {"sums": part.sums.tobytes(), "largest": part.largest.tobytes(), "totals": part.totals}
        key = self._key(step, self.rank)
        store.set(key, msgspec.msgpack.encode(content))
        self._left.append(key)
        while len(self._left) > _KEPT:
            store.delete_key(self._left.popleft())

    def collect(self, step: int) -> list[Part] | None:
        """Take what the other ranks left of a step; None while that is not complete."""
        store = _store()
        keys = [self._key(step, rank) for rank in range(1, self.size)]
        if not store.check(keys):
            return None
        parts = []
        for key in keys:
            content = msgspec.msgpack.decode(store.get(key))
            store.delete_key(key)
            sums = np.frombuffer(content["sums"], np.float64).reshape(len(SUMMED), -1)
            parts.append(Part(sums, np.frombuffer(content["largest"], np.float64), content["totals"]))
        return parts

    def is_passed(self, later: int) -> bool:
        """Return whether the other ranks have all left their parts of a later step."""
        return bool(_store().check([self._key(later, rank) for rank in range(1, self.size)]))

    def _key(self, step: int, rank: int) -> str:
        return f"gradwatch/{self.name}/{step}/{rank}"


def ranks_of(models: Sequence[nn.Module]) -> Ranks | None:
    """Return the way to the other ranks where the models are sharded; None where each rank holds everything."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if not any(is_sharded(parameter) for model in models for parameter in model.parameters()):
        return None
    return Ranks(str(next(_numbers)), distributed.get_rank(), distributed.get_world_size())


def is_flattened(models: Sequence[nn.Module]) -> bool:
    """Return whether FSDP1 shards the models: what it leaves of a parameter does not say what it is a part of."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None:
        return False
    wrappers = [
        inner for model in models for inner in model.modules() if isinstance(inner, module.FullyShardedDataParallel)
    ]
    if wrappers:
        return any(wrapper.sharding_strategy.name != "NO_SHARD" for wrapper in wrappers)
    return any(getattr(parameter, "_fsdp_flattened", False) for model in models for parameter in model.parameters())


def parts_only(models: Sequence[nn.Module], ranks: Ranks | None) -> str:
    """Return why this rank's numbers would be those of its part alone; empty where they are not.

    Args:
        models: what is watched.
        ranks: the way to the other ranks, as it was found at first.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return ""
    if is_flattened(models):
        return "FullyShardedDataParallel (FSDP1) leaves each rank a part of the parameters: use fully_shard (FSDP2)"
    if ranks is None and any(is_sharded(parameter) for model in models for parameter in model.parameters()):
        return "the model was sharded after attach(), the other ranks do not measure: attach after fully_shard"
    return ""


def is_partial(norm: Tensor) -> bool:
    """Return whether a norm is this rank's part of it."""
    return any(placement.is_partial() for placement in getattr(norm, "placements", ()))


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()  # noqa: SLF001


@dataclass(frozen=True, eq=False)
class Joined:
    """Statistics of the whole parameters, each of shape (parameters,); ``MISSING`` where there was no gradient."""

    grad_norm: Floats
    clipped_grad_norm: Floats
    weight_norm: Floats
    max_unit_ratio: Floats
    zero_unit_share: Floats
    nonfinite_count: Floats
    clipped_unit_share: Floats
    removed_norm: Floats
    totals: list[float]
    """Norms that clipping measured."""


def joined(parts: Sequence[Part], held: Shares, eps: float, limits: Floats, *, tensor_wise: bool) -> Joined:
    """Put the parts of all ranks together.

    Args:
        parts: one for each rank.
        held: of any rank; how the units lie is the same on all.
        eps: floor of a unit's weight norm.
        limits: largest ratio of each parameter under AGC, infinite where it is not clipped.
        tensor_wise: whether AGC takes a whole tensor as the unit.
    """
    sums = np.sum([part.sums for part in parts], axis=0)
    zero_units, units, nonfinite, clipped_units, removed, clipped, gradient, weight = sums
    largest = np.max([part.largest for part in parts], axis=0)
    missing = largest == MISSING
    with np.errstate(all="ignore"):
        grad_norm, weight_norm = np.sqrt(gradient), np.sqrt(weight)
        share, zero = clipped_units / np.maximum(units, 1.0), zero_units / np.maximum(units, 1.0)
        after, taken = np.sqrt(clipped), np.sqrt(removed)
        # A vector is one unit that lies on several ranks: what each saw of it says nothing by itself.
        vector = ~held.whole & held.one_unit
        largest = np.where(vector, grad_norm / np.maximum(weight_norm, eps), largest)
        largest = np.where(~held.whole & ~held.one_unit, MISSING, largest)
        zero = np.where(vector, grad_norm == 0.0, zero)
        alone = np.ones_like(vector) if tensor_wise else vector
        most = limits * (weight_norm + eps if tensor_wise else np.maximum(weight_norm, eps))
        scaled = np.isfinite(grad_norm) & (grad_norm > most)
        share = np.where(alone, scaled, share)
        after = np.where(alone & scaled, most, after)
        taken = np.where(alone, np.where(scaled, grad_norm - most, 0.0), taken)
    totals = [
        float(np.sqrt(np.sum(np.square(several)))) for several in zip(*(part.totals for part in parts), strict=True)
    ]
    return Joined(
        grad_norm=np.where(missing, MISSING, grad_norm),
        clipped_grad_norm=np.where(missing, MISSING, after),
        weight_norm=weight_norm,
        max_unit_ratio=np.where(missing, MISSING, largest),
        zero_unit_share=np.where(missing, MISSING, zero),
        nonfinite_count=np.where(missing, MISSING, nonfinite),
        clipped_unit_share=np.where(missing, MISSING, share),
        removed_norm=np.where(missing, MISSING, taken),
        totals=totals,
    )


@dataclass(slots=True)
class Patience:
    """How long rank 0 has waited for a sample."""

    since: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Return whether the other ranks are not waited for any more."""
        return time.monotonic() - self.since > PATIENCE_SECONDS


def unclipped(norm: Floats, total: float, max_norm: float) -> Floats:
    """Return norms before ``clip_grad_norm_`` scaled them."""
    with np.errstate(all="ignore"):
        return np.where(norm == MISSING, norm, norm / clip_coefficient(total, max_norm))
