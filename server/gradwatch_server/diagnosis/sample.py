"""One sample of a run, and the run's parameters, as arrays over the parameters for the rules of the diagnosis."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.statistics import RATIO_EPS
from gradwatch.wire import MISSING, UNSTEPPED, Statistic, Vector
from gradwatch_server.diagnosis.run_parameters import Flags, Floats, Indices, RunParameters

TINY = 1e-45
"""The smallest positive float32. It stands for zero on a logarithmic scale."""
_UNDERFLOW_DECADES = 2.5
"""A gradient that has faded so far before it reaches zero has underflowed."""
_SETTLED_LOSSES = 5


def median(values: Sequence[float] | Floats) -> float:
    """Return the same as ``np.median`` to the last bit, five times as fast on a few hundred numbers."""
    ordered = np.array(values)
    ordered.sort()
    middle = len(ordered) // 2
    if math.isnan(ordered[-1]) or len(ordered) % 2:
        return float(ordered[-1] if math.isnan(ordered[-1]) else ordered[middle])
    return (float(ordered[middle - 1]) + float(ordered[middle])) / 2


def extended(vector: NDArray[Any] | None, size: int, value: float) -> NDArray[Any]:
    """Return a stored vector, filled up to ``size`` with ``value``: a run may append parameters."""
    if vector is not None and len(vector) == size:
        return vector
    existing = np.zeros(0, type(value)) if vector is None else vector
    return np.concatenate([existing, np.full(size - len(existing), value, existing.dtype)])


def rank_correlation(values: Floats) -> float:
    """Return Spearman's rank correlation of values with their position; 0 where all are equal."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)
    if np.ptp(values) == 0.0:
        return 0.0
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])


def log10(values: Floats) -> Floats:
    """Return log10 of norms, that of ``TINY`` for smaller ones."""
    logs: Floats = np.log10(np.maximum(values, TINY))
    return logs


def attenuation(logs: Floats) -> float:
    """Return by how many decades the first third of logarithms lies below the last third, by their medians."""
    third = max(1, len(logs) // 3)
    return median(logs[-third:]) - median(logs[:third])


@dataclass(frozen=True, eq=False)
class Profile:
    """Numbers of one sample that several rules and ``/metrics`` use; all arrays have the shape (parameters,)."""

    gradient: Floats
    weight: Floats
    present: Flags
    """True where there was a gradient."""
    finite: Flags
    """True where there was a gradient and it was finite."""
    nonfinite: Flags
    """True where there was a gradient with a NaN or an infinity in it; its norm may be finite."""
    ratio: Floats
    """``gradient / (weight + RATIO_EPS)``; NaN where the gradient is missing or not finite."""
    rms: Floats
    """Root mean square of the gradient, ``gradient / sqrt(elements)``; NaN likewise."""
    leverage: Floats
    """``gradient * weight / |loss|``: the relative change of the loss for a relative change of the parameter.

    It is free of every scale (of the loss, of the weights). NaN where no loss is known. The weight counts as at least a
    tenth of an orthonormal matrix's norm, so that matrices that start at zero do not look useless.
    """
    matrices: Indices
    """Indices of weight matrices with a finite gradient, without embeddings, from input to output."""
    vectors: Indices
    """Indices of biases and gains with a finite gradient, from input to output."""
    loss: float
    """NaN where the loss is not known or not finite."""
    global_gradient: float
    """L2 norm over all finite gradients, before any clipping."""
    usual_weight: Floats
    """Half of the norm of an orthonormal matrix with as many units: about what common initialisations draw."""
    update: Floats
    """Norm of the change that the step made to the weight; MISSING where it was not measured."""
    unstepped: Flags
    """True where there was a gradient, but no optimizer that would step it; its norm is not known."""
    first_weight: Floats | None
    """Weight norms at the first sample, NaN for a parameter that came later; None at the first sample."""

    @cached_property
    def zero(self) -> Flags:
        """True where there was a gradient of exactly zero."""
        zero: Flags = self.present & (self.gradient == 0.0)
        return zero

    @cached_property
    def nonzero(self) -> Flags:
        """True where there was a gradient other than zero, finite or not."""
        nonzero: Flags = self.present & (self.gradient != 0.0)
        return nonzero

    @cached_property
    def alive(self) -> Flags:
        """True where there was a finite gradient other than zero."""
        return self.finite & (self.gradient > 0.0)

    @cached_property
    def all_alive(self) -> bool:
        """Whether every parameter is alive, as at nearly every sample of most runs."""
        return bool(self.alive.all())

    @cached_property
    def overflowed(self) -> bool:
        """Whether the norm of some gradient is not finite."""
        return not np.array_equal(self.finite, self.present)

    @cached_property
    def growth(self) -> Floats:
        """Log10 of the growth of each weight matrix since the first sample, from input to output.

        It is measured from the size that a matrix ought to have, half of an orthonormal one's norm, or from where it
        began if that is more: weights that begin small grow many times over, and are meant to.
        """
        members = self.matrices
        if not members.size or self.first_weight is None:
            return np.zeros(len(members))
        least = self.usual_weight[members]
        now, first = np.maximum(self.weight[members], least), self.first_weight[members]
        grew: Floats = np.log10(now / np.maximum(np.where(np.isnan(first), now, first), least))
        return grew

    @cached_property
    def typical_update(self) -> float:
        """Median over the weight matrices of what the step changed, as a share of the weight, or of its usual norm.

        It is the true change, whatever the optimizer made of the gradient; NaN where no change was measured.
        """
        update = self.update[self.matrices]
        measured = self.matrices[update > 0.0]
        if not measured.size:
            return math.nan
        return median(self.update[measured] / np.maximum(self.weight[measured], self.usual_weight[measured]))

    @cached_property
    def typical_growth(self) -> float:
        """Median of ``growth``; 0 without matrices or at the first sample."""
        return median(self.growth) if self.matrices.size and self.first_weight is not None else 0.0

    @property
    def growth_times(self) -> Floats:
        """How many times over each weight matrix has grown, shape (parameters,); 1 for other parameters."""
        times = np.ones(len(self.weight))
        times[self.matrices] = 10.0**self.growth
        return times

    @cached_property
    def leverages(self) -> Floats:
        """Leverage of each weight matrix, from input to output."""
        return self.leverage[self.matrices]

    @cached_property
    def typical_leverage(self) -> float:
        """Median of ``leverages``; NaN without matrices."""
        return median(self.leverages) if self.matrices.size else math.nan

    @property
    def in_proportion(self) -> bool:
        """Whether the gradients of half of the matrices are no larger than their weights; False without matrices."""
        return self.matrices.size > 0 and self.typical(self.ratio) <= 1.0

    def typical(self, values: Floats) -> float:
        """Return the median of ``values`` over the weight matrices; NaN without matrices."""
        return median(values[self.matrices]) if self.matrices.size else math.nan

    def decades_per_layer(self, members: Indices) -> float:
        """Return the slope of log10 of the gradient's RMS over ``members``; NaN for fewer than two.

        The slope is positive where the gradient fades on its way from the output to the input. The chain rule's factor
        of one layer is ``10 ** -slope``.

        Args:
            members: indices of parameters from input to output.
        """
        if len(members) < 2:
            return math.nan
        places = np.arange(len(members)) - (len(members) - 1) / 2
        return float(places @ log10(self.rms[members]) / (places @ places))

    def underflows(self, members: Indices) -> bool:
        """Return whether the gradient fades over ``members`` so far that a zero nearer to the input is an underflow.

        Args:
            members: indices of parameters with a gradient other than zero, from input to output.
        """
        if len(members) < 3:
            return False
        logs = log10(self.rms[members])
        return median(logs[-(len(logs) // 3) :]) - float(logs[0]) > _UNDERFLOW_DECADES


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Everything measured at one step."""

    step: int
    at: float
    """Unix seconds."""
    statistics: Mapping[Statistic, Vector]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Scalars of the run at this step, the loss among them."""
    losses: Sequence[tuple[int, float]] = ()
    """(step, loss) of every step since the last sample, this one included, as far as the agent reported them."""

    def every_loss(self) -> list[float]:
        """Return the losses since the last sample: of every step if known, else of this step, else none."""
        losses = [loss for _, loss in self.losses]
        return losses or ([self.scalars["loss"]] if "loss" in self.scalars else [])

    def settled_loss(self, loss: float) -> float:
        """Return the median of the losses of the last five steps, which no single spike moves; ``loss`` if unknown."""
        last = [loss if math.isfinite(loss) else math.inf for _, loss in self.losses[-_SETTLED_LOSSES:]]
        return median(last) if len(last) == _SETTLED_LOSSES else loss

    def vector(self, name: Statistic, size: int) -> Floats:
        """Return a statistic as float64, shape (size,), with MISSING where it was not measured."""
        found = self.statistics.get(name)
        if found is not None and len(found) == size:
            return found.astype(np.float64)
        vector = np.full(size, MISSING)
        if found is not None:
            vector[: len(found)] = found
        return vector

    def clipped_share(self, size: int) -> Floats:
        """Return the share of clipped units among those with a gradient, shape (size,); MISSING if not measured.

        Clipping never scales a unit without a gradient, such as a ReLU that no input of the batch activates.
        """
        clipped, silent = self.vector("clipped_unit_share", size), self.vector("zero_unit_share", size)
        living = 1.0 - np.clip(silent, 0.0, 1.0)
        return np.where(clipped > 0.0, np.minimum(clipped / np.maximum(living, 1e-6), 1.0), clipped)

    def profile(self, parameters: RunParameters, first_weights: Floats | None = None) -> Profile:
        """Return the numbers that the rules share; ``first_weights`` are the weight norms at the run's first sample."""
        size = len(parameters.names)
        gradient, weight = self.vector("grad_norm", size), self.vector("weight_norm", size)
        present = ~(gradient <= MISSING)  # NaN is present
        finite = present & np.isfinite(gradient)
        loss = self.scalars.get("loss", math.nan)
        loss = loss if math.isfinite(loss) else math.nan
        everything = bool(finite.all())
        known = gradient if everything else np.where(finite, gradient, np.nan)
        usable = finite & np.isfinite(weight)
        whole = bool(usable.all())
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return Profile(
                gradient=gradient,
                weight=weight,
                present=present,
                finite=finite,
                nonfinite=present & (~finite | (self.vector("nonfinite_count", size) > 0.0)),
                ratio=known / (np.maximum(weight, 0.0) + RATIO_EPS),
                rms=known / parameters.root_elements,
                leverage=_leverage(known, np.maximum(weight, parameters.least_weight), loss),
                matrices=parameters.matrices if whole else parameters.matrices[usable[parameters.matrices]],
                vectors=parameters.vectors if whole else parameters.vectors[usable[parameters.vectors]],
                loss=loss,
                global_gradient=math.sqrt(np.square(gradient if everything else gradient[finite]).sum()),
                usual_weight=5.0 * parameters.least_weight,
                update=self.vector("update_norm", size),
                unstepped=gradient == UNSTEPPED,
                first_weight=None if first_weights is None else extended(first_weights, size, np.nan),
            )


def _leverage(gradient: Floats, weight: Floats, loss: float) -> Floats:
    return np.full(len(gradient), np.nan) if math.isnan(loss) else gradient * weight / max(abs(loss), 1e-30)
