"""What the diagnosis remembers of each run: held between batches, stored now and then, replayed from there."""

import secrets
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch import wire
from gradwatch.wire import STATISTICS, Trail
from gradwatch_server import diagnosis
from gradwatch_server.diagnosis import History, RunParameters, Sample, Thresholds
from gradwatch_server.diagnosis.history import VERSION
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.rollups.downsampling import REPLAYED_FIRST_SAMPLES, REPLAYED_LAST_SAMPLES
from gradwatch_server.store.rollups.series import TRAIL_STEPS

SAVED_EVERY_SAMPLES = 64
"""Samples after which what is remembered is stored: so many are replayed at most."""
_HELD_BYTES = 64 << 20
_LOSSES_KEPT = 1_024
"""Between two samples."""

_decode_trails = msgspec.msgpack.Decoder(dict[str, Trail])


@dataclass
class Watched:
    """What the diagnosis remembers of a run."""

    layout: RunParameters
    memory: History
    attempt: int
    losses: dict[int, float] = field(default_factory=dict)
    """Loss of each step since the last sample, which may have come in earlier batches."""
    unsaved: int = 0
    """Samples that what is stored of the memory does not know of."""
    fresh: bool = False
    """Whether it had to be loaded for this batch: a server that takes turns with this one is not to replay as much."""
    mark: str = ""
    """What the run's row holds as long as nobody else has changed what is remembered: see ``new_mark``."""

    @property
    def bytes(self) -> int:
        """What it takes in memory, about."""
        return 10_000 + 600 * len(self.layout.names) + 150 * len(self.losses)

    def resume(self, attempt: int) -> None:
        """Go on with what a new attempt starts with."""
        if attempt != self.attempt:
            self.attempt, self.memory, self.losses = attempt, self.memory.resumed(), {}

    def wait(self, losses: Mapping[int, float], after: int | None) -> None:
        """Keep the losses that no sample has been looked at with yet."""
        waiting = sorted(step for step in losses if after is None or step > after)
        self.losses = {step: losses[step] for step in waiting[-_LOSSES_KEPT:]}


class Memories:
    """The memories of the runs that report now, those heard of longest ago left out where they take too much.

    They are a cache: one is taken out while its run is dealt with, and is of use as long as the run's row holds its
    mark. It does not where another server took part, or where the transaction that it came from was undone.
    """

    def __init__(self, most_bytes: int = _HELD_BYTES) -> None:
        self._most = most_bytes
        self._held: OrderedDict[str, tuple[int, Watched]] = OrderedDict()
        self._bytes = 0
        self._changing = threading.Lock()

    def take(self, run_id: str) -> Watched | None:
        """Take out what is remembered of a run."""
        with self._changing:
            size, watched = self._held.pop(run_id, (0, None))
            self._bytes -= size
        return watched

    def put(self, run_id: str, watched: Watched) -> None:
        """Hold what is remembered of a run."""
        size = watched.bytes
        with self._changing:
            self._bytes += size - self._held.pop(run_id, (0, None))[0]
            self._held[run_id] = (size, watched)
            while self._bytes > self._most:
                self._bytes -= self._held.popitem(last=False)[1][0]


def new_mark(before: str | None = None) -> str:
    """Return another mark of a run's row: one for its parameters, which ``before`` had as well, one for the rest."""
    return f"{before.partition('/')[0] if before else secrets.token_hex(4)}/{secrets.token_hex(8)}"


def same_parameters(mark: str | None, other: str | None) -> bool:
    """Return whether two marks stand for the same parameters of a run."""
    return mark is not None and other is not None and mark.partition("/")[0] == other.partition("/")[0]


def save(connection: sa.Connection, run_id: str, watched: Watched, step: int | None) -> None:
    """Store what is remembered of a run up to a sample."""
    row = {"run": run_id, "attempt": watched.attempt, "step": step, "version": VERSION}
    connection.execute(_upsert(connection.dialect.name), row | {"body": watched.memory.to_bytes()})
    watched.unsaved = 0


@cache
def _upsert(engine: str) -> sa.Insert:
    table = schema.memories
    insert = upsert(engine, table)
    replaced = {column.name: insert.excluded[column.name] for column in table.c if not column.primary_key}
    return insert.on_conflict_do_update(index_elements=["run"], set_=replaced)


def load(connection: sa.Connection, run: sa.Row[Any], layout: RunParameters, thresholds: Thresholds) -> Watched:
    """Return what is remembered of a run: what is stored, and the samples that came after it."""
    row = connection.execute(sa.select(schema.memories).where(schema.memories.c.run == run.id)).one_or_none()
    if run.memory_mark is None or (row is not None and row.version != VERSION):
        return _replay_known(connection, run, layout, thresholds)
    watched, after = Watched(layout, History(), run.attempt, fresh=True), None
    if row is not None:
        watched.memory, watched.attempt, after = History.from_bytes(row.body), row.attempt, row.step
    if watched.attempt != run.attempt:
        after = None
    watched.resume(run.attempt)
    losses = _stored_losses(connection, run, after)
    for reading in _readings_since(connection, run, after, sorted(losses.items())):
        watched.memory, _ = diagnosis.diagnose(layout, watched.memory, reading, thresholds)
        watched.unsaved += 1
    watched.wait(losses, run.diagnosed_step)
    return watched


def between(losses: Sequence[tuple[int, float]], after: int | None, step: int) -> Sequence[tuple[int, float]]:
    """Return the losses, ordered by their steps, of the steps after one up to another."""
    first = 0 if after is None else bisect_right(losses, after, key=itemgetter(0))
    return losses[first : bisect_right(losses, step, key=itemgetter(0))][-_LOSSES_KEPT:]


def _replay_known(
    connection: sa.Connection, run: sa.Row[Any], layout: RunParameters, thresholds: Thresholds
) -> Watched:
    """Replay the first and the last samples: what is stored is of another version, or nothing is."""
    watched = Watched(layout, History(), run.attempt, fresh=True)
    for reading in _first_and_last(connection, run):
        watched.memory, _ = diagnosis.diagnose(layout, watched.memory, reading, thresholds)
        watched.unsaved += 1
    return watched


def _first_and_last(connection: sa.Connection, run: sa.Row[Any]) -> list[Sample]:
    """Return the first and last samples that have been diagnosed."""
    if run.diagnosed_step is None:
        return []
    table = schema.samples
    known = sa.select(table).where(table.c.run == run.id, table.c.level == 0, table.c.step <= run.diagnosed_step)
    first = connection.execute(known.order_by(table.c.step).limit(REPLAYED_FIRST_SAMPLES)).mappings().all()
    last = connection.execute(known.order_by(table.c.step.desc()).limit(REPLAYED_LAST_SAMPLES)).mappings().all()
    rows = {row["step"]: row for row in (*first, *reversed(last))}
    return [_reading(row, []) for row in rows.values()]


def _readings_since(
    connection: sa.Connection, run: sa.Row[Any], after: int | None, losses: Sequence[tuple[int, float]]
) -> Iterator[Sample]:
    """Yield the samples of the attempt that have been diagnosed after a step, with the losses between them."""
    if run.diagnosed_step is None or run.diagnosed_step == after:
        return
    table = schema.samples
    since = table.c.step > (-1 if after is None else after), table.c.step <= run.diagnosed_step
    mine = table.c.run == run.id, table.c.level == 0, table.c.attempt >= run.attempt
    rows = connection.execute(sa.select(table).where(*mine, *since).order_by(table.c.step)).mappings()
    for row in rows.all():
        yield _reading(row, between(losses, after, row["step"]))
        after = row["step"]


def _reading(row: sa.RowMapping, losses: Sequence[tuple[int, float]]) -> Sample:
    return Sample(
        step=row["step"],
        at=row["at"],
        statistics={name: row[name] for name in STATISTICS if row[name] is not None},
        scalars={name: wire.deserialise(value) for name, value in (row["scalars"] or {}).items()},
        losses=losses,
    )


def _stored_losses(connection: sa.Connection, run: sa.Row[Any], after: int | None) -> dict[int, float]:
    """Return the loss of each step of the attempt after one, what came last where several were told."""
    table = schema.trails
    first = -1 if after is None else after
    rows = connection.execute(
        sa.select(table.c.scalars)
        .where(table.c.run == run.id, table.c.first_step > first - TRAIL_STEPS, table.c.attempt >= run.attempt)
        .order_by(table.c.arrival, table.c.first_step)
    )
    losses: dict[int, float] = {}
    for body in rows.scalars():
        losses |= told_losses(_decode_trails.decode(body))
    return {step: loss for step, loss in losses.items() if step > first}


def told_losses(trail: Mapping[str, Trail]) -> dict[int, float]:
    """Return the loss of every step that a trail tells of."""
    if "loss" not in trail:
        return {}
    return dict(zip(trail["loss"].steps, map(wire.deserialise, trail["loss"].values), strict=True))
