"""Passes what each rank knows to rank 0, through the key-value store that the process group was opened with.

None of this is a collective operation, and none of it runs on the training thread: each rank leaves its documents in
the store, and rank 0 takes them when they are there. A rank that is late, gone or disarmed costs samples, never time.
The agent has a connection of its own to the store, which outlives ``destroy_process_group()``.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from torch import distributed, nn

from gradwatch.model.discovery import parameters_of
from gradwatch.model.flat_parameters import flat_reason, uses_fsdp1
from gradwatch.ranks.holdings import Holdings, is_sharded, uses_pipelining
from gradwatch.ranks.parts import ClipPart, RankPart
from gradwatch.statistics import JOINED

_STORE_TIMEOUT: Final = timedelta(seconds=5)
"""Longest wait for an answer of the store."""
_agent_numbers = itertools.count()
"""Every rank attaches the same agents in the same order, so that the same number means the same agent."""
_T = TypeVar("_T")
_POLL_SECONDS: Final = 0.02
_STORED_PARTS: Final = 64
"""Parts that a rank leaves in the store for rank 0."""


class StoreGone(Exception):
    """The store does not answer: the process that kept it has ended."""


class LossSeries(msgspec.Struct, frozen=True, array_like=True):
    """LossSeries of some steps on one rank."""

    steps: list[int]
    values: list[float]


class Asked(msgspec.Struct, frozen=True):
    """What rank 0 asks of the other ranks; it may ask anew when the model has changed."""

    parts: list[int]
    """Ranks that measure their parts of each sample; the others have nothing to add."""
    losses: list[int]
    """Ranks that tell the losses of all steps."""


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """A ``RankPart`` as it lies in the store."""

    version: int
    units: bytes
    rows: bytes
    limits: bytes
    clips: list[ClipPart]


@dataclass(slots=True)
class RankExchange:
    """Passes documents from all ranks to rank 0, and what rank 0 asks for to the others.

    Every method but ``open_store`` may raise ``StoreGone``.

    Args:
        name: the same on every rank for one agent, and another for the next agent.
        rank: rank of this process.
        size: number of ranks.
        divided: whether the ranks are known to hold different parts of the model.
        store: the store of the process group.
        own_connection: whether the connection to the store is the agent's own: a rank that waits on the process
            group's would hold up the training, and does not learn which run goes on.
    """

    name: str
    rank: int
    size: int
    divided: bool
    store: Any
    own_connection: bool = True
    given_up: bool = False
    """Whether nothing more may be asked of the store."""
    _published: deque[str] = field(default_factory=deque)
    """Keys of the parts that this rank left in the store, the oldest first."""
    _documents: int = 0
    """Number of documents with losses that this rank has left in the store."""
    _taken: dict[int, int] = field(default_factory=dict)
    """Rank -> number of its documents with losses that were taken."""

    # Any rank

    def declare(self, version: int, holdings: Holdings) -> None:
        """Tell what this rank holds; a later version replaces an earlier one."""
        self._set(f"holdings/{self.rank}/{version}", holdings)

    def publish(self, step: int, version: int, part: RankPart) -> None:
        """Leave this rank's part of a step in the store for rank 0."""
        key = f"part/{step}/{self.rank}"
        arrays = part.units.tobytes(), part.rows.tobytes(), part.limits.tobytes()
        self._set(key, _Part(version, *arrays, list(part.clips)))
        self._published.append(key)
        while len(self._published) > _STORED_PARTS:
            self._delete(self._published.popleft())

    def tell_losses(self, losses: LossSeries) -> None:
        """Tell the losses of some steps."""
        self._set(f"losses/{self.rank}/{self._documents}", losses)
        self._documents += 1

    def name_burst(self, step: int) -> None:
        """Name a step from which on all ranks take samples."""
        with self._answers():
            number = self.store.add(f"gradwatch/{self.name}/bursts", 1) - 1
        self._set(f"burst/{number}", step)

    def burst(self, number: int) -> int | None:
        """Return the ``number``-th step that was named, counted from 0; None while there are not as many."""
        return self._get(f"burst/{number}", int)

    def end(self) -> None:
        """Tell that nothing more will come from this rank."""
        self._set(f"ended/{self.rank}", True)

    def asked(self, number: int) -> Asked | None:
        """Return what rank 0 has asked for the ``number``-th time; None while it has not."""
        return self._get(f"asked/{number}", Asked)

    def start(self, timeout_seconds: float) -> tuple[str, int]:
        """Wait until rank 0 has told which run it goes on with; empty and 0 for none, and where it does not tell."""
        told = None
        until = time.monotonic() + timeout_seconds
        while self.own_connection and (told := self._get("start", tuple[str, int])) is None:
            if time.monotonic() >= until:
                break
            time.sleep(_POLL_SECONDS)
        return told or ("", 0)

    # Rank 0

    def tell_start(self, run: str, step: int) -> None:
        """Tell the other ranks which run goes on, and which of its steps is the last one."""
        self._set("start", (run, step))

    def ask(self, number: int, asked: Asked) -> None:
        """Ask the other ranks for what is needed."""
        self._set(f"asked/{number}", asked)

    def holdings(self, rank: int, version: int) -> Holdings | None:
        """Return what another rank has told that it holds; None while it has not."""
        return self._get(f"holdings/{rank}/{version}", Holdings)

    def collect(self, step: int, ranks: Iterable[int]) -> dict[int, tuple[int, RankPart]] | None:
        """Take the parts of a step from the store, each with the version of its holdings; None until all are there."""
        keys = {rank: f"part/{step}/{rank}" for rank in ranks}
        if keys and not self._check(keys.values()):
            return None
        found = {}
        for rank, key in keys.items():
            part = self._get(key, _Part)
            self._delete(key)
            if part is None:
                return None
            units, rows, limits = (np.frombuffer(each, np.float64) for each in (part.units, part.rows, part.limits))
            found[rank] = part.version, RankPart(units, rows.reshape(len(JOINED), -1), limits, part.clips)
        return found

    def all_published(self, step: int, ranks: Iterable[int]) -> bool:
        """Return whether the parts of a step are all there."""
        return self._check(f"part/{step}/{rank}" for rank in ranks)

    def take_losses(self, rank: int) -> list[LossSeries]:
        """Take the losses that another rank has told since the last call."""
        found: list[LossSeries] = []
        while True:
            number = self._taken.get(rank, 0)
            losses = self._get(f"losses/{rank}/{number}", LossSeries)
            if losses is None:
                return found
            self._delete(f"losses/{rank}/{number}")
            self._taken[rank] = number + 1
            found.append(losses)

    def have_ended(self, ranks: Iterable[int]) -> bool:
        """Return whether nothing more will come from any of some ranks."""
        return self._check(f"ended/{rank}" for rank in ranks)

    # The store

    def _check(self, keys: Iterable[str]) -> bool:
        with self._answers():
            return bool(self.store.check([f"gradwatch/{self.name}/{key}" for key in keys]))

    def _get(self, key: str, kind: type[_T]) -> _T | None:
        if not self._check([key]):
            return None
        with self._answers():
            return msgspec.msgpack.decode(self.store.get(f"gradwatch/{self.name}/{key}"), type=kind)

    def _set(self, key: str, document: Any) -> None:
        with self._answers():
            self.store.set(f"gradwatch/{self.name}/{key}", msgspec.msgpack.encode(document))

    def _delete(self, key: str) -> None:
        with self._answers():
            self.store.delete_key(f"gradwatch/{self.name}/{key}")

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        if self.given_up:
            raise StoreGone("the program ends")
        try:
            yield
        except (RuntimeError, OSError) as error:  # torch's errors of stores and of the network
            raise StoreGone(str(error)) from error


def exchange_for(models: Sequence[nn.Module]) -> RankExchange | None:
    """Return the exchange with the other ranks; None where this rank is alone or each rank is known to hold everything.

    Whether ranks that hold unsharded models hold the same ones shows only when they have told each other.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    divided = uses_pipelining() or _is_divided(models)
    if not divided and all(map(_is_on_every_rank, models)):
        return None
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return RankExchange(str(next(_agent_numbers)), rank, size, divided, *_open_store())


def _is_divided(models: Sequence[nn.Module]) -> bool:
    """Return whether this rank holds only shards of some parameters."""
    return uses_fsdp1(models) or any(map(is_sharded, parameters_of(models)))


def _is_on_every_rank(model: nn.Module) -> bool:
    """Return whether PyTorch keeps copies of a model equal on all ranks."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return False
    return distributed.get_world_size(model.process_group) == distributed.get_world_size()


def _open_store() -> tuple[Any, bool]:
    """Return the store of the process group, and whether with a connection of its own, which nobody else waits on."""
    store: Any = distributed.distributed_c10d._get_default_store()  # noqa: SLF001
    try:
        own = store.clone()
        own.set_timeout(_STORE_TIMEOUT)
    except (AttributeError, NotImplementedError, RuntimeError):
        return store, False  # a store of another kind, or PyTorch before 2.7: it is used as it is
    return own, True


def incomplete_reason(models: Sequence[nn.Module], exchange: RankExchange | None) -> str:
    """Return why this rank can measure only a part of the models; empty where it can measure all of it.

    Args:
        models: the watched models.
        exchange: the exchange with the other ranks, as ``exchange_for`` returned it when the agent was attached.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return ""
    reason = flat_reason(models)
    if reason:
        return reason
    divided = exchange is not None and exchange.divided
    if not divided and _is_divided(models):
        return "the model was sharded after attach(), the other ranks do not measure: attach after fully_shard"
    return ""
