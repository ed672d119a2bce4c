"""Sharded training: each rank publishes its part of a sample, rank 0 collects the parts.

None of this is a collective operation, and none of it runs on the training thread: the parts go through the key-value
store that the process group was opened with, and rank 0 takes them from there when they are complete. A rank that is
late, gone or disarmed costs samples, never time.
"""

import itertools
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
from torch import Tensor, distributed, nn

from gradwatch.ranks.parts import RankPart
from gradwatch.statistics import JOINED

PARTS_TIMEOUT_SECONDS: Final = 30.0
"""How long rank 0 waits for the parts of a sample."""
_agent_numbers = itertools.count()
"""Every rank attaches the same agents in the same order, so that the same number means the same agent."""
_STORED_PARTS: Final = 64
"""Parts that a rank leaves in the store for rank 0."""


@dataclass(slots=True)
class RankExchange:
    """Passes the parts of samples from all ranks to rank 0.

    Args:
        name: the same on every rank for one agent, and another for the next agent.
        rank: rank of this process.
        size: number of ranks.
    """

    name: str
    rank: int
    size: int
    _published: deque[str] = field(default_factory=deque)
    """Keys of the parts that this rank left in the store, the oldest first."""

    def publish(self, step: int, part: RankPart) -> None:
        """Leave this rank's part of a step in the store for rank 0."""
        store = _store()
        content = {"units": part.units.tobytes(), "rows": part.rows.tobytes(), "totals": part.totals}
        key = self._key(step, self.rank)
        store.set(key, msgspec.msgpack.encode(content))
        self._published.append(key)
        while len(self._published) > _STORED_PARTS:
            store.delete_key(self._published.popleft())

    def collect(self, step: int) -> list[RankPart] | None:
        """Take the other ranks' parts of a step from the store; None while they are not complete."""
        if not self.all_published(step):
            return None
        store = _store()
        parts = []
        for key in self._keys_of_others(step):
            content = msgspec.msgpack.decode(store.get(key))
            store.delete_key(key)
            rows = np.frombuffer(content["rows"], np.float64).reshape(len(JOINED), -1)
            parts.append(RankPart(np.frombuffer(content["units"], np.float64), rows, content["totals"]))
        return parts

    def all_published(self, step: int) -> bool:
        """Return whether all other ranks have published their parts of a step."""
        return bool(_store().check(self._keys_of_others(step)))

    def _keys_of_others(self, step: int) -> list[str]:
        return [self._key(step, rank) for rank in range(1, self.size)]

    def _key(self, step: int, rank: int) -> str:
        return f"gradwatch/{self.name}/{step}/{rank}"


def exchange_for(models: Sequence[nn.Module]) -> RankExchange | None:
    """Return the exchange with the other ranks where the models are sharded; None where each rank holds everything."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if not any(is_sharded(parameter) for model in models for parameter in model.parameters()):
        return None
    return RankExchange(str(next(_agent_numbers)), distributed.get_rank(), distributed.get_world_size())


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a shard of a tensor."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def is_partial(norm: Tensor) -> bool:
    """Return whether a norm is this rank's part of the whole norm."""
    return any(placement.is_partial() for placement in getattr(norm, "placements", ()))


def uses_fsdp1(models: Sequence[nn.Module]) -> bool:
    """Return whether FSDP1 shards the models: its flat parameters do not say which parameters they hold."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None:
        return False
    wrappers = [
        inner for model in models for inner in model.modules() if isinstance(inner, module.FullyShardedDataParallel)
    ]
    if wrappers:
        return any(wrapper.sharding_strategy.name != "NO_SHARD" for wrapper in wrappers)
    return any(getattr(parameter, "_fsdp_flattened", False) for model in models for parameter in model.parameters())


def incomplete_reason(models: Sequence[nn.Module], exchange: RankExchange | None) -> str:
    """Return why this rank can measure only a part of the models; empty where it can measure all of it.

    Args:
        models: the watched models.
        exchange: the exchange with the other ranks, as ``exchange_for`` returned it when the agent was attached.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return ""
    if uses_fsdp1(models):
        return "FullyShardedDataParallel (FSDP1) leaves each rank a part of the parameters: use fully_shard (FSDP2)"
    if exchange is None and any(is_sharded(parameter) for model in models for parameter in model.parameters()):
        return "the model was sharded after attach(), the other ranks do not measure: attach after fully_shard"
    return ""


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()  # noqa: SLF001


@dataclass(slots=True)
class PartsDeadline:
    """The time until which rank 0 waits for the parts of a sample."""

    since: float = field(default_factory=time.monotonic)

    @property
    def has_passed(self) -> bool:
        """Return whether the other ranks are no longer waited for."""
        return time.monotonic() - self.since > PARTS_TIMEOUT_SECONDS
