"""One sample: the statistics of every parameter in one pass over gradients and weights, without waiting."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradwatch.catalog import Tracked
from gradwatch.norms import UnitNorms
from gradwatch.wire import MISSING, Statistic, Vector

_ROWS: tuple[Statistic, ...] = ("grad_norm", "weight_norm", "max_unit_ratio", "zero_unit_share", "nonfinite_count")
_MOST_PLANS = 16


@dataclass
class Measured:
    """Statistics on their way to the host."""

    host: Tensor
    """Shape (statistics, parameters of the device), float32, pinned where the device is not the CPU."""
    members: list[int]
    """Index of each of those parameters in the catalogue."""
    present: list[int]
    """Positions, within ``members``, of those that had a gradient."""
    done: torch.Event | None
    """Recorded behind the copy; none on the CPU, where the numbers are there at once."""

    def ready(self) -> bool:
        """Return whether the numbers have arrived, without waiting for them."""
        return self.done is None or self.done.query()

    def fill(self, statistics: dict[Statistic, Vector]) -> None:
        """Write the numbers into vectors over the whole catalogue."""
        numbers = self.host.numpy()
        positions = np.array(self.members)
        for row, name in enumerate(_ROWS):
            chosen = slice(None) if name == "weight_norm" else self.present
            statistics[name][positions[chosen]] = numbers[row, chosen]


@dataclass(frozen=True)
class _Plan:
    """How the gradients that are there now are measured."""

    norms: UnitNorms
    positions: Tensor
    """Index, within the device's parameters, that each unit belongs to."""
    counterparts: Tensor
    """Index of the same unit in the buffer of the weights."""


class DeviceMeter:
    """Measures the parameters that lie on one device.

    Args:
        tracked: the whole catalogue.
        members: indices of the parameters on this device.
        eps: floor for a unit's weight norm in ``max_unit_ratio``.
    """

    def __init__(self, tracked: Sequence[Tracked], members: list[int], eps: float) -> None:
        self._members = members
        self._parameters = [tracked[index].parameter for index in members]
        self._units = [tracked[index].unit for index in members]
        self._eps = eps
        self._device = self._parameters[0].device
        self._weights: UnitNorms | None = None
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def measure(self, chosen: set[int] | None, scale: Tensor | None) -> Measured:
        """Measure the weights of all parameters and the gradients of the chosen ones.

        Args:
            chosen: ids of the parameters that step now; none: all.
            scale: what the gradients are still multiplied by (a fused optimizer under a GradScaler); a scalar tensor.
        """
        try:
            return self._measure(chosen, scale)
        except RuntimeError:  # a parameter or gradient has another shape or layout than when the plan was made
            self._weights = None
            self._plans.clear()
            return self._measure(chosen, scale)

    @torch.no_grad()
    def _measure(self, chosen: set[int] | None, scale: Tensor | None) -> Measured:
        datas = [_local(parameter.data) for parameter in self._parameters]
        if self._weights is None:
            self._weights = UnitNorms(datas, self._units)
        weights = self._weights(datas)
        present, gradients = [], []
        for position, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is not None and (chosen is None or id(parameter) in chosen):
                present.append(position)
                gradients.append(_local(gradient))
        count = len(self._members)
        sums = torch.zeros((len(_ROWS), count), dtype=torch.float64, device=self._device)
        sums[1].index_add_(0, self._weights.owner, weights.square()).sqrt_()
        if gradients:
            plan = self._plan(present, gradients)
            norms = plan.norms(gradients)
            if scale is not None:
                norms.div_(scale.to(norms.device))
            floor = weights.index_select(0, plan.counterparts).clamp_(min=self._eps)
            sums[0].index_add_(0, plan.positions, norms.square()).sqrt_()
            sums[2].scatter_reduce_(0, plan.positions, norms / floor, "amax")
            sums[3].index_add_(0, plan.positions, (norms == 0).double())
            sums[3].div_(self._unit_counts())
            if self._device.type != "cpu":
                sums[4].index_add_(0, plan.positions, norms.isfinite().logical_not_().double())
        return self._to_host(sums.float(), present, gradients)

    def _to_host(self, numbers: Tensor, present: list[int], gradients: list[Tensor]) -> Measured:
        if self._device.type != "cpu":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            done = torch.Event(self._device.type)
            done.record()
            return Measured(host, self._members, present, done)
        norms = numbers.numpy()[0]
        for position, gradient in zip(present, gradients, strict=True):
            if not np.isfinite(norms[position]):
                _examine_nonfinite(numbers, position, gradient)
        return Measured(numbers, self._members, present, None)

    def _unit_counts(self) -> Tensor:
        return torch.tensor([max(unit.units, 1) for unit in self._units], dtype=torch.float64, device=self._device)

    def _plan(self, present: list[int], gradients: list[Tensor]) -> _Plan:
        key = (*present, *(gradient.layout == torch.strided for gradient in gradients))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(present, gradients)
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _make_plan(self, present: list[int], gradients: list[Tensor]) -> _Plan:
        assert self._weights is not None
        norms = UnitNorms(gradients, [self._units[position] for position in present])
        positions = torch.tensor(present, dtype=torch.int64, device=self._device)[norms.owner]
        counterparts = torch.empty_like(norms.owner)
        for index, position in enumerate(present):
            units = self._units[position].units
            first = self._weights.first[position]
            start = norms.first[index]
            counterparts[start : start + units] = torch.arange(first, first + units, device=self._device)
        return _Plan(norms, positions, counterparts)


def _examine_nonfinite(numbers: Tensor, position: int, gradient: Tensor) -> None:
    """Count what is not finite; where nothing is, the norm only overflowed float32: measure it in float64."""
    values = gradient.coalesce().values() if gradient.layout != torch.strided else gradient
    values = torch.view_as_real(values) if values.is_complex() else values
    bad = values.isfinite().logical_not_().sum(dtype=torch.int64).numpy()
    numbers[4, position] = float(bad)
    if not bad:
        numbers[0, position] = torch.linalg.vector_norm(values.double())


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor: no collective."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class Meter:
    """Measures a catalogue, device by device."""

    def __init__(self, tracked: Sequence[Tracked], eps: float) -> None:
        self._count = len(tracked)
        devices: dict[torch.device, list[int]] = {}
        for index, entry in enumerate(tracked):
            devices.setdefault(entry.parameter.device, []).append(index)
        self._devices = [DeviceMeter(tracked, members, eps) for members in devices.values()]

    def measure(self, chosen: set[int] | None, scale: Tensor | None) -> list[Measured]:
        """Measure on every device; see ``DeviceMeter.measure``."""
        return [device.measure(chosen, scale) for device in self._devices]

    def blank(self) -> dict[Statistic, Vector]:
        """Return vectors in which everything is missing, shape (parameters,), float32."""
        return {name: np.full(self._count, MISSING, np.float32) for name in _ROWS}
