"""What a batch changes in the row of its run, without its diagnosis: when it was heard of, last step, numbers."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.store import batch_store

_LARGEST_INTERVAL_GROWTH = 5.0
"""Times the usual interval between samples that one batch may count as: a long pause does not become usual."""


def progress(run: sa.Row[Any], batch: wire.Batch, now: float) -> dict[str, Any]:
    """Return the new values of the run's row after a batch, without those of the diagnosis."""
    changes: dict[str, Any] = {"last_seen_at": now}
    if batch.samples:
        changes["usual_interval_seconds"] = _usual_interval(run, batch.samples, now)
    if batch.attempt < run.attempt:
        return changes
    before = run.scalar_steps
    latest = {name: (step, value) for name, (step, value) in _latest(batch).items() if step >= before.get(name, 0)}
    changes["scalars"] = run.scalars | batch_store.serialised({name: value for name, (_, value) in latest.items()})
    changes["scalar_steps"] = before | {name: step for name, (step, _) in latest.items()}
    dropped = msgspec.to_builtins(batch.dropped)
    changes["dropped"] = {name: max(count, run.dropped.get(name, 0)) for name, count in dropped.items()}
    steps = [sample.step for sample in batch.samples]
    steps += [max(scalar.steps) for scalar in batch.trail.values() if scalar.steps]
    if steps:
        changes["last_step"] = max([*steps, run.last_step or 0])
    return changes


def _usual_interval(run: sa.Row[Any], samples: Sequence[wire.Sample], now: float) -> float:
    """Return the usual time between samples in seconds, smoothed over batches."""
    times = sorted(sample.at for sample in samples)
    interval: float = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else now - run.last_seen_at
    usual: float | None = run.usual_interval_seconds
    if usual is None:
        return interval
    return 0.8 * usual + 0.2 * min(interval, _LARGEST_INTERVAL_GROWTH * (usual or interval))


def _latest(batch: wire.Batch) -> dict[str, tuple[int, wire.Number]]:
    """Return scalar -> its last step in the batch and its value there."""
    latest = {
        name: max(zip(scalar.steps, scalar.values, strict=True), key=itemgetter(0))
        for name, scalar in batch.trail.items()
        if scalar.steps
    }
    for sample in batch.samples:
        for name, value in sample.scalars.items():
            if name not in latest or sample.step >= latest[name][0]:
                latest[name] = (sample.step, value)
    return latest
