"""What the page, Grafana and scripts read: bounded work, and no spike or NaN is lost on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch.wire import MISSING, STATISTICS, Trail, number
from gradwatch_server import schema

RATIO_EPS = 1e-3
"""The eps of ``ratio = grad_norm / (weight_norm + eps)``, the same as AGC's."""
STATISTIC_NAMES = (*STATISTICS, "ratio")


Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Buckets:
    """Samples gathered into buckets of neighbours; a bucket of one sample is that sample.

    ``first_steps`` and ``last_steps`` have shape (buckets,), the others (buckets, parameters). ``low`` and ``high``
    and ``mean`` are over finite values, ``last`` is the newest value as it was measured; ``nonfinite`` counts NaN and
    infinite values. Where a bucket holds no finite value, ``low``, ``high`` and ``mean`` are that of ``last``.
    """

    first_steps: NDArray[np.int64]
    last_steps: NDArray[np.int64]
    low: Floats
    high: Floats
    mean: Floats
    last: Floats
    nonfinite: NDArray[np.int32]


def ratio(grad_norm: NDArray[np.float32], weight_norm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``grad_norm / (weight_norm + eps)``; missing where the gradient is missing."""
    divided = grad_norm / (weight_norm + np.float32(RATIO_EPS))
    return np.where((grad_norm == MISSING) | (weight_norm == MISSING), np.float32(MISSING), divided)


def gather(steps: NDArray[np.int64], values: Floats, points: int, missing: float | None = MISSING) -> Buckets:
    """Gather samples into at most ``points`` buckets of equal numbers of samples.

    Args:
        steps: shape (samples,), ascending.
        values: shape (samples, parameters), float32 or float64.
        points: upper bound for the number of buckets, at least 1.
        missing: the value that stands for no measurement; none where every value is one.
    """
    size = max(1, -(-len(steps) // points))
    starts = np.arange(0, len(steps), size)
    if not len(starts):
        nothing = np.empty((0, values.shape[1]), values.dtype)
        return Buckets(steps, steps, nothing, nothing, nothing, nothing, nothing.astype(np.int32))
    ends = np.append(starts[1:], len(steps)) - 1
    present = np.ones(values.shape, np.bool_) if missing is None else values != missing
    finite = present & np.isfinite(values)
    count = np.add.reduceat(finite.astype(np.int32), starts)
    last = _newest(values, present, starts, ends)
    nothing_finite = count == 0
    low = np.minimum.reduceat(np.where(finite, values, values.dtype.type(np.inf)), starts)
    high = np.maximum.reduceat(np.where(finite, values, values.dtype.type(-np.inf)), starts)
    total = np.add.reduceat(np.where(finite, values, 0).astype(np.float64), starts)
    mean = (total / np.maximum(count, 1)).astype(values.dtype)
    return Buckets(
        steps[starts],
        steps[ends],
        np.where(nothing_finite, last, low),
        np.where(nothing_finite, last, high),
        np.where(nothing_finite, last, mean),
        last,
        np.add.reduceat((present & ~finite).astype(np.int32), starts),
    )


def _newest(values: Floats, present: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Floats:
    """Return the newest value of each bucket that is not missing; missing where all are."""
    rows = np.arange(len(values))[:, None]
    newest = np.maximum.reduceat(np.where(present, rows, -1), starts)
    return np.take_along_axis(values, np.where(newest < 0, ends[:, None], newest), axis=0)


def load(
    connection: sa.Connection,
    run_id: str,
    statistic: str,
    from_step: int | None,
    to_step: int | None,
    columns: Sequence[int] | slice,
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the steps, shape (samples,), and the values, shape (samples, columns), of a statistic in a range.

    Samples in which the statistic was not measured are left out; a vector from before the run gained parameters is
    filled up with ``MISSING``.
    """
    table = schema.samples
    wanted = ["grad_norm", "weight_norm"] if statistic == "ratio" else [statistic]
    query = sa.select(table.c.step, *(table.c[name] for name in wanted)).where(
        table.c.run == run_id, table.c.level == 0, *(table.c[name].is_not(None) for name in wanted)
    )
    if from_step is not None:
        query = query.where(table.c.step >= from_step)
    if to_step is not None:
        query = query.where(table.c.step <= to_step)
    rows = connection.execute(query.order_by(table.c.step)).all()
    steps = np.array([row[0] for row in rows], np.int64)
    stacked = [_stack([row[index] for row in rows], columns, count) for index in range(1, len(wanted) + 1)]
    return steps, ratio(*stacked) if statistic == "ratio" else stacked[0]


def _stack(vectors: Sequence[NDArray[np.float32]], columns: Sequence[int] | slice, count: int) -> NDArray[np.float32]:
    width = len(range(count)[columns]) if isinstance(columns, slice) else len(columns)
    if not vectors:
        return np.empty((0, width), np.float32)
    filled = [
        vector if len(vector) == count else np.append(vector, np.full(count - len(vector), MISSING, np.float32))
        for vector in vectors
    ]
    return np.stack([vector[columns] for vector in filled])


def load_scalar(
    connection: sa.Connection, run_id: str, name: str, from_step: int | None, to_step: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps and values of a scalar of the run, both of shape (steps,), ascending; of one step the newest."""
    lowest = 0 if from_step is None else from_step
    highest = 2**53 if to_step is None else to_step
    found: dict[int, float] = {}
    samples = schema.samples
    rows = connection.execute(
        sa.select(*samples.c["step", "scalars"]).where(
            samples.c.run == run_id, samples.c.level == 0, samples.c.step.between(lowest, highest)
        )
    )
    for step, scalars in rows:
        if scalars and name in scalars:
            found[step] = number(scalars[name])
    trails = schema.trails
    blobs = connection.execute(
        sa.select(trails.c.scalars)
        .where(trails.c.run == run_id, trails.c.first_step <= highest, trails.c.last_step >= lowest)
        .order_by(trails.c.attempt, trails.c.first_step)
    )
    for (blob,) in blobs:
        trail = msgspec.msgpack.decode(blob, type=dict[str, Trail]).get(name)
        if trail is not None:
            found |= {
                step: number(value)
                for step, value in zip(trail.steps, trail.values, strict=True)
                if lowest <= step <= highest
            }
    steps = np.array(sorted(found), np.int64)
    return steps, np.array([found[step] for step in steps.tolist()], np.float64)
