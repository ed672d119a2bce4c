"""Resting weights: those that no optimizer steps with a gradient in a step, such as frozen ones and target networks."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gradwatch.model.readability import culprits
from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.buffers import SampleBuffers
from gradwatch.norms.layout import MeasurementPlan
from gradwatch.norms.tensor_spec import local_part, spec_of
from gradwatch.recording.float64 import recompute
from gradwatch.steps.state import Measurement, StepRecord

_ELEMENTS: Final = {"cpu": 1 << 18}
_ELEMENTS_ELSEWHERE: Final = 1 << 25
"""Elements, in the mean over the samples, that are read of weights which do not seem to have changed."""
_PLANS: Final = 16

_Resting = tuple[int, Tensor]


class RestingWeights:
    """Measures resting weights when they have changed, and each of them in turn at a bounded cost.

    torch counts the changes of a tensor, except those made to its ``data``, as many programs update target networks.

    Args:
        parameters: the watched parameters.
    """

    def __init__(self, parameters: ParameterRegistry) -> None:
        self._parameters = parameters
        self._versions: dict[int, int] = {}
        """Versions of the weights that rested in the last sample, by index."""
        self._turn = 0
        self._credit = 0
        """Elements that may be read of weights that do not seem to have changed."""
        self._plans: OrderedDict[tuple[int, ...], MeasurementPlan] = OrderedDict()

    def measure(self, record: StepRecord, buffers: SampleBuffers) -> list[Measurement]:
        """Measure weights that a step has not measured; return one measurement or none.

        Args:
            record: the step, which is over.
            buffers: its buffers.
        """
        measured = frozenset[int]().union(*(known.indices for known in record.measurements))
        watched = self._parameters.watched
        others = [
            (index, other)
            for index, other in self._parameters.other_than(measured)
            if not (watched[index].unreadable or other.is_meta)
        ]
        versions = {index: _version(other) for index, other in others}
        changed = {index for index, version in versions.items() if self._versions.get(index) != version}
        self._versions = versions
        chosen = [other for other in others if other[0] in changed]
        chosen += self._next([other for other in others if other[0] not in changed])
        with torch.no_grad():
            return self._measured(chosen, buffers) if chosen else []

    def _measured(self, chosen: Sequence[_Resting], buffers: SampleBuffers) -> list[Measurement]:
        """Measure some weights; none if one of them has turned out to be unreadable, which is left out from now on."""
        try:
            return [self._measure(chosen, buffers)]
        except Exception:  # a weight may be of any type by now, and so may the error
            found = culprits([other for _, other in chosen], [("whole", 1)] * len(chosen))
            if not found:
                raise
            self._parameters.mark_unreadable({chosen[position][0]: reason for position, reason in found.items()})
            return []

    def _next(self, others: Sequence[_Resting]) -> list[_Resting]:
        """Return the weights to measure next."""
        if not others:
            return []
        share = _ELEMENTS.get(others[0][1].device.type, _ELEMENTS_ELSEWHERE)
        self._credit = min(self._credit + share, max(share, *(other.numel() for _, other in others)))
        chosen: list[_Resting] = []
        while len(chosen) < len(others):
            following = others[self._turn % len(others)]
            if following[1].numel() > self._credit:
                break
            self._credit -= following[1].numel()
            self._turn += 1
            chosen.append(following)
        return sorted(chosen, key=lambda other: other[0])

    def _measure(self, chosen: Sequence[_Resting], buffers: SampleBuffers) -> Measurement:
        indices = tuple(index for index, _ in chosen)
        members = [local_part(other) for _, other in chosen]
        plan = self._plans.pop(indices, None)
        if plan is None or any(
            spec_of(m, "whole") != spec for m, spec in zip(members, plan.weight_layout.specs, strict=True)
        ):
            plan = MeasurementPlan(
                indices, None, [spec_of(member, "whole") for member in members]
            )  # only their norms are asked for
        self._plans[indices] = plan
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        norms = buffers.allocate(plan)
        norms.measure_weights(members)
        measurement = Measurement(frozenset(indices), norms, before_clip=False)
        recompute(measurement, (), members)
        return measurement


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed; torch does not count it where it was made in inference mode."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001
