"""The statistics of one sample while they are filled in, and whether two measurements of the same gradients agree."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch.norms.tensor_spec import TensorSpec
from gradwatch.ranks.parts import ClipPart
from gradwatch.statistics import MEASURED, MISSING, Source, clip_coefficient, measured_from
from gradwatch.steps.state import NormClip, ScaledBy

_TOLERANCE = 1e-4
"""Relative difference that is taken for none."""


class Vectors:
    """The statistics of one sample while they are filled in, each of shape (parameters,)."""

    def __init__(self, count: int) -> None:
        self._values = {name: np.full(count, MISSING, np.float32) for name in MEASURED}
        self.norm_before_agc = np.full(count, MISSING, np.float32)
        """Norm of the gradient that AGC, or else the optimizer, was given: after any other clipping."""
        self.units = np.zeros(count)
        """Number of units that were measured."""
        self.limits = np.full(count, np.inf)
        """Largest ratio that AGC let through."""
        self._partial_clips: list[tuple[NormClip, set[int]]] = []
        """Clippings of which only this rank's part of the norm is known, and the parameters that they had scaled."""

    def __getitem__(self, name: str) -> wire.Vector:
        return self._values[name]

    def __setitem__(self, name: str, values: wire.Vector) -> None:
        self._values[name] = values

    def note_partial(self, clips: Sequence[ScaledBy], indices: NDArray[np.intp]) -> None:
        """Remember which partial clippings had scaled the gradients that were measured last."""
        entered = set(indices.tolist())
        for _, scaled in self._partial_clips:
            scaled -= entered
        self._partial_clips += [(clip, entered & mine) for clip, mine in clips if clip.partial]

    def replace(self, values: Mapping[str, NDArray[np.float64]]) -> None:
        """Replace this rank's values by those of the whole parameters."""
        with np.errstate(all="ignore"):
            self._values |= {name: whole.astype(np.float32) for name, whole in values.items()}

    def clip_parts(self, clips: Sequence[NormClip]) -> list[ClipPart]:
        """Return what this rank knows of the clippings of which it saw only a part of the norm."""
        parts = []
        for clip in clips:
            if clip.partial:
                scaled = sorted(index for other, mine in self._partial_clips if other is clip for index in mine)
                total = 0.0 if clip.repeats else clip.total_norm
                parts.append(ClipPart(clip.ranks, total, clip.max_norm, clip.norm_type, scaled))
        return parts

    def clip_late(self, clips: Sequence[ScaledBy], unknown: Collection[int]) -> None:
        """Scale the norms after clipping by what was clipped within the optimizer's step, after they were measured.

        Args:
            clips: clippings by norm.
            unknown: parameters that were clipped by value, which does not tell their norms.
        """
        norms = self._values["clipped_grad_norm"]
        for clip, indices in clips:
            scaled = [index for index in indices if norms[index] != MISSING]
            with np.errstate(all="ignore"):
                norms[scaled] *= clip_coefficient(clip.total_norm, clip.max_norm)
        norms[list(unknown)] = MISSING

    def set_zero(self, index: int) -> None:
        """Set the statistics of a gradient without elements."""
        for row in measured_from("gradient", "clipping", "agc"):
            self._values[row.name][index] = 0.0
        self.norm_before_agc[index] = 0.0

    def statistics(self, sources: Collection[Source]) -> dict[wire.Statistic, wire.Vector]:
        """Return the statistics that were measured from these sources."""
        return {row.name: self._values[row.name] for row in measured_from(*sources) if not row.internal}


def total_norm(vector: wire.Vector) -> float:
    """Return the norm over all parameters that have a gradient."""
    present = vector[vector != MISSING].astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.sum(present * present)))


def agree(before: NDArray[Any], at_step: NDArray[Any], specs: Sequence[TensorSpec]) -> bool | None:
    """Return whether norms agree; None where no two finite ones can be compared.

    Args:
        before: norms before clipping, shape (parameters,).
        at_step: norms that follow from those at the step, same shape; ``MISSING`` where there is none.
        specs: of the gradients.
    """
    known = (at_step != MISSING) & np.isfinite(before) & np.isfinite(at_step)
    if not known.any():
        return None
    largest = np.array([_rounding(spec) for spec in specs])
    return bool((np.abs(before - at_step) <= largest * before)[known].all())


def _rounding(spec: TensorSpec) -> float:
    """Return the relative error that a norm has after the elements were scaled, and rounded to their type."""
    return max(_TOLERANCE, 2 * torch.finfo(spec.dtype).eps / math.sqrt(max(math.prod(spec.shape), 1)))
