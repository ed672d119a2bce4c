"""Detector state of runs: kept in memory between batches, saved now and then, and replayed from stored samples.

The state of a run is the history of its samples that the rules compare the next sample with, and the losses that no
sample has been diagnosed with yet.
"""

import secrets
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any

import sqlalchemy as sa

from gradwatch import wire
from gradwatch.wire import STATISTICS, Trail
from gradwatch_server import diagnosis
from gradwatch_server.diagnosis import History, RunParameters, Sample, Thresholds
from gradwatch_server.diagnosis.history import VERSION
from gradwatch_server.diagnosis.loss_summary import summed_up
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.parameters import load_parameters
from gradwatch_server.store.rollups.downsampling import REPLAYED_FIRST_SAMPLES, REPLAYED_LAST_SAMPLES
from gradwatch_server.store.rollups.series import TRAIL_STEPS, decode_trails

SAVED_EVERY_SAMPLES = 64
"""The state is saved after so many samples, so at most so many are replayed."""
_CACHE_BYTES = 64 << 20


@dataclass
class DetectorState:
    """State of the detectors of a run before its next sample."""

    parameters: RunParameters
    history: History
    attempt: int
    losses: dict[int, float] = field(default_factory=dict)
    """Loss of each step since the last sample; earlier batches may have brought them."""
    unsaved_samples: int = 0
    """Samples that the history holds and the saved one does not."""
    loaded: bool = False
    """Whether it was loaded for this batch. It is saved then, so that servers which take turns with a run do not replay
    its samples again and again."""
    mark: str = ""
    """The value of ``runs.memory_mark`` for which this state is valid; see ``new_mark``."""

    @property
    def bytes(self) -> int:
        """Return roughly how much memory the state takes."""
        return 10_000 + 600 * len(self.parameters.names) + 150 * len(self.losses)

    def start_attempt(self, attempt: int) -> None:
        """Go on with a new attempt, which keeps the usual values of earlier attempts."""
        if attempt != self.attempt:
            self.attempt, self.history, self.losses = attempt, self.history.resumed(), {}

    def keep_losses(self, losses: Mapping[int, float], after: int | None) -> None:
        """Keep the losses after a step, which no sample has been diagnosed with yet."""
        waiting = sorted((step, loss) for step, loss in losses.items() if after is None or step > after)
        self.losses = dict(summed_up(waiting))


class DetectorStateCache:
    """Cache of detector state per run, bounded in bytes; the runs that reported longest ago leave it first.

    An entry is valid only while ``runs.memory_mark`` equals its mark: another server, or a transaction that was rolled
    back, makes them differ. An entry is out of the cache while its run is being worked on.
    """

    def __init__(self, limit_bytes: int = _CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, tuple[int, DetectorState]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def current(self, connection: sa.Connection, run: sa.Row[Any], thresholds: Thresholds) -> DetectorState:
        """Return the state of a run up to the sample that ``runs.diagnosed_step`` names, out of the cache if valid."""
        state = self.take(run.id)
        if state is not None and state.mark == run.memory_mark:
            state.loaded = False
        else:
            same = state is not None and _same_parameters(state.mark, run.memory_mark)
            parameters = state.parameters if state and same else RunParameters.of(load_parameters(connection, run.id))
            state = load(connection, run, parameters, thresholds)
        state.start_attempt(run.attempt)
        return state

    def take(self, run_id: str) -> DetectorState | None:
        """Take the state of a run out of the cache."""
        with self._lock:
            size, state = self._entries.pop(run_id, (0, None))
            self._bytes -= size
        return state

    def put(self, run_id: str, state: DetectorState) -> None:
        """Put the state of a run into the cache."""
        size = state.bytes
        with self._lock:
            self._bytes += size - self._entries.pop(run_id, (0, None))[0]
            self._entries[run_id] = (size, state)
            while self._bytes > self._limit_bytes:
                self._bytes -= self._entries.popitem(last=False)[1][0]


def new_mark(before: str | None = None) -> str:
    """Return a new mark of a run: a part for its parameters, kept from ``before``, and a part for everything else."""
    return f"{before.partition('/')[0] if before else secrets.token_hex(4)}/{secrets.token_hex(8)}"


def _same_parameters(mark: str | None, other: str | None) -> bool:
    """Return whether two marks stand for the same parameters of a run."""
    return mark is not None and other is not None and mark.partition("/")[0] == other.partition("/")[0]


def save(connection: sa.Connection, run_id: str, state: DetectorState, step: int | None) -> None:
    """Save the state of a run, which includes the samples up to a step."""
    row = {"run": run_id, "attempt": state.attempt, "step": step, "version": VERSION}
    connection.execute(_upsert(connection.dialect.name), row | {"body": state.history.to_bytes()})
    state.unsaved_samples = 0


@cache
def _upsert(engine: str) -> sa.Insert:
    table = schema.detector_states
    insert = upsert(engine, table)
    replaced = {column.name: insert.excluded[column.name] for column in table.c if not column.primary_key}
    return insert.on_conflict_do_update(index_elements=["run"], set_=replaced)


def load(
    connection: sa.Connection, run: sa.Row[Any], parameters: RunParameters, thresholds: Thresholds
) -> DetectorState:
    """Return the saved state of a run, with the samples diagnosed since then replayed."""
    row = connection.execute(
        sa.select(schema.detector_states).where(schema.detector_states.c.run == run.id)
    ).one_or_none()
    if run.memory_mark is None or (row is not None and row.version != VERSION):
        return _replay_ends(connection, run, parameters, thresholds)
    state, after = DetectorState(parameters, History(), run.attempt, loaded=True), None
    if row is not None:
        state.history, state.attempt, after = History.from_bytes(row.body), row.attempt, row.step
    if state.attempt != run.attempt:
        after = None
    state.start_attempt(run.attempt)
    losses = _load_losses(connection, run, after)
    _replay(state, _samples_after(connection, run, after, sorted(losses.items())), thresholds)
    state.keep_losses(losses, run.diagnosed_step)
    return state


def _replay_ends(
    connection: sa.Connection, run: sa.Row[Any], parameters: RunParameters, thresholds: Thresholds
) -> DetectorState:
    """Replay the first and the last samples of a run, if no state of this version is saved; return the state."""
    state = DetectorState(parameters, History(), run.attempt, loaded=True)
    _replay(state, _first_and_last(connection, run), thresholds)
    return state


def _replay(state: DetectorState, samples: Iterator[Sample], thresholds: Thresholds) -> None:
    for sample in samples:
        state.history, _ = diagnosis.diagnose(state.parameters, state.history, sample, thresholds)
        state.unsaved_samples += 1


def losses_between(losses: Sequence[tuple[int, float]], after: int | None, step: int) -> Sequence[tuple[int, float]]:
    """Return the losses after one step and up to another, summed up, out of (step, loss) pairs ordered by step."""
    first = 0 if after is None else bisect_right(losses, after, key=itemgetter(0))
    return summed_up(losses[first : bisect_right(losses, step, key=itemgetter(0))])


def _first_and_last(connection: sa.Connection, run: sa.Row[Any]) -> Iterator[Sample]:
    """Yield the first and last samples that have been diagnosed."""
    if run.diagnosed_step is None:
        return
    table = schema.samples
    diagnosed = sa.select(table).where(table.c.run == run.id, table.c.level == 0, table.c.step <= run.diagnosed_step)
    first = connection.execute(diagnosed.order_by(table.c.step).limit(REPLAYED_FIRST_SAMPLES)).mappings().all()
    last = connection.execute(diagnosed.order_by(table.c.step.desc()).limit(REPLAYED_LAST_SAMPLES)).mappings().all()
    rows = {row["step"]: row for row in (*first, *reversed(last))}
    yield from (_sample(row, []) for row in rows.values())


def _samples_after(
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
        yield _sample(row, losses_between(losses, after, row["step"]))
        after = row["step"]


def _sample(row: sa.RowMapping, losses: Sequence[tuple[int, float]]) -> Sample:
    return Sample(
        step=row["step"],
        at=row["at"],
        statistics={name: row[name] for name in STATISTICS if row[name] is not None},
        scalars={name: wire.deserialise(value) for name, value in (row["scalars"] or {}).items()},
        losses=losses,
    )


def _load_losses(connection: sa.Connection, run: sa.Row[Any], after: int | None) -> dict[int, float]:
    """Return step -> loss of the attempt after a step; of a step that was sent more than once, the newest loss."""
    table = schema.trails
    first = -1 if after is None else after
    rows = connection.execute(
        sa.select(table.c.scalars)
        .where(table.c.run == run.id, table.c.first_step > first - TRAIL_STEPS, table.c.attempt >= run.attempt)
        .order_by(table.c.arrival, table.c.first_step)
    )
    losses: dict[int, float] = {}
    for body in rows.scalars():
        losses |= trail_losses(decode_trails.decode(body))
    return {step: loss for step, loss in losses.items() if step > first}


def trail_losses(trail: Mapping[str, Trail]) -> dict[int, float]:
    """Return step -> loss out of a trail."""
    if "loss" not in trail:
        return {}
    return dict(zip(trail["loss"].steps, map(wire.deserialise, trail["loss"].values), strict=True))
