"""The table of per-parameter statistics, and the numpy functions that compute them from unit norms.

Everything that lists statistics derives from ``STATISTICS``: the names on the wire and in the store, the sample
builder, the joining of ranks, the table in docs/agent.md and the labels of the page. A new statistic is a new row; the
row itself computes it where the unit norms of gradient and weight suffice. No torch here: the server imports this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Starts = Sequence[int]
"""Where the units of each parameter begin among all units, ascending, shape (parameters,); each has at least one."""

RATIO_EPS: Final = 1e-3
"""eps of ``||g|| / (||w|| + eps)`` of a parameter and of ``||g_i|| / max(||w_i||, eps)`` of a unit, by which AGC clips
unless told otherwise (Brock et al., 2021): weights that start at zero have a ratio, too."""

MISSING: Final = -1.0
"""The value of a statistic that was not measured, because the parameter had no gradient; all others are 0 or more."""

UNSTEPPED: Final = -2.0
"""The gradient norm, as the server keeps it, of a parameter that has a gradient, but no optimizer that steps it."""


@dataclass(frozen=True, slots=True)
class Units:
    """Norms of the units of several parameters, one after the other; each of shape (units,), float64.

    A norm that was not measured is left empty.
    """

    gradient: Floats = field(default_factory=lambda: np.zeros(0))
    weight: Floats = field(default_factory=lambda: np.zeros(0))
    agc_factor: Floats = field(default_factory=lambda: np.zeros(0))
    """Factor by which AGC multiplied the gradient, see ``agc_factors``."""
    change: Floats = field(default_factory=lambda: np.zeros(0))
    """Norm of the weight after the step minus the weight before it."""
    eps: float = RATIO_EPS
    """Floor of a unit's weight norm in a ratio."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """Reduces the values of units to one value of their parameter, and joins the parts of several ranks."""

    of_units: Callable[[Floats, Starts], Floats]
    """(values of units, starts) -> values of parameters; ``starts`` is not empty."""
    to_part: Callable[[Floats, Floats], Floats]
    """(values of parameters on one rank, numbers of their units) -> the rank's parts."""
    join: np.ufunc
    """Reduces the parts of all ranks."""
    from_parts: Callable[[Floats, Floats], Floats]
    """(joined parts, numbers of units on all ranks) -> values of whole parameters."""
    absent: float = 0.0
    """The part of a rank that has nothing to add."""
    across_ranks: Literal["exact", "approximate", "unknown"] = "exact"
    """What the joined value is worth where units lie on several ranks, each of which sees a part of the unit. Of a
    parameter that is one unit it is computed from the joined norms instead, unless it is exact."""


def _counts(values: Floats, starts: Starts) -> Floats:
    return np.diff(np.append(np.asarray(starts), values.size)).astype(np.float64)


NORM: Final = Reduction(
    of_units=lambda values, starts: np.sqrt(np.add.reduceat(values * values, np.asarray(starts))),
    to_part=lambda values, _units: np.square(values),
    join=np.add,
    from_parts=lambda squares, _units: np.sqrt(squares),
)
"""Root of the sum of squares; ranks add the squares."""

SUM: Final = Reduction(
    of_units=lambda values, starts: np.add.reduceat(values, np.asarray(starts)),
    to_part=lambda values, _units: values,
    join=np.add,
    from_parts=lambda total, _units: total,
)
"""Sum; ranks add their sums."""

MEAN: Final = Reduction(
    of_units=lambda values, starts: np.add.reduceat(values, np.asarray(starts)) / _counts(values, starts),
    to_part=lambda values, units: values * units,
    join=np.add,
    from_parts=lambda total, units: total / np.maximum(units, 1.0),
    across_ranks="approximate",
)
"""Mean over the units; ranks add their sums and their numbers of units."""

MAX: Final = Reduction(
    of_units=lambda values, starts: np.maximum.reduceat(values, np.asarray(starts)),
    to_part=lambda values, _units: values,
    join=np.maximum,
    from_parts=lambda largest, _units: largest,
    absent=MISSING,
    across_ranks="unknown",
)
"""Maximum, NaN where a unit's value is NaN; ranks take the maximum."""

Source = Literal["gradient", "weight", "clipping", "agc", "update"]
"""What a statistic is measured from, and so which samples hold it: ``gradient`` and ``weight`` all, ``clipping`` where
gradients are clipped, ``agc`` where AGC clips them, ``update`` where the change of the weights was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticSpec:
    """One row of the table. ``meaning`` and ``cost`` are cells of the table in docs/agent.md."""

    name: str
    label: str
    """Title on the page."""
    unit: str
    meaning: str
    cost: str
    source: Source
    of_unit: Callable[[Units], NDArray[np.generic]]
    """The value of each unit, shape (units,)."""
    reduction: Reduction
    before_clipping: bool = False
    """Whether it is proportional to the gradient before any clipping: clip coefficients are divided out of it."""
    joins_ranks: bool = True
    """Whether the parts of several ranks are joined; if not, samples of a sharded training do not hold it."""
    internal: bool = False
    """Whether it only serves to compute numbers of the whole run, and is in no sample."""

    def measure(self, units: Units, starts: Starts) -> Floats:
        """Return the statistic of each parameter, shape (parameters,)."""
        if not starts:
            return np.zeros(0)
        with np.errstate(all="ignore"):
            return self.reduction.of_units(self.of_unit(units).astype(np.float64, copy=False), starts)


_TABLE: Final = (
    StatisticSpec(
        name="grad_norm",
        label="Gradient norm",
        unit="norm",
        meaning="norm of the gradient before any clipping",
        cost="one read of the gradient",
        source="gradient",
        of_unit=lambda units: units.gradient,
        reduction=NORM,
        before_clipping=True,
    ),
    StatisticSpec(
        name="clipped_grad_norm",
        label="Gradient norm after clipping",
        unit="norm",
        meaning="of the gradient as the optimizer reads it; only where clipping is on",
        cost="none; a second pass for `clip_grad_value_`, and for `clip_grad_norm_` in the first ten samples, in every "
        "32nd, and as long as gradients change between clipping and step",
        source="clipping",
        of_unit=lambda units: units.gradient * units.agc_factor,
        reduction=NORM,
    ),
    StatisticSpec(
        name="weight_norm",
        label="Weight norm",
        unit="norm",
        meaning=(
            "norm of the weight before the step; of one that no gradient steps (frozen, an expert at rest, a target "
            "that follows), when it has changed; what is done to its `data`, which PyTorch does not count, shows in "
            "turn, on the CPU 2^18 elements at each sample, 2^25 elsewhere"
        ),
        cost="one read of the weight; of the others, where they have changed",
        source="weight",
        of_unit=lambda units: units.weight,
        reduction=NORM,
    ),
    StatisticSpec(
        name="max_unit_ratio",
        label="Largest unit ratio",
        unit="ratio",
        meaning="largest `norm(g_i) / max(norm(w_i), 1e-3)` over the units",
        cost="none",
        source="gradient",
        of_unit=lambda units: units.gradient / np.maximum(units.weight, units.eps),
        reduction=MAX,
        before_clipping=True,
    ),
    StatisticSpec(
        name="zero_unit_share",
        label="Share of zero units",
        unit="0 to 1",
        meaning=(
            "share of units whose gradient is exactly zero; below 1e-22 an element in a parameter of 2^20 elements or "
            "more whose other units are not that small"
        ),
        cost="none",
        source="gradient",
        of_unit=lambda units: units.gradient == 0,
        reduction=MEAN,
    ),
    StatisticSpec(
        name="nonfinite_count",
        label="Non-finite elements",
        unit="elements",
        meaning="elements that are NaN or infinite; on an accelerator, units that hold one",
        cost="only where there are any",
        source="gradient",
        of_unit=lambda units: ~np.isfinite(units.gradient),
        reduction=SUM,
    ),
    StatisticSpec(
        name="clipped_unit_share",
        label="Share of clipped units",
        unit="0 to 1",
        meaning="share of units that AGC scaled down; only with `clip=`",
        cost="none",
        source="agc",
        of_unit=lambda units: units.agc_factor < 1.0,
        reduction=MEAN,
    ),
    StatisticSpec(
        name="update_norm",
        label="Update norm",
        unit="norm",
        meaning=(
            "norm of the true change of the weight over the step; 0 where its optimizer stepped without a gradient "
            "for it"
        ),
        cost=(
            "a copy of another part of the model at each sample, in the mean of at most 2^18 elements on the CPU, 2^25 "
            "on an accelerator; parameters of more than 2^22 or 2^25 elements are missing"
        ),
        source="update",
        of_unit=lambda units: units.change,
        reduction=NORM,
        joins_ranks=False,
    ),
    StatisticSpec(
        name="removed_norm",
        label="Norm of the clipped part",
        unit="norm",
        meaning="norm of the part of the gradient that AGC took away",
        cost="none",
        source="agc",
        of_unit=lambda units: np.where(units.agc_factor < 1.0, units.gradient * (1.0 - units.agc_factor), 0.0),
        reduction=NORM,
        internal=True,
    ),
)

MEASURED: Final = {row.name: row for row in _TABLE}
"""All rows by name, internal ones as well."""
STATISTICS: Final = {row.name: row for row in _TABLE if not row.internal}
"""The statistics of a sample by name, in the order of the wire."""
JOINED: Final = tuple(row for row in _TABLE if row.joins_ranks)
"""The rows that several ranks join."""
LABELS: Final = {"ratio": "Gradient / weight ratio"} | {name: row.label for name, row in STATISTICS.items()}
"""Titles on the page; ``ratio`` is ``grad_norm / (weight_norm + RATIO_EPS)``, which the server computes."""


def measured_from(*sources: Source) -> tuple[StatisticSpec, ...]:
    """Return the rows that are measured from these sources."""
    return tuple(row for row in _TABLE if row.source in sources)


def agc_factors(units: Units, starts: Starts, limits: Floats, *, tensor_wise: bool) -> Floats:
    """Return the factor by which AGC multiplies the gradient of each unit: ``limit * weight / gradient``, at most 1.

    Args:
        units: gradient and weight norms; ``eps`` is the floor of a unit's weight norm, and is added to the weight norm
            where a tensor is clipped as a whole.
        starts: where each parameter's units begin.
        limits: largest ratio of each parameter, shape (parameters,), infinite where it is not clipped.
        tensor_wise: whether AGC takes each tensor as one unit.

    Returns:
        Shape (units,); 1 where the gradient norm is not finite.
    """
    owner = np.repeat(np.arange(len(starts)), np.diff(np.append(np.asarray(starts, np.intp), units.gradient.size)))
    norm, weight = units.gradient, np.maximum(units.weight, units.eps)
    if tensor_wise:
        norm = MEASURED["grad_norm"].measure(units, starts)[owner]
        weight = MEASURED["weight_norm"].measure(units, starts)[owner] + units.eps
    with np.errstate(all="ignore"):
        most = limits[owner] * weight
        factors = np.where(norm > most, most / norm, 1.0)
    factors[~np.isfinite(norm)] = 1.0
    return factors


def ratio_histogram(units: Units, edges: Floats, rows: NDArray[np.intp], row_count: int) -> Floats:
    """Return how many units have their ratio of gradient to weight in each bin, shape (row_count, len(edges) + 1).

    Args:
        units: gradient and weight norms.
        edges: upper edges of all bins but the last, ascending.
        rows: row of the result that counts each unit, shape (units,). A unit whose ratio is not finite is not counted.
        row_count: number of rows.
    """
    with np.errstate(all="ignore"):
        ratios = units.gradient / np.maximum(units.weight, units.eps)
    bins = edges.size + 1
    finite = np.isfinite(ratios)
    places = rows[finite] * bins + np.searchsorted(edges, ratios[finite], side="left")
    return np.bincount(places, minlength=row_count * bins).reshape(row_count, bins).astype(np.float64)


def clip_coefficient(total_norm: float, max_norm: float) -> float:
    """Return the factor of ``clip_grad_norm_``: ``min(1, max_norm / (total_norm + 1e-6))``.

    It is NaN for a NaN norm and 0 for an infinite one.
    """
    if np.isnan(total_norm):
        return float("nan")
    return float(min(1.0, max_norm / (total_norm + 1e-6)))
