"""Weight updates: how far a step moved the weights, measured for another part of them at each sample."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.norms.layout import MeasurementPlan, NormLayout, Reduction
from gradwatch.norms.reducer import NormReducer, Scratch
from gradwatch.recording.optimizer_parameters import OptimizerParameters, Pass
from gradwatch.steps.state import WeightUpdate

_ELEMENTS: Final = {"cpu": 1 << 22}
_ELEMENTS_ELSEWHERE: Final = 1 << 25
"""Largest parameter that is copied in one sample."""
_ELEMENTS_MEAN: Final = {"cpu": 1 << 18}
"""Elements that are copied in the mean over the samples; small parameters are copied several at a time."""


@dataclass(frozen=True, slots=True)
class _Before:
    """A part of the weights as it was before a step."""

    optimizer: Optimizer
    plan: MeasurementPlan
    reduction: Reduction
    positions: tuple[int, ...]
    parameters: list[Tensor]
    copy: Tensor

    @property
    def indices(self) -> list[int]:
        """Return the indices of the parameters."""
        return [self.plan.indices[position] for position in self.positions]


class WeightUpdates:
    """Keeps weights before a step, and measures afterwards how far they have moved."""

    def __init__(self) -> None:
        self._kept: list[_Before] = []

    def keep(self, optimizer: Optimizer, listed: OptimizerParameters, pass_: Pass) -> None:
        """Copy the next part of the weights, once the credit of elements suffices for it."""
        # An outer optimizer that evaluated its closure at other weights has kept what this step does not start from.
        self._kept = [kept for kept in self._kept if listed.index_set.isdisjoint(kept.indices)]
        plan, members = pass_.plan, pass_.members
        parts = plan.copy_groups
        if parts is None:
            parts = plan.find_copy_groups(_ELEMENTS_MEAN, _ELEMENTS, _ELEMENTS_ELSEWHERE)
        if not parts:
            return
        share = _ELEMENTS_MEAN.get(members[0].device.type, _ELEMENTS_ELSEWHERE)
        listed.update_credit = min(listed.update_credit + share, max(share, _ELEMENTS_ELSEWHERE))
        reduction, positions = parts[listed.next_part % len(parts)]
        elements = sum(members[position].numel() for position in positions)
        if elements > listed.update_credit:
            return
        listed.update_credit -= elements
        listed.next_part += 1
        parameters = [members[position] for position in positions]
        with torch.no_grad():
            copy = _joined(parameters, in_bucket=reduction.in_bucket)
        self._kept.append(_Before(optimizer, plan, reduction, positions, parameters, copy))

    def of(self, optimizer: Optimizer) -> list[WeightUpdate]:
        """Return how far a step of this optimizer has moved the weights that were kept for it."""
        mine = [kept for kept in self._kept if kept.optimizer is optimizer]
        self._kept = [kept for kept in self._kept if kept.optimizer is not optimizer]
        return [_update(kept) for kept in mine]

    def clear(self) -> None:
        """Drop the copies of weights: the step is over."""
        self._kept.clear()


def _update(kept: _Before) -> WeightUpdate:
    plan, reduction = kept.plan, kept.reduction
    starts = [0, *itertools.accumulate(plan.weight_units[position] for position in kept.positions)]
    units = starts.pop()
    with torch.no_grad():
        difference = _joined(kept.parameters, in_bucket=reduction.in_bucket).sub_(kept.copy)
        if reduction.in_bucket:
            wide = torch.promote_types(reduction.buffer.dtype, difference.dtype)
            out = torch.linalg.vector_norm(difference.view(units, -1), dim=1, dtype=wide)
        else:
            out = torch.empty(units, dtype=reduction.buffer.dtype, device=reduction.buffer.device)
            layout = NormLayout([reduction.spec], direct_bytes=0)
            NormReducer(layout, {reduction.buffer: out}, Scratch()).run([difference])
    return WeightUpdate(kept.indices, starts, out)


def _joined(parameters: Sequence[Tensor], *, in_bucket: bool) -> Tensor:
    """Return a copy of some parameters; several of one row shape as one tensor."""
    if not in_bucket:
        return parameters[0].detach().clone()
    return torch.stack(list(parameters)) if parameters[0].dim() == 0 else torch.cat(list(parameters))
