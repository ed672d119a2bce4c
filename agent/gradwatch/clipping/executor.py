"""Applies AGC to the gradients that an optimizer is about to step, from the unit norms that monitoring measured.

Unlike telemetry it raises: a run must never continue unclipped in silence.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.clipping.agc import AGC, check_clip
from gradwatch.clipping.classifier import ClassifierFinder
from gradwatch.clipping.scaling import UnitScaling
from gradwatch.hooks.weak_tensors import WeakTensor, weak
from gradwatch.model.discovery import ParameterInfo, names_and_parameters
from gradwatch.norms.buffers import SampleBuffers, ScratchMemory
from gradwatch.norms.layout import MeasurementPlan
from gradwatch.norms.streams import StreamLog
from gradwatch.norms.transfer import Stamps
from gradwatch.ranks.sharding import split_of
from gradwatch.recording.optimizer_parameters import OptimizerParameters, Pass

_log = logging.getLogger("gradwatch")

Limits = NDArray[np.float64]
"""Largest ratio of gradient to weight of each parameter of a plan, infinite where it is not clipped; shape
(parameters,)."""

_GROUP_KEY: Final = "agc_clip"
"""Key of a parameter group for a threshold of its own."""
_SCALINGS: Final = 64
"""Plans that a scaling is kept for."""


class _PlanScaling(NamedTuple):
    """How the gradients of a plan are scaled, and which parameters it leaves out."""

    plan: MeasurementPlan
    excluded: frozenset[int]
    scaling: UnitScaling


class AgcExecutor:
    """Clips the gradients of the watched parameters.

    Args:
        agc: the configuration.
        classifier: finds the classifier's weight, which ``exclude=None`` leaves unclipped.
    """

    def __init__(self, agc: AGC, classifier: ClassifierFinder) -> None:
        self.agc = agc
        self._classifier = classifier
        self._excluded_by_user: frozenset[int] | None = None
        """Indices of the parameters that the user excludes; None: the classifier is excluded."""
        self._concluded_from: tuple[object, ...] = ()
        """What was known of the classifier when ``_excluded_classifier`` was concluded."""
        self._excluded_classifier: frozenset[int] = frozenset()
        self._has_warned = False
        self._buffers: WeakKeyDictionary[OptimizerParameters, SampleBuffers] = WeakKeyDictionary()
        """Take the norms of steps that are not sampled: optimizers may step on streams that nothing orders."""
        self._scratch = ScratchMemory()
        self._scalings: dict[int, _PlanScaling] = {}
        """By id of the plan."""
        self._limits: dict[int, tuple[tuple[Any, ...], Limits]] = {}
        """Id of the plan -> threshold of each parameter group, and the limits that follow."""
        self._raised: set[int] = set()
        """Indices of the parameters of which it was raised that they cannot be clipped."""
        self._clipped: list[tuple[WeakTensor, int]] = []
        """Gradients, with their versions after clipping, that were clipped for an optimizer that steps others."""

    def find_excluded(self, watched: Sequence[ParameterInfo]) -> None:
        """Find the parameters that the user excludes; called whenever parameters were found.

        Raises:
            ValueError: a pattern matches nothing, the first time; a layer that was replaced later keeps what it had.
        """
        earlier = self._excluded_by_user
        try:
            excluded = self.agc.excluded_indices(*names_and_parameters(watched))
        except ValueError as error:
            if earlier is None:
                raise
            _log.warning("gradwatch: AGC(exclude=...): %s", error)
            excluded = set(earlier)
        self._excluded_by_user = None if excluded is None else frozenset(excluded)
        self._concluded_from = ()

    def excluded(self, watched: Sequence[ParameterInfo]) -> frozenset[int]:
        """Return the indices of the parameters that are not clipped."""
        if self._excluded_by_user is not None:
            return self._excluded_by_user
        classifier = self._classifier
        known = classifier.indices, classifier.guessed, classifier.frozen, len(watched)
        if known != self._concluded_from:
            self._concluded_from = known
            self._excluded_classifier = self._conclude_classifier(watched)
        return self._excluded_classifier

    def _conclude_classifier(self, watched: Sequence[ParameterInfo]) -> frozenset[int]:
        """Return the classifier's weights as the graph shows them, or the last matrix where it does not."""
        found = self._classifier.indices
        if not found and self._classifier.frozen:
            return found
        matrices = [index for index, info in enumerate(watched) if len(info.shape) > 1 and info.trainable]
        many = len(found) > max(len(matrices) // 2, 1)  # what no network has: the graph was misread
        if self._classifier.guessed or not found or many:
            found = frozenset(matrices[-1:]) if many or not found else found
            self._warn_of_guess(found, watched)
        return found

    def _warn_of_guess(self, guessed: frozenset[int], watched: Sequence[ParameterInfo]) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        _log.warning(
            "gradwatch: the graph of the loss does not show the classifier; AGC takes %s for it and leaves it alone. "
            "Say which with AGC(exclude=[...])",
            ", ".join(watched[index].name for index in sorted(guessed)) or "no parameter",
        )

    def note_clipped(self, grads: Sequence[Tensor]) -> None:
        """Note the gradients that were clipped for an optimizer whose step calls other optimizers."""
        self._clipped = [(weak(grad), grad._version) for grad in grads]  # noqa: SLF001

    def has_clipped(self, listed: OptimizerParameters) -> bool:
        """Return whether all gradients of an optimizer were noted as clipped, and have not changed since."""
        if not self._clipped:
            return False
        versions = {id(reference()): version for reference, version in self._clipped}
        grads = [parameter.grad for parameter in listed.parameters]
        return all(grad is None or versions.get(id(grad)) == grad._version for grad in grads)  # noqa: SLF001

    def measure(self, listed: OptimizerParameters, watched: Sequence[ParameterInfo]) -> Pass | None:
        """Measure the gradients of a step that is not sampled; return None if there are no gradients."""
        buffers = self._buffers.get(listed)
        if buffers is None:
            buffers = self._buffers[listed] = SampleBuffers(Stamps(), StreamLog(), self._scratch)
        buffers.reset()
        return listed.measure(buffers, watched)

    def raise_unreadable(self, listed: OptimizerParameters, watched: Sequence[ParameterInfo]) -> None:
        """Raise, once for each, that a gradient which is about to be stepped with cannot be clipped.

        Raises:
            NotImplementedError: there is such a gradient, and ``exclude`` does not leave it out.
        """
        grads = {index: p.grad for index, p in zip(listed.indices, listed.parameters, strict=True)}
        unclipped = [index for index in listed.unreadable if grads[index] is not None]
        new = [index for index in unclipped if index not in self._raised and index not in self.excluded(watched)]
        self._raised.update(new)
        if new:
            name, reason = watched[new[0]].name, listed.unreadable[new[0]]
            raise NotImplementedError(f"{name} cannot be clipped ({reason}). Leave it out: AGC(exclude=[{name!r}])")

    def clip(
        self, optimizer: Optimizer, listed: OptimizerParameters, pass_: Pass, watched: Sequence[ParameterInfo]
    ) -> Limits:
        """Scale the gradients of ``pass_`` down in place.

        Args:
            optimizer: steps the gradients.
            listed: the optimizer's parameters.
            pass_: their gradients, with the norms that were measured.
            watched: all parameters of the run.

        Returns:
            The largest ratio of each parameter of the plan.

        Raises:
            ValueError: the threshold of a parameter group is not a number above 0.
            NotImplementedError: a parameter is distributed in a way that cannot be clipped.
        """
        plan = pass_.plan
        excluded = self.excluded(watched)
        known = self._scalings.get(id(plan))
        if known is None or known.plan is not plan or known.excluded != excluded:
            if len(self._scalings) >= _SCALINGS:
                self._scalings.clear()
                self._limits.clear()
            scaling = self._make_scaling(plan, listed, excluded, watched)
            known = self._scalings[id(plan)] = _PlanScaling(plan, excluded, scaling)
            self._limits.pop(id(plan), None)
        by_group = tuple(self._clip_of(group, optimizer.defaults) for group in optimizer.param_groups)
        limited = self._limits.get(id(plan))
        if limited is None or limited[0] != by_group:
            limited = self._limits[id(plan)] = by_group, self._set_limits(known, listed, by_group)
        scale = getattr(optimizer, "grad_scale", None)
        with torch.no_grad():
            known.scaling.scale(
                pass_.grads,
                pass_.norms.grad_buffers,
                pass_.norms.weight_buffers,
                scale if isinstance(scale, Tensor) else None,
            )
        return limited[1]

    def _clip_of(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
        """Return the threshold of a parameter group: its own, or that of the configuration."""
        if _GROUP_KEY in group:
            return group[_GROUP_KEY]
        # The key ``clip`` is the optimizer's where it is one of its settings: some clip their own updates.
        return self.agc.clip if "clip" in defaults else group.get("clip", self.agc.clip)

    def _set_limits(self, known: _PlanScaling, listed: OptimizerParameters, by_group: Sequence[Any]) -> Limits:
        """Set the limits of a plan and return them.

        Args:
            known: the scaling of the plan.
            listed: parameters of the optimizer.
            by_group: threshold of each of its parameter groups.
        """
        checked = [math.inf if clip is None else check_clip(clip) for clip in by_group]
        limits = np.array(
            [math.inf if i in known.excluded else checked[listed.group_of[i]] for i in known.plan.indices]
        )
        known.scaling.set_limits(limits.tolist())
        return limits

    @torch.inference_mode(False)  # buffers that are made in inference mode are read-only outside of it
    def _make_scaling(
        self,
        plan: MeasurementPlan,
        listed: OptimizerParameters,
        excluded: frozenset[int],
        watched: Sequence[ParameterInfo],
    ) -> UnitScaling:
        assert plan.grad_layout is not None
        parameter_of = dict(zip(listed.indices, listed.parameters, strict=True))
        splits = [
            split_of(parameter_of[index], watched[index].axis, watched[index].groups, self.agc.granularity)
            for index in plan.indices
        ]
        positions = {position for position, index in enumerate(plan.indices) if index in excluded}
        return UnitScaling(plan.grad_layout, plan.weight_layout, splits, positions, self.agc.eps, self.agc.granularity)
