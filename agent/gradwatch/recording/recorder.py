"""The norm recorder: writes unit norms of gradients and weights to buffers, without waiting for the device."""

import time
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.buffers import BufferPool
from gradwatch.norms.scalars import copy_scalar
from gradwatch.recording.float64 import recompute
from gradwatch.recording.optimizer_parameters import OptimizerParameters, Pass
from gradwatch.recording.resting_weights import RestingWeights
from gradwatch.recording.weight_updates import WeightUpdates
from gradwatch.steps.state import Measurement, StepRecord


class NormRecorder:
    """Measures the steps that are sampled.

    Args:
        parameters: the watched parameters.
        no_room: called for each sample that is dropped because all buffers are in use.
    """

    def __init__(self, parameters: ParameterRegistry, no_room: Callable[[], None]) -> None:
        self.pool = BufferPool()
        self.pass_seconds = 0.0
        """Time of the last pass over gradients and weights; where AGC clips, it needs this pass anyway."""
        self.stopped = False
        """Whether nothing is measured any more, because the numbers would be wrong."""
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
        """Measure the resting weights of a step that is over, and begin to copy all norms to the host."""
        self._updates.clear()
        if record.buffers is None:
            return
        count = len(self._parameters.watched)
        if record.measurements and not (len(record.measurements) == 1 and len(record.measurements[0].indices) == count):
            record.measurements += self._resting.measure(record, record.buffers)
        record.buffers.send()

    def take_back(self, dropped: list[StepRecord]) -> None:
        """Return to the pool the buffers of steps that will not be made, and empty the list of them."""
        while dropped:
            buffers = dropped.pop().buffers
            if buffers is not None:
                self.pool.release(buffers)
