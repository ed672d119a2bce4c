"""The meter: writes the unit norms of gradients and weights to the slot of a round, without waiting for them."""

import time

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.delivery.dropped import Dropped
from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.buffers import BufferPool
from gradwatch.norms.scalars import copy_scalar
from gradwatch.recording import float64 as inspection
from gradwatch.recording.optimizer_parameters import Binding, Pass
from gradwatch.recording.resting_weights import Others
from gradwatch.recording.weight_updates import Updates
from gradwatch.rounds import Reading, Round


class Meter:
    """Measures what a round is about, where it is sampled.

    Args:
        parameters: what is watched.
        dropped: counts samples for which there is no room.
    """

    def __init__(self, parameters: ParameterRegistry, dropped: Dropped) -> None:
        self.slots = BufferPool()
        self.pass_seconds = 0.0
        """Time that the last pass over gradients and weights took: where they are clipped, clipping needs it, too."""
        self.stopped = False
        """Whether nothing is measured any more: the numbers would be wrong."""
        self._parameters = parameters
        self._dropped = dropped
        self._updates = Updates()
        self._others = Others(parameters)
        self.others_seconds = 0.0
        """Time that the last round took for weights that no optimizer has stepped."""

    def measure(self, binding: Binding, round_: Round, *, before_clip: bool) -> tuple[Pass, Reading] | None:
        """Measure the gradients that are there, and their weights.

        Args:
            binding: whose they are.
            round_: takes the reading.
            before_clip: whether they are read before ``clip_grad_norm_`` or ``clip_grad_value_`` changes them.

        Returns:
            None where there is no gradient; where it was stopped or there is no room, the round is not sampled then.
        """
        self.pass_seconds = 0.0
        if self.stopped:
            round_.sampled = False
            return None
        if round_.slot is None:
            round_.slot = self.slots.acquire()
        if round_.slot is None:
            self._dropped.samples += 1
            round_.sampled = False
            return None
        started = time.perf_counter()
        pass_ = binding.measure(round_.slot, self._parameters.watched)
        self.pass_seconds = time.perf_counter() - started
        if pass_ is None:
            return None
        reading = Reading(pass_.norms, before_clip)
        inspection.inspect(reading, pass_.grads, pass_.members)
        round_.readings.append(reading)
        round_.empty += pass_.plan.empty
        return pass_, reading

    def measure_before_step(self, binding: Binding, round_: Round, optimizer: Optimizer) -> tuple[Pass, Reading] | None:
        """Measure as ``measure`` does, what an optimizer is about to step: then its updates can be measured, too."""
        seen = self.measure(binding, round_, before_clip=False)
        if seen is None:
            return None
        pass_, reading = seen
        self._updates.keep(optimizer, binding, pass_)
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):
            reading.scale = copy_scalar(scale)
        return seen

    def measure_updates(self, optimizer: Optimizer, round_: Round) -> None:
        """Measure how far an optimizer has moved the weights that were kept before it stepped."""
        round_.updates += self._updates.of(optimizer)

    def send(self, round_: Round) -> None:
        """Measure the other weights of a round that is over, and begin to copy all to where it can be read."""
        self._updates.clear()
        self.others_seconds = 0.0
        if round_.slot is None:
            return
        if round_.readings:
            started = time.perf_counter()
            round_.readings += self._others.measure(round_, round_.slot)
            self.others_seconds = time.perf_counter() - started
        round_.slot.send()
