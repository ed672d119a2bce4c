"""Buckets of neighbouring samples, and how they are gathered into larger ones: no spike and no NaN is lost. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gradwatch.wire import MISSING

Floats = NDArray[np.floating[Any]]
Steps = NDArray[np.int64]
Counts = NDArray[np.integer[Any]]
PLANES = ("low", "high", "mean", "last", "finite", "nonfinite")
"""The fields of ``Buckets`` that have a column for each parameter."""
COUNT_PLANES = ("finite", "nonfinite")
UNMEASURED = -1
"""``nonfinite`` of a bucket in which the statistic was not measured, if only one statistic is read."""
_SMALL = 2.0**-64
"""No sum of fewer than 2**63 numbers that were multiplied by it is beyond float64."""


@dataclass(frozen=True, eq=False)
class Buckets:
    """Buckets of neighbouring samples by ascending steps; a bucket of one sample is that sample.

    ``first_steps`` and ``last_steps`` have shape (buckets,), the others (buckets, parameters). ``low``, ``high`` and
    ``mean`` are over finite values, ``last`` is the newest value as it was measured. ``finite`` and ``nonfinite`` count
    the values that are finite, and that are NaN or infinite; neither counts a missing gradient. If a bucket holds no
    finite value, ``low``, ``high`` and ``mean`` equal ``last``. ``mean`` has no columns if it was not read.
    """

    first_steps: Steps
    last_steps: Steps
    low: Floats
    high: Floats
    mean: Floats
    last: Floats
    finite: Counts
    nonfinite: Counts

    @classmethod
    def of_samples(cls, steps: Steps, values: Floats, missing: float | None = MISSING, *, means: bool = True) -> Self:
        """Return a bucket for each sample.

        Args:
            steps: shape (samples,), ascending.
            values: shape (samples, parameters), float32 or float64.
            missing: the value that stands for no measurement; None: every value is a measurement.
            means: whether the means are kept.
        """
        measurable = np.isfinite(values)
        if missing is None:
            finite, nonfinite = measurable, ~measurable
        else:
            present = ~(values <= missing)  # NaN is present; a gradient that no optimizer steps lies below
            finite, nonfinite = measurable & present, ~measurable & present
        mean = values if means else values[:, :0]
        return cls(steps, steps, values, values, mean, values, finite.view(np.uint8), nonfinite.view(np.uint8))

    @classmethod
    def concatenated(cls, parts: Sequence["Buckets"]) -> "Buckets":
        """Return the buckets of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.first_steps)

    def measured(self) -> "Buckets":
        """Return the buckets that are not marked as ``UNMEASURED``."""
        kept = (self.nonfinite != UNMEASURED).all(axis=1)
        return self if kept.all() else Buckets(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))

    def head(self, count: int) -> "Buckets":
        """Return the first ``count`` buckets."""
        return Buckets(*(getattr(self, name)[:count] for name in self.__dataclass_fields__))

    def chosen(self, mask: NDArray[np.bool_]) -> "Buckets":
        """Return the buckets where a mask of shape (buckets,) is True."""
        return self if mask.all() else Buckets(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    def after(self, step: int) -> "Buckets":
        """Return the buckets that begin after a step."""
        first = int(np.searchsorted(self.first_steps, step, "right"))
        return Buckets(*(getattr(self, name)[first:] for name in self.__dataclass_fields__)) if first else self

    def joined_by(self, late: "Buckets") -> "Buckets":
        """Return this single bucket with one more sample, which lies within its steps or next to them."""
        following = late.last_steps[0] > self.last_steps[0]
        whole = Buckets.concatenated([self, late] if following else [late, self]).gathered(np.zeros(1, np.intp))
        return replace(
            whole,
            first_steps=np.minimum(self.first_steps, late.first_steps),
            last_steps=np.maximum(self.last_steps, late.last_steps),
        )

    def gathered(self, starts: NDArray[np.intp]) -> "Buckets":
        """Return larger buckets, each from one of ``starts`` (ascending, the first is 0) to the next."""
        if len(starts) == len(self) or not len(self):
            return self
        ends = np.append(starts[1:], len(self)) - 1
        measured = self.finite > 0
        if measured.all():
            return self._all_finite(starts, ends)
        infinite = self.low.dtype.type(np.inf)
        finite = _reduced(np.add, self.finite, starts, np.int64)
        last = self._newest(starts, ends)
        nothing = finite == 0
        mean = self.mean[starts]
        if mean.shape[1]:
            finite_means = np.where(measured, self.mean, 0)
            mean = np.where(nothing, last, _averaged(finite_means, self.finite, starts, np.maximum(finite, 1)))
        return Buckets(
            self.first_steps[starts],
            self.last_steps[ends],
            np.where(nothing, last, _reduced(np.minimum, np.where(measured, self.low, infinite), starts)),
            np.where(nothing, last, _reduced(np.maximum, np.where(measured, self.high, -infinite), starts)),
            mean,
            last,
            finite,
            _reduced(np.add, self.nonfinite, starts, np.int64),
        )

    def _all_finite(self, starts: NDArray[np.intp], ends: NDArray[np.intp]) -> "Buckets":
        """Return the same as ``gathered`` in a third of its time; every bucket has to hold finite values."""
        finite = _reduced(np.add, self.finite, starts, np.int64)
        mean = self.mean[starts]
        if mean.shape[1]:
            single = np.may_share_memory(self.mean, self.last)  # buckets of one sample each
            mean = _averaged(self.mean, None if single else self.finite, starts, finite)
        return Buckets(
            self.first_steps[starts],
            self.last_steps[ends],
            _reduced(np.minimum, self.low, starts),
            _reduced(np.maximum, self.high, starts),
            mean,
            self.last[ends],
            finite,
            _reduced(np.add, self.nonfinite, starts, np.int64),
        )

    def _newest(self, starts: NDArray[np.intp], ends: NDArray[np.intp]) -> Floats:
        """Return the newest value of each larger bucket that is not missing; missing if all are."""
        present = (self.finite > 0) | (self.nonfinite > 0)
        if present[ends].all():
            return self.last[ends]
        rows = np.arange(len(self))[:, None]
        newest = _reduced(np.maximum, np.where(present, rows, -1), starts)
        return np.take_along_axis(self.last, np.where(newest < 0, ends[:, None], newest), axis=0)

    def thinned(self, points: int) -> "Buckets":
        """Return at most ``points`` buckets and at least half as many, each gathered from equally many of these."""
        size = max(1, -(-len(self) // points))
        return self.gathered(np.arange(0, len(self), size))


def even_starts(count: int, fan_out: int) -> NDArray[np.intp]:
    """Return where groups of ``count`` neighbours begin, each of ``fan_out`` to twice as many; few make one group."""
    groups = max(1, count // fan_out)
    return np.arange(groups) * count // groups


def _averaged(values: Floats, counts: Counts | None, starts: NDArray[np.intp], finite: Counts) -> Floats:
    """Return the means over groups of ``finite`` values; each value counts as often as ``counts`` says, or once.

    The mean of finite values is finite: if a sum is beyond float64, which a sum of float32 never is, it is taken of
    values that are scaled down.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = _summed(values, counts, starts)
        mean = total / finite
        if values.dtype != np.float32 and not np.isfinite(total).all():
            smaller = _summed(values * _SMALL, counts, starts) / finite
            largest = np.finfo(np.float64).max * _SMALL
            mean = np.where(np.isfinite(total), mean, np.clip(smaller, -largest, largest) / _SMALL)
    return mean.astype(values.dtype, copy=False)


def _summed(values: Floats, counts: Counts | None, starts: NDArray[np.intp]) -> NDArray[np.float64]:
    if counts is None:
        return _reduced(np.add, values, starts, np.float64)
    return _reduced(np.add, values * counts.astype(np.float64), starts)


def _reduced(
    combine: np.ufunc, values: NDArray[Any], starts: NDArray[np.intp], dtype: type[Any] | None = None
) -> NDArray[Any]:
    """Return ``combine.reduceat(values, starts, axis=0)``, in a tenth of its time."""
    size = int(starts[1]) if len(starts) > 1 else len(values)
    if (np.diff(starts) != size).any():
        groups = np.split(values, starts[1:])
        return np.stack([combine.reduce(group, axis=0, dtype=dtype) for group in groups])
    even = len(starts) if len(starts) * size == len(values) else len(starts) - 1
    whole = values[: even * size].reshape(even, size, values.shape[1])
    reduced: NDArray[Any] = combine.reduce(whole, axis=1, dtype=dtype)
    if even == len(starts):
        return reduced
    return np.concatenate([reduced, combine.reduce(values[even * size :], axis=0, keepdims=True, dtype=dtype)])
