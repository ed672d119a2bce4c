"""Every sample at full resolution to a time-series store: Prometheus, VictoriaMetrics, Mimir, Thanos."""

import asyncio
import hashlib
import logging
import time
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
_SAMPLES_AT_ONCE = 20
_TIMEOUT_SECONDS = 30.0
_LONGEST_WAIT_SECONDS = 60.0
_CONTENT_REFUSED = (400, 409, 413, 422)
"""Answers that are about what was sent; others (401, 404, 503) are about the store or the way to it, and pass."""
_SPLIT_AFTER = 3
"""Answers of 5xx to one batch before it is split: Prometheus 2.42 says 500 where a sample is too old."""

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What became of samples; one counts with all its parameters."""

    sent: int = 0
    set_aside: int = 0
    retries: int = 0
    errors: int = 0
    """Rounds that ended in an error nobody foresaw; the log says which."""


@dataclass
class Exporter:
    """Follows the samples of every run and writes them out; the database is its queue and keeps how far it is."""

    engine: sa.Engine
    writer: Writer
    settings: RemoteWrite
    counts: Counts = field(default_factory=Counts)
    _sent: dict[tuple[str, int], int] = field(default_factory=dict)
    """The last step that was dealt with by this process, by run and attempt."""
    _since: float = field(default_factory=time.time)

    @property
    def _store(self) -> str:
        """Name the store without showing its address, which may hold a password."""
        return hashlib.sha256(self.settings.url.encode()).hexdigest()[:16]

    async def run(self) -> None:
        """Write until cancelled; an error of one round is logged and counted, and the next round tries again."""
        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            while True:
                try:
                    written = await self._round(client)
                except Exception:  # whatever it is, nobody waits for this task: it must not end in silence
                    log.exception("remote write: this round failed; the next one tries again")
                    self.counts.errors += 1
                    written = 0
                if not written:
                    await asyncio.sleep(_POLL_SECONDS)

    async def _round(self, client: httpx.AsyncClient) -> int:
        batches = await asyncio.to_thread(self._waiting)
        for (run_id, attempt), samples in batches.items():
            await self._write(client, samples)
            self._sent[run_id, attempt] = samples[-1].step
            keep = partial(_keep, run_id=run_id, store=self._store, attempt=attempt, step=samples[-1].step)
            await asyncio.wrap_future(self.writer.submit(keep, run_id))
        return len(batches)

    def _waiting(self) -> dict[tuple[str, int], list["Measured"]]:
        """Return the next samples of each run and attempt."""
        start = self._since - self.settings.backlog_seconds
        runs, samples, kept = schema.runs, schema.samples, schema.remote_write_positions
        mine = runs.outerjoin(kept, sa.and_(kept.c.run == runs.c.id, kept.c.store == self._store))
        position = sa.case((kept.c.attempt == runs.c.attempt, kept.c.step))
        stored = (samples.c.run == runs.c.id, samples.c.level == 0, samples.c.attempt == runs.c.attempt)
        more = sa.exists().where(*stored, samples.c.step > position)
        behind = sa.or_(more, sa.and_(position.is_(None), runs.c.last_seen_at >= start))
        with self.engine.connect() as connection:
            found = {}
            for run in connection.execute(
                sa.select(runs, position.label("position")).select_from(mine).where(behind)
            ).all():
                sent = self._sent.get((run.id, run.attempt), run.position)
                new = samples.c.at >= start if sent is None else samples.c.step > sent
                rows = connection.execute(
                    sa.select(samples)
                    .where(samples.c.run == run.id, samples.c.level == 0, samples.c.attempt == run.attempt, new)
                    .order_by(samples.c.step)
                    .limit(_SAMPLES_AT_ONCE)
                ).all()
                if rows:
                    names = _parameters(connection, run.id)
                    found[run.id, run.attempt] = [Measured.of(run, names, row) for row in rows]
            return found

    async def _write(self, client: httpx.AsyncClient, samples: list["Measured"]) -> None:
        """Write samples; those that the store refuses are split until the ones at fault are set aside alone."""
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
        wait, errors = 0.5, 0
        while True:
            try:
                answer = await client.post(self.settings.url, content=body, headers=remote_write_protocol.HEADERS)
            except httpx.HTTPError as error:
                log.warning("remote write: %s %s; again in %.1f s", type(error).__name__, error, wait)
            else:
                if answer.is_success:
                    return True
                log.warning("remote write: %s %.200s", answer.status_code, answer.text)
                errors += answer.status_code == 500
                if answer.status_code in _CONTENT_REFUSED or errors == _SPLIT_AFTER:
                    return False
            self.counts.retries += 1
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


def _keep(connection: sa.Connection, run_id: str, store: str, attempt: int, step: int) -> None:
    """Remember how far a store has come with a run, if that is still there."""
    table, runs = schema.remote_write_positions, schema.runs
    row = sa.select(runs.c.id, sa.literal(store), sa.literal(attempt), sa.literal(step)).where(runs.c.id == run_id)
    statement = upsert(connection.dialect.name, table).from_select(["run", "store", "attempt", "step"], row)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["run", "store"],
            set_={"attempt": statement.excluded.attempt, "step": statement.excluded.step},
        )
    )


def _parameters(connection: sa.Connection, run_id: str) -> list[tuple[str, str]]:
    return [(parameter.name, f"{parameter.depth:03d}") for parameter in load_parameters(connection, run_id)]


@dataclass(frozen=True, eq=False)
class Measured:
    """One sample as points: the labels of each series and its value."""

    run: str
    step: int
    milliseconds: int
    values: dict[tuple[tuple[str, str], ...], float]

    @classmethod
    def of(cls, run: sa.Row[Any], parameters: list[tuple[str, str]], row: sa.Row[Any]) -> "Measured":
        """Return the points of a stored sample."""
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


def _labels(common: dict[str, str], metric: str, **more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"__name__": f"gradwatch_sample_{metric}", **common, **more}.items()))


def _series(samples: list[Measured]) -> list[Series]:
    points: dict[tuple[tuple[str, str], ...], list[tuple[int, float]]] = {}
    for measured in sorted(samples, key=lambda sample: sample.milliseconds):  # Prometheus drops the others in silence
        for labels, value in measured.values.items():
            points.setdefault(labels, []).append((measured.milliseconds, value))
    return [Series(labels, found) for labels, found in points.items()]
