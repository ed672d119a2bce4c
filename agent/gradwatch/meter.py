"""The meter: writes the unit norms of gradients and weights to the slot of a round, without waiting for them."""

import time

from torch import Tensor, no_grad
from torch.optim import Optimizer

from gradwatch import inspection
from gradwatch.binding import Binding, Pass
from gradwatch.buffers import Plan, Slots
from gradwatch.layout import spec_of
from gradwatch.model import local
from gradwatch.parameters import Parameters
from gradwatch.rounds import Reading, Round
from gradwatch.scalars import kept
from gradwatch.spool import Losses
from gradwatch.updates import Updates


class Meter:
    """Measures what a round is about, where it is sampled.

    Args:
        parameters: what is watched.
        losses: counts samples for which there is no room.
    """

    def __init__(self, parameters: Parameters, losses: Losses) -> None:
        self.slots = Slots()
        self.pass_seconds = 0.0
        """Time that the last pass over gradients and weights took: where they are clipped, clipping needs it, too."""
        self.stopped = False
        """Whether nothing is measured any more: the numbers would be wrong."""
        self._parameters = parameters
        self._losses = losses
        self._updates = Updates()
        self._seen = 0
        """Parameters whose weights were measured at least once."""

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
            round_.slot = self.slots.take()
        if round_.slot is None:
            self._losses.samples += 1
            round_.sampled = False
            return None
        started = time.perf_counter()
        pass_ = binding.measure(round_.slot, self._parameters.watched)
        self.pass_seconds = time.perf_counter() - started
        if pass_ is None:
            return None
        reading = Reading(pass_.claim, before_clip)
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
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if isinstance(scale, Tensor):
            reading.scale = kept(scale)
        if isinstance(found_inf, Tensor):
            reading.found_inf = kept(found_inf)
        if self._seen < len(self._parameters.watched):
            self._measure_other_weights(round_)
        return seen

    def _measure_other_weights(self, round_: Round) -> None:
        """Measure, once, the weights that this round did not: frozen ones, and those of other optimizers."""
        measured = {index for reading in round_.readings for index in reading.claim.plan.indices}
        others = self._parameters.other_than(measured)
        self._seen = len(self._parameters.watched)
        if not others or round_.slot is None:
            return
        with no_grad():
            members = [local(parameter) for _, parameter in others]
            specs = [spec_of(member, "whole") for member in members]  # nothing but their norms is asked for
            claim = round_.slot.claim(Plan([index for index, _ in others], None, specs))
            claim.weights.run(members)
            reading = Reading(claim, before_clip=False)
            inspection.inspect(reading, (), members)
            round_.readings.append(reading)

    def measure_updates(self, optimizer: Optimizer, round_: Round) -> None:
        """Measure how far an optimizer has moved the weights that were kept before it stepped."""
        round_.updates += self._updates.of(optimizer)

    def send(self, round_: Round) -> None:
        """Begin to copy what was measured to where it can be read, without waiting."""
        self._updates.clear()
        if round_.slot is not None:
            round_.slot.send()
