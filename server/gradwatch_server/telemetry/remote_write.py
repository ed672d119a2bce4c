"""Writes every sample at full resolution to a time-series store: Prometheus, VictoriaMetrics, Mimir or Thanos.

The database is the queue. It keeps the last step of each run that each store has, and a restarted server goes on there.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import numpy as np
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.settings import RemoteWrite
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.parameters import load_parameters
from gradwatch_server.telemetry import remote_write_protocol
from gradwatch_server.telemetry.remote_write_protocol import Series

_POLL_SECONDS = 1.0
_BATCH_SAMPLES = 20
_TIMEOUT_SECONDS = 30.0
_LONGEST_BACKOFF_SECONDS = 60.0
_CONTENT_REFUSED = (400, 409, 413, 422)
"""Statuses that refuse the content. Others (401, 404, 503) concern the store or the way to it, and pass with time."""
_SPLIT_AFTER = 3
"""Responses of 500 to one batch before it is split: Prometheus 2.42 answers 500 where a sample is too old."""

log = logging.getLogger(__name__)

Labels = tuple[tuple[str, str], ...]


@dataclass
class Counts:
    """Counts of samples by outcome; a sample with all its parameters counts as one."""

    sent: int = 0
    set_aside: int = 0
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
            for position in [] if vector is None else np.flatnonzero(vector != wire.MISSING).tolist():
                parameter, depth = parameters[position]
                labels = _labels(common, statistic, parameter=parameter, depth=depth)
                values[labels] = float(vector[position])
        return cls(run.id, row.step, round(row.at * 1000), values)


@dataclass
class RemoteWriter:
    """Follows the samples of every run and writes them to the store."""

    engine: sa.Engine
    writer: Writer
    settings: RemoteWrite
    counts: Counts = field(default_factory=Counts)
    _written: dict[tuple[str, int], int] = field(default_factory=dict)
    """(run, attempt) -> the last step that this process has written or set aside."""
    _started_at: float = field(default_factory=time.time)

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
        """Write the next samples of every run; return how many attempts had any."""
        batches = await asyncio.to_thread(self._load_next)
        for (run_id, attempt), samples in batches.items():
            await self._write(client, samples)
            self._written[run_id, attempt] = samples[-1].step
            save = partial(_save, run_id=run_id, store=self._store, attempt=attempt, step=samples[-1].step)
            await asyncio.wrap_future(self.writer.submit(save, run_id))
        return len(batches)

    def _load_next(self) -> dict[tuple[str, int], list[SamplePoints]]:
        """Return the next samples of each run's last attempt, by (run, attempt), where there are any."""
        found = {}
        start = self._started_at - self.settings.backlog_seconds
        with self.engine.connect() as connection:
            for run in connection.execute(_unwritten_runs(self._store, start)).all():
                written = self._written.get((run.id, run.attempt), run.position)
                rows = connection.execute(_next_samples(run, written, start)).all()
                if rows:
                    parameters = [(each.name, f"{each.depth:03d}") for each in load_parameters(connection, run.id)]
                    found[run.id, run.attempt] = [SamplePoints.of(run, parameters, row) for row in rows]
        return found

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
        backoff, errors = 0.5, 0
        while True:
            try:
                response = await client.post(self.settings.url, content=body, headers=remote_write_protocol.HEADERS)
            except httpx.HTTPError as error:
                log.warning("remote write: %s %s; trying again in %.1f s", type(error).__name__, error, backoff)
            else:
                if response.is_success:
                    return True
                log.warning("remote write: %s %.200s", response.status_code, response.text)
                errors += response.status_code == 500
                if response.status_code in _CONTENT_REFUSED or errors == _SPLIT_AFTER:
                    return False
            self.counts.retries += 1
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_SECONDS)


def _unwritten_runs(store: str, start: float) -> sa.Select[Any]:
    """Select the runs with samples that the store may lack, each with the last written step of its attempt."""
    runs, samples, written = schema.runs, schema.samples, schema.remote_write_positions
    mine = runs.outerjoin(written, sa.and_(written.c.run == runs.c.id, written.c.store == store))
    position = sa.case((written.c.attempt == runs.c.attempt, written.c.step))
    stored = (samples.c.run == runs.c.id, samples.c.level == 0, samples.c.attempt == runs.c.attempt)
    more = sa.exists().where(*stored, samples.c.step > position)
    behind = sa.or_(more, sa.and_(position.is_(None), runs.c.last_seen_at >= start))
    return sa.select(runs, position.label("position")).select_from(mine).where(behind)


def _next_samples(run: sa.Row[Any], written: int | None, start: float) -> sa.Select[Any]:
    """Select the next samples of a run after a step, or from a time on if none of it was written."""
    samples = schema.samples
    new = samples.c.at >= start if written is None else samples.c.step > written
    mine = (samples.c.run == run.id, samples.c.level == 0, samples.c.attempt == run.attempt)
    return sa.select(samples).where(*mine, new).order_by(samples.c.step).limit(_BATCH_SAMPLES)


def _save(connection: sa.Connection, run_id: str, store: str, attempt: int, step: int) -> None:
    """Save the last written step of a run, unless the run has been deleted."""
    table, runs = schema.remote_write_positions, schema.runs
    row = sa.select(runs.c.id, sa.literal(store), sa.literal(attempt), sa.literal(step)).where(runs.c.id == run_id)
    statement = upsert(connection.dialect.name, table).from_select(["run", "store", "attempt", "step"], row)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["run", "store"],
            set_={"attempt": statement.excluded.attempt, "step": statement.excluded.step},
        )
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
