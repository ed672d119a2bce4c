"""The norm recorder: writes unit norms of gradients and weights to buffers, without waiting for the device."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.buffers import BufferPool
from gradwatch.norms.streams import StreamLog
from gradwatch.norms.transfer import Scalar, copy_scalar, read_now
from gradwatch.recording.float64 import recompute
from gradwatch.recording.optimizer_parameters import OptimizerParameters, Pass
from gradwatch.recording.resting_weights import RestingWeights
from gradwatch.recording.weight_updates import WeightUpdates
from gradwatch.steps.state import Measurement, StepRecord

_log = logging.getLogger("gradwatch")


class NormRecorder:
    """Measures the steps that are sampled.

    Args:
        parameters: the watched parameters.
        streams: the streams that the training uses.
        no_room: called for each sample that is dropped because all buffers are in use.
    """

    def __init__(self, parameters: ParameterRegistry, streams: StreamLog, no_room: Callable[[], None]) -> None:
        self.streams = streams
        self.pool = BufferPool(self.streams)
        self.pass_seconds = 0.0
        """Time of the last pass over gradients and weights; where AGC clips, it needs this pass anyway."""
        self.stopped = False
        """Whether nothing is measured any more, because the numbers would be wrong."""
        self.device_failed = False
        """Whether a device has raised when it was called."""
        self.sent: Callable[[StepRecord], None] = _nothing
        """Called with a step whose numbers are on their way from a device."""
        self._no_room = no_room
        self._updates = WeightUpdates()
        self._resting = RestingWeights(parameters)
        self._parameters = parameters

    def measure(
        self, parameters: OptimizerParameters, record: StepRecord, *, before_clip: bool
    ) -> tuple[Pass, Measurement] | None:
        """Measure the gradients of some parameters, and their weights.

        Args:
            parameters: those to measure; one without a gradient is left out.
            record: takes the measurement.
            before_clip: whether they are measured before ``clip_grad_norm_`` or ``clip_grad_value_`` changes them.

        Returns:
            None if there is no gradient. If no buffer is free, or measuring has stopped, the step is not sampled.
        """
        self.pass_seconds = 0.0
        if self.stopped:
            record.sampled = False
            return None
        if record.buffers is None:
            record.buffers = self.pool.acquire()
        if record.buffers is None:
            self._no_room()
            record.sampled = False
            return None
        started = time.perf_counter()
        pass_ = parameters.measure(record.buffers, self._parameters.watched)
        self.pass_seconds = time.perf_counter() - started
        if parameters.unreadable:
            self._parameters.mark_unreadable(parameters.unreadable)
        if pass_ is None:
            return None
        if pass_.plan.accelerators:
            self.streams.add_devices(pass_.plan.accelerators)
        measurement = Measurement(frozenset(pass_.plan.indices), pass_.norms, before_clip)
        recompute(measurement, pass_.grads, pass_.members)
        record.measurements.append(measurement)
        record.empty += pass_.plan.empty
        return pass_, measurement

    def measure_before_step(
        self, parameters: OptimizerParameters, record: StepRecord, optimizer: Optimizer
    ) -> tuple[Pass, Measurement] | None:
        """Measure the gradients that an optimizer is about to step with, and copy weights to measure their change."""
        measured = self.measure(parameters, record, before_clip=False)
        if measured is None:
            return None
        pass_, measurement = measured
        self._updates.keep(optimizer, parameters, pass_)
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):
            measurement.scale = copy_scalar(scale)
        return measured

    def measure_updates(self, optimizer: Optimizer, record: StepRecord) -> None:
        """Measure how far an optimizer has moved the weights that were kept before it stepped."""
        record.updates += self._updates.of(optimizer)

    def send(self, record: StepRecord) -> None:
        """Measure the resting weights of a step that is over, and begin to copy all its numbers to the host.

        A device that has failed raises at every call: such a step is marked as lost, and the training's own call tells.
        """
        self._updates.clear()
        numbers: list[Tensor] = []
        record.map_numbers(_noting(numbers), _noting(numbers))
        if record.buffers is None:
            if not numbers:
                return
            record.buffers = self.pool.acquire_transfer()
        try:
            self._measure_resting(record)
            record.buffers.send(numbers)
            if record.buffers.is_on_device:
                self.sent(record)
        except RuntimeError as error:
            record.buffers.is_lost = self.device_failed = True
            _log.debug("gradwatch: the numbers of step %d cannot be read: %s", record.step, error)

    def _measure_resting(self, record: StepRecord) -> None:
        measured = frozenset[int]().union(*(known.indices for known in record.measurements))
        if record.measurements and len(measured) < len(self._parameters.watched):
            record.measurements += self._resting.measure(record, record.buffers)

    def check_devices(self) -> None:
        """Find out whether the devices can still be called, without waiting for them."""
        try:
            for device in self.streams.used if self.streams.enter() else ():
                torch.zeros(1, device=device)
        except RuntimeError as error:
            self.device_failed = True
            _log.debug("gradwatch: a device has failed: %s", error)

    def take_back(self, dropped: list[StepRecord]) -> None:
        """Return to the pool the buffers of steps that will not be made, and empty the list of them."""
        while dropped:
            buffers = dropped.pop().buffers
            if buffers is not None:
                self.pool.release(buffers)


def _nothing(_record: StepRecord) -> None:
    """Do nothing: nobody looks at the numbers as they arrive."""


def _noting(numbers: list[Tensor]) -> Callable[[Any], Any]:
    """Return a function that notes the tensors among its arguments that are not on the CPU, and returns each."""

    def note(number: Any) -> Any:
        if isinstance(number, Tensor) and number.device.type != "cpu":
            numbers.append(number)
        return number

    return note


def read_numbers(record: StepRecord) -> None:
    """Put floats in the place of a record's numbers, and arrays of shape (units,) in that of its units.

    Those of a device have arrived: no device is called.
    """

    def units(value: Tensor) -> NDArray[np.float64]:
        return read_now(value) if record.buffers is None else record.buffers.read(value)

    def number(value: Scalar) -> float:
        return float(units(value)[0]) if isinstance(value, Tensor) else float(value)

    record.map_numbers(number, units)
