"""Writes every sample at full resolution to a time-series store: Prometheus, VictoriaMetrics, Mimir or Thanos.

The database is the queue. Samples of a run are numbered in the order in which they commit, and the database keeps the
last number that each store has: a sample that comes late or of another attempt is next in the queue as any other, and
a restarted server goes on where the last one was. A number that is gone is a sample that was replaced or deleted; it
is counted.
"""

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import httpx
import numpy as np
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server import steady_clock
from gradwatch_server.settings import RemoteWrite
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.parameters import load_parameters
from gradwatch_server.telemetry import remote_write_protocol
from gradwatch_server.telemetry.remote_write_protocol import Series

_POLL_SECONDS = 1.0
_BATCH_SAMPLES = 20
_BATCH_VALUES = 200_000
"""Most values in one request, unless a single sample has more."""
_TIMEOUT_SECONDS = 30.0
_LONGEST_BACKOFF_SECONDS = 60.0
_MOST_LOOKED_UP = 10_000
"""Most runs of which one round asks whether they were deleted: a statement takes no more than 65,535 numbers."""
_CONTENT_REFUSED = (400, 409, 413, 422)
"""Statuses that refuse the content. Any other (401, 404, 429, 503) concerns the store or the way to it, and passes."""
_TOO_OLD = "too old sample"
"""Text by which Prometheus 2.42 refuses a sample with 500, the status of a store that is broken."""

log = logging.getLogger(__name__)

Labels = tuple[tuple[str, str], ...]


@dataclass
class Counts:
    """Counts of samples by outcome; a sample with all its parameters counts as one."""

    sent: int = 0
    set_aside: int = 0
    skipped: int = 0
    """Samples that were replaced or deleted before they were written."""
    retries: int = 0
    errors: int = 0
    """Rounds that ended in an unexpected error; the log has it."""


@dataclass(frozen=True, eq=False)
class SamplePoints:
    """One sample as one point for each of its series."""

    run: str
    step: int
    milliseconds: int
    values: dict[Labels, float]
    """Value of the point by the labels of its series."""

    @classmethod
    def of(cls, run: sa.Row[Any], parameters: Sequence[tuple[str, str]], row: sa.Row[Any]) -> "SamplePoints":
        """Return the points of a stored sample; ``parameters`` are the name and depth of each."""
        common = {"run": run.id, "project": run.project, "name": run.name}
        values = {_labels(common, "step"): float(row.step)}
        for name, value in (row.scalars or {}).items():
            values[_labels(common, "scalar", scalar=name)] = wire.deserialise(value)
        for statistic in wire.STATISTICS:
            vector = getattr(row, statistic)
            for position in [] if vector is None else np.flatnonzero(~(vector <= wire.MISSING)).tolist():
                parameter, depth = parameters[position]
                labels = _labels(common, statistic, parameter=parameter, depth=depth)
                values[labels] = float(vector[position])
        return cls(run.id, row.step, round(row.at * 1000), values)


class _Batch(NamedTuple):
    """The next samples of a run."""

    samples: list[SamplePoints]
    arrival: int
    """Number up to which the run has been dealt with once these are."""
    skipped: int
    """Samples up to there that are gone."""


@dataclass
class RemoteWriter:
    """Follows the samples of every run and writes them to the store."""

    engine: sa.Engine
    writer: Writer
    settings: RemoteWrite
    counts: Counts = field(default_factory=Counts)
    _begun: bool = False
    _waiting: dict[str, int] = field(default_factory=dict)
    """run -> samples that the store lacks, of the runs that were behind when last looked at."""
    _unsaved: dict[str, int] = field(default_factory=dict)
    """run -> number up to which this process has dealt with it, where that could not be saved."""

    @property
    def _store(self) -> str:
        """The store's key in the database: a hash, since the URL may hold a password."""
        return hashlib.sha256(self.settings.url.encode()).hexdigest()[:16]

    async def run(self) -> None:
        """Write until cancelled. An error of one round is logged and counted, and the next round tries again."""
        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            while True:
                try:
                    written = await self._write_next(client)
                except Exception:  # nobody awaits this task while the server runs: it would end unnoticed
                    log.exception("remote write: this round failed; the next one tries again")
                    self.counts.errors += 1
                    written = 0
                if not written:
                    await asyncio.sleep(_POLL_SECONDS)

    async def _write_next(self, client: httpx.AsyncClient) -> int:
        """Write the next samples of every run that is behind; return how many runs that are."""
        if not self._begun:
            await asyncio.wrap_future(self.writer.submit(partial(_begin, store=self._store, settings=self.settings)))
            self._begun = True
        self._waiting = await asyncio.to_thread(self._load_waiting)
        for run_id in list(self._waiting):
            batch = await asyncio.to_thread(self._load_next, run_id)
            if batch is not None:
                await self._write_batch(client, run_id, batch)
        return len(self._waiting)

    async def _write_batch(self, client: httpx.AsyncClient, run_id: str, batch: _Batch) -> None:
        """Write a batch, unless all of it is gone, and save how far the run has been dealt with."""
        if batch.samples:
            await self._write(client, batch.samples)
        self.counts.skipped += batch.skipped
        self._waiting[run_id] -= len(batch.samples) + batch.skipped
        self._unsaved[run_id] = batch.arrival
        save = partial(_save, run_id=run_id, store=self._store, arrival=batch.arrival)
        await asyncio.wrap_future(self.writer.submit(save, run_id))
        del self._unsaved[run_id]

    def _load_waiting(self) -> dict[str, int]:
        """Return run -> number of its samples that the store lacks; count those of runs that were deleted since."""
        runs, written = schema.runs, schema.remote_write_positions
        mine = runs.outerjoin(written, sa.and_(written.c.run == runs.c.id, written.c.store == self._store))
        waiting = (runs.c.arrivals - sa.func.coalesce(written.c.arrival, 0)).label("waiting")
        query = sa.select(runs.c.id, waiting).select_from(mine).where(waiting > 0)
        with self.engine.connect() as connection:
            found = {row.id: row.waiting for row in connection.execute(query)}
            unseen = [run_id for run_id, count in self._waiting.items() if count and run_id not in found]
            kept = connection.scalars(sa.select(runs.c.id).where(runs.c.id.in_(unseen[:_MOST_LOOKED_UP]))).all()
        self.counts.skipped += sum(self._waiting[run_id] for run_id in set(unseen[:_MOST_LOOKED_UP]) - set(kept))
        return found

    def _load_next(self, run_id: str) -> _Batch | None:
        """Return the next samples of a run; None if it has been deleted."""
        runs, samples, written = schema.runs, schema.samples, schema.remote_write_positions
        mine = (written.c.run == run_id, written.c.store == self._store)
        with self.engine.connect() as connection:
            run = connection.execute(sa.select(runs).where(runs.c.id == run_id)).one_or_none()
            if run is None:
                return None
            saved = connection.scalar(sa.select(written.c.arrival).where(*mine)) or 0
            position = max(saved, self._unsaved.get(run_id, 0))
            most = max(1, min(_BATCH_SAMPLES, _BATCH_VALUES // (run.parameter_count * len(wire.STATISTICS) + 1)))
            next_ones = (samples.c.run == run_id, samples.c.level == 0, samples.c.arrival > position)
            chosen = sa.select(samples).where(*next_ones).order_by(samples.c.arrival).limit(most)
            rows = connection.execute(chosen).all()
            end = rows[-1].arrival if len(rows) == most else max(run.arrivals, position)
            parameters = [(each.name, f"{each.depth:03d}") for each in load_parameters(connection, run_id)]
        return _Batch([SamplePoints.of(run, parameters, row) for row in rows], end, end - position - len(rows))

    async def _write(self, client: httpx.AsyncClient, samples: list[SamplePoints]) -> None:
        """Write samples; split those that the store refuses until the ones at fault are set aside alone."""
        accepted = await self._post(client, remote_write_protocol.encode(_series(samples)))
        if accepted:
            self.counts.sent += len(samples)
        elif len(samples) > 1:
            half = len(samples) // 2
            await self._write(client, samples[:half])
            await self._write(client, samples[half:])
        else:
            self.counts.set_aside += 1
            log.warning("remote write: the store refuses the sample of step %d of %s", samples[0].step, samples[0].run)

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> bool:
        """Post until the store takes the body or refuses it; return whether it took it."""
        backoff = 0.5
        while True:
            try:
                response = await client.post(self.settings.url, content=body, headers=remote_write_protocol.HEADERS)
            except httpx.HTTPError as error:
                log.warning("remote write: %s %s; trying again in %.1f s", type(error).__name__, error, backoff)
            else:
                if response.is_success:
                    return True
                log.warning("remote write: %s %.200s", response.status_code, response.text)
                if _refuses_content(response):
                    return False
            self.counts.retries += 1
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_SECONDS)


def _refuses_content(response: httpx.Response) -> bool:
    """Return whether a response blames the samples, so that sending them again is of no use."""
    too_old = response.status_code == 500 and _TOO_OLD in response.text.lower()
    return too_old or response.status_code in _CONTENT_REFUSED


def _begin(connection: sa.Connection, store: str, settings: RemoteWrite) -> None:
    """Decide where the queue of a store begins that was never written to: of known runs, at the backlog."""
    now, dialect = steady_clock.now(), connection.dialect.name
    stores, runs, samples = schema.remote_write_stores, schema.runs, schema.samples
    new = upsert(dialect, stores).values(store=store, since=now).on_conflict_do_nothing().returning(stores.c.store)
    if connection.execute(new).one_or_none() is None:
        return
    start = now - settings.backlog_seconds
    older = sa.select(samples.c.arrival).where(samples.c.run == runs.c.id, samples.c.level == 0, samples.c.at < start)
    last_older = older.where(samples.c.arrival > 0).order_by(samples.c.arrival.desc()).limit(1).scalar_subquery()
    position = sa.case((runs.c.last_seen_at >= start, sa.func.coalesce(last_older, 0)), else_=runs.c.arrivals)
    known = sa.select(runs.c.id, sa.literal(store), position).where(runs.c.arrivals > 0)
    positions = ["run", "store", "arrival"]
    connection.execute(sa.insert(schema.remote_write_positions).from_select(positions, known))


def _save(connection: sa.Connection, run_id: str, store: str, arrival: int) -> None:
    """Save how far a run has been dealt with, unless the run has been deleted."""
    table, runs = schema.remote_write_positions, schema.runs
    row = sa.select(runs.c.id, sa.literal(store), sa.literal(arrival)).where(runs.c.id == run_id)
    statement = upsert(connection.dialect.name, table).from_select(["run", "store", "arrival"], row)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["run", "store"], set_={"arrival": statement.excluded.arrival})
    )


def _labels(common: dict[str, str], metric: str, **more: str) -> Labels:
    return tuple(sorted({"__name__": f"gradwatch_sample_{metric}", **common, **more}.items()))


def _series(samples: list[SamplePoints]) -> list[Series]:
    points: dict[Labels, list[tuple[int, float]]] = {}
    # In the order of their times: Prometheus drops points that come out of order without telling.
    for sample in sorted(samples, key=lambda sample: sample.milliseconds):
        for labels, value in sample.values.items():
            points.setdefault(labels, []).append((sample.milliseconds, value))
    return [Series(labels, found) for labels, found in points.items()]
