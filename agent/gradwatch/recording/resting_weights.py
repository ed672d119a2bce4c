"""The weights that no optimizer steps with a gradient in a round: frozen ones, experts at rest, targets that follow."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.buffers import SampleBuffers
from gradwatch.norms.measurement_plan import MeasurementPlan
from gradwatch.norms.tensor_spec import local_part, spec_of
from gradwatch.recording import float64 as inspection
from gradwatch.rounds import Reading, Round

_ELEMENTS: Final = {"cpu": 1 << 18}
_ELEMENTS_ELSEWHERE: Final = 1 << 25
"""Elements, in the mean over the samples, that are read of weights which do not seem to have changed."""
_PLANS: Final = 16

_Other = tuple[int, Tensor]


class Others:
    """Measures other weights when they have changed; in turn, at a bounded cost, also where that does not show.

    torch counts what changes a tensor, but for what is done to its ``data``, as many do to let a target network follow.

    Args:
        parameters: what is watched.
    """

    def __init__(self, parameters: ParameterRegistry) -> None:
        self._parameters = parameters
        self._versions: dict[int, int] = {}
        """Of those that were not stepped in the last sample, by index, as they were when they were measured."""
        self._turn = 0
        self._credit = 0
        """Elements that may be read of those that do not seem to have changed."""
        self._plans: OrderedDict[tuple[int, ...], MeasurementPlan] = OrderedDict()

    def measure(self, round_: Round, slot: SampleBuffers) -> list[Reading]:
        """Measure what a round that is over has not measured; return the reading, if there is any.

        Args:
            round_: its optimizers have stepped.
            slot: its slot.
        """
        count = len(self._parameters.watched)
        if len(round_.readings) == 1 and len(round_.readings[0].norms.plan.indices) == count:
            self._versions.clear()
            return []
        measured = {index for reading in round_.readings for index in reading.norms.plan.indices}
        others = [(i, other) for i, other in self._parameters.other_than(measured) if not other.is_meta]
        versions = {index: _version(other) for index, other in others}
        changed = {index for index, version in versions.items() if self._versions.get(index) != version}
        self._versions = versions
        chosen = [other for other in others if other[0] in changed]
        chosen += self._next([other for other in others if other[0] not in changed])
        with torch.no_grad():
            return [self._read(chosen, slot)] if chosen else []

    def _next(self, others: Sequence[_Other]) -> list[_Other]:
        """Return those whose turn it is."""
        if not others:
            return []
        share = _ELEMENTS.get(others[0][1].device.type, _ELEMENTS_ELSEWHERE)
        self._credit = min(self._credit + share, max(share, *(other.numel() for _, other in others)))
        chosen: list[_Other] = []
        while len(chosen) < len(others):
            following = others[self._turn % len(others)]
            if following[1].numel() > self._credit:
                break
            self._credit -= following[1].numel()
            self._turn += 1
            chosen.append(following)
        return sorted(chosen, key=lambda other: other[0])

    def _read(self, chosen: Sequence[_Other], slot: SampleBuffers) -> Reading:
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
        norms = slot.allocate(plan)
        norms.measure_weights(members)
        reading = Reading(norms, before_clip=False)
        inspection.inspect(reading, (), members)
        return reading


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed; torch does not count it where it was made in inference mode."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001
