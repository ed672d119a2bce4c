"""Carrying out the actions of the step core: one pass measures the gradients of a step and clips them."""

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.monitor.watched_models import WatchedModels
from gradwatch.norms.transfer import copy_scalar
from gradwatch.recording.gradient_versions import ClippedGradients
from gradwatch.recording.loss_scaling import LossScaling
from gradwatch.recording.optimizer_parameters import OptimizerParameters, Pass
from gradwatch.recording.optimizers import WatchedOptimizers, holds_optimizers
from gradwatch.recording.recorder import NormRecorder
from gradwatch.steps.core import Measure
from gradwatch.steps.state import Measurement, StepRecord, scaled_by

_STEPS_UNTIL_SURE: Final = 100
"""Steps after which an optimizer that nobody named and that has not stepped is no longer waited for."""


class StepActions:
    """Measures and clips the gradients of a training.

    Args:
        models: the watched models and their AGC executor.
        optimizers: the optimizers whose steps count.
        scaling: knows the loss scaler.
        recorder: measures the norms.
    """

    def __init__(
        self, models: WatchedModels, optimizers: WatchedOptimizers, scaling: LossScaling, recorder: NormRecorder
    ) -> None:
        self._models = models
        self._optimizers = optimizers
        self._scaling = scaling
        self._recorder = recorder
        self.clipped_gradients = ClippedGradients()
        self._first_step: int | None = None
        """The first step that was sampled."""

    def measure_step(self, optimizer: Optimizer, record: StepRecord) -> tuple[Pass, Measurement] | None:
        """Measure the gradients that an optimizer is about to step with."""
        known = self._optimizers.find(optimizer)
        if known is None:
            return None
        self._note_frozen(known.parameters)
        self._note_rates(optimizer, record)
        measured = self._recorder.measure_before_step(known.parameters, record, optimizer)
        if self._models.parameters.newly_unreadable:
            self._models.register()
        if measured is not None:
            measured[1].clips = scaled_by(record.clips, known.parameters.index_set, stepping=True)
            measured[1].changed = self.clipped_gradients.changed(known.parameters)
        return measured

    @property
    def excluded(self) -> frozenset[int]:
        """Return the parameters that AGC does not clip; without AGC, those of the classifier."""
        clipper = self._models.clipper
        return self._models.classifier.indices if clipper is None else clipper.excluded(self._models.parameters.watched)

    def unstepped(self, step: int) -> frozenset[int]:
        """Return the trainable parameters that have a gradient, but no optimizer that is known holds them.

        Where the user named no optimizer, those that have not stepped are not known: it takes some steps to be sure.
        """
        parameters = self._models.parameters
        if self._first_step is None:
            self._first_step = step
        if self._optimizers.named_keys is None and step - self._first_step < _STEPS_UNTIL_SURE:
            return frozenset()
        if parameters.sharded or len(self._optimizers.stepped_indices) >= len(parameters.watched):
            return frozenset()
        others = parameters.other_than(self._optimizers.held_indices)
        return frozenset(index for index, other in others if other.requires_grad and other.grad is not None)

    def _note_frozen(self, listed: OptimizerParameters) -> None:
        """Register again where ``requires_grad`` has changed.

        Only the parameters of the optimizer that steps, and those that no optimizer steps, are checked: trainings that
        take turns freeze each other's parameters for each turn.
        """
        parameters, trainable = self._models.parameters, self._models.parameters.trainable
        asked = list(zip(listed.indices, listed.parameters, strict=True))
        stepped = self._optimizers.stepped_indices
        if len(stepped) < len(parameters.watched):
            asked += parameters.other_than(stepped)
        flipped = {index for index, parameter in asked if parameter.requires_grad != trainable[index]}
        if flipped:
            parameters.flip_trainable(flipped)
            self._models.register()

    def _note_rates(self, optimizer: Optimizer, record: StepRecord) -> None:
        for place, group in zip(self._optimizers.places(optimizer), optimizer.param_groups, strict=False):
            rate = group.get("lr")
            if rate is not None:
                record.rates[place] = copy_scalar(rate) if isinstance(rate, Tensor) else float(rate)
        scale = self._scaling.scale if self._scaling.has_scaler else None
        if scale is not None:
            record.scalars["loss_scale"] = copy_scalar(scale)

    def measure_before_clip(self, listed: OptimizerParameters, action: Measure) -> None:
        """Measure gradients before a clipping changes them."""
        measured = self._recorder.measure(listed, action.record, before_clip=True)
        if measured is None:
            return
        _, measurement = measured
        scale = self._scaling.scale if self._scaling.has_scaler else None
        if scale is not None and not self._optimizers.are_unscaled(listed, self._scaling.scaler):
            measurement.scale = copy_scalar(scale)
        measurement.void, measurement.clips = action.void, action.clips
        measurement.compared = self.clipped_gradients.comparison()

    def clip(self, optimizer: Optimizer, outer: Optimizer | None, measured: tuple[Pass, Measurement] | None) -> None:
        """Clip the gradients of the optimizer's next step, by the measured norms or by those of an extra pass.

        Gradients that were clipped for ``outer``, whose step called this one, and left alone since, are not clipped
        again.

        Raises:
            Exception: clipping failed: a run must never continue unclipped in silence.
        """
        clipper = self._models.clipper
        known = None if clipper is None else self._optimizers.find(optimizer)
        if clipper is not None and known is None:
            self._optimizers.raise_refusal(optimizer)
        if clipper is None or known is None or (outer is not None and clipper.has_clipped(known.parameters)):
            return
        watched = self._models.parameters.watched
        pass_ = measured[0] if measured is not None else clipper.measure(known.parameters, watched)
        if known.parameters.unreadable:
            clipper.raise_unreadable(known.parameters, watched)
        if pass_ is None:
            return
        limits = clipper.clip(optimizer, known.parameters, pass_, watched)
        if holds_optimizers(optimizer):
            clipper.note_clipped(pass_.grads)
        if measured is not None:
            measured[1].limits = limits


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the closure among the arguments of ``optimizer.step``, ``args`` beginning with the optimizer."""
    closure: Callable[..., Any] | None = kwargs.get("closure")
    if closure is not None or len(args) < 2:
        return closure
    return next((argument for argument in args[1:] if callable(argument)), None)


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[..., Any], replaced: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``optimizer.step`` with ``replaced`` in place of ``closure``."""
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": replaced}
    return tuple(replaced if argument is closure else argument for argument in args), kwargs


def note_found_inf(optimizer: Optimizer, record: StepRecord) -> None:
    """Keep a copy of ``found_inf``, the flag at which a fused optimizer skips its step."""
    found_inf = getattr(optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor):
        record.found_infs.append(copy_scalar(found_inf))
