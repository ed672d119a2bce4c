"""The clipper: applies AGC to what an optimizer is about to step, from the unit norms that monitoring shares.

Unlike telemetry it raises: a run must never continue unclipped in silence.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.clipping.agc import AGC, Clipping, check_clip
from gradwatch.clipping.classifier import Classifier
from gradwatch.hooks.weak_tensors import Held, held
from gradwatch.model.discovery import Watched
from gradwatch.norms.buffers import Plan, Slot
from gradwatch.norms.layout import Scratch
from gradwatch.ranks.sharding import split_of
from gradwatch.recording.optimizer_parameters import Binding, Pass

_log = logging.getLogger("gradwatch")

Limits = NDArray[np.float64]
"""Largest ratio of each parameter of a plan, infinite where it is not clipped; shape (parameters,)."""

_CLIPPINGS: Final = 64


class Clipper:
    """Clips the gradients of the watched parameters.

    Args:
        agc: how.
        classifier: what is known of the classifier, for ``exclude=None``.
    """

    def __init__(self, agc: AGC, classifier: Classifier) -> None:
        self.agc = agc
        self._classifier = classifier
        self._spared: frozenset[int] | None = None
        self._seen: tuple[object, ...] = ()
        """What ``_taken`` was concluded from."""
        self._taken: frozenset[int] = frozenset()
        self._warned = False
        self._slot = Slot(Scratch())
        self._clippings: dict[int, tuple[Plan, frozenset[int], Clipping]] = {}
        self._limits: dict[int, tuple[tuple[Any, ...], Limits]] = {}
        self._clipped: list[tuple[Held, int]] = []
        """Gradients of an optimizer that steps others by itself, as they were left, with their versions."""

    def know(self, watched: Sequence[Watched]) -> None:
        """Find what the user excludes among all parameters of the run.

        Raises:
            ValueError: a pattern matches nothing.
        """
        names, parameters = listed(watched)
        spared = self.agc.spared(names, parameters)
        self._spared = None if spared is None else frozenset(spared)
        self._seen = ()

    def spared(self, watched: Sequence[Watched]) -> frozenset[int]:
        """Return the indices of the parameters that are left alone."""
        if self._spared is not None:
            return self._spared
        known = self._classifier
        seen = known.indices, known.guessed, known.frozen, len(watched)
        if seen != self._seen:
            self._seen = seen
            self._taken = self._take(watched)
        return self._taken

    def _take(self, watched: Sequence[Watched]) -> frozenset[int]:
        """Return what the graph showed to be the classifier, or else what is taken for it."""
        found = self._classifier.indices
        if not found and self._classifier.frozen:
            return found
        matrices = [index for index, known in enumerate(watched) if len(known.shape) > 1 and known.trainable]
        many = len(found) > max(len(matrices) // 2, 1)  # what no network has: the graph was misread
        if self._classifier.guessed or not found or many:
            found = frozenset(matrices[-1:]) if many or not found else found
            self._warn(found, watched)
        return found

    def _warn(self, taken: frozenset[int], watched: Sequence[Watched]) -> None:
        if self._warned:
            return
        self._warned = True
        _log.warning(
            "gradwatch: the graph of the loss does not show the classifier; AGC takes %s for it and leaves it alone. "
            "Say which with AGC(exclude=[...])",
            ", ".join(watched[index].name for index in sorted(taken)) or "no parameter",
        )

    def note_clipped(self, grads: Sequence[Tensor]) -> None:
        """Note gradients that were clipped for an optimizer which has others step them."""
        self._clipped = [(held(grad), grad._version) for grad in grads]  # noqa: SLF001

    def has_clipped(self, binding: Binding) -> bool:
        """Return whether all gradients that are there were noted as clipped, and left alone since."""
        if not self._clipped:
            return False
        clipped = {id(known()): version for known, version in self._clipped}
        grads = [parameter.grad for parameter in binding.parameters]
        return all(grad is None or clipped.get(id(grad)) == grad._version for grad in grads)  # noqa: SLF001

    def own_pass(self, binding: Binding, watched: Sequence[Watched]) -> Pass | None:
        """Measure for the clipping alone, where no sample is due."""
        self._slot.reset()
        return binding.measure(self._slot, watched)

    def clip(self, optimizer: Optimizer, binding: Binding, pass_: Pass, watched: Sequence[Watched]) -> Limits:
        """Scale the gradients of ``pass_`` down in place.

        Returns:
            The largest ratio of each of its parameters.

        Raises:
            ValueError: the ``clip`` of a parameter group is not a number above 0.
            NotImplementedError: a parameter is distributed in a way that cannot be clipped.
        """
        plan = pass_.plan
        spared = self.spared(watched)
        known = self._clippings.get(id(plan))
        if known is None or known[0] is not plan or known[1] != spared:
            if len(self._clippings) >= _CLIPPINGS:
                self._clippings.clear()
                self._limits.clear()
            known = self._clippings[id(plan)] = plan, spared, self._made(plan, binding, spared, watched)
            self._limits.pop(id(plan), None)
        clipping = known[2]
        by_group = tuple(group.get("clip", self.agc.clip) for group in optimizer.param_groups)
        limited = self._limits.get(id(plan))
        if limited is None or limited[0] != by_group:
            checked = [math.inf if clip is None else check_clip(clip) for clip in by_group]
            limits = np.array([math.inf if i in spared else checked[binding.group_of[i]] for i in plan.indices])
            clipping.limit(limits.tolist())
            limited = self._limits[id(plan)] = by_group, limits
        scale = getattr(optimizer, "grad_scale", None)
        with torch.no_grad():
            clipping.scale(
                pass_.grads,
                pass_.claim.grad_arenas,
                pass_.claim.weight_arenas,
                scale if isinstance(scale, Tensor) else None,
            )
        return limited[1]

    @torch.inference_mode(False)  # buffers that are made within could not be written to outside
    def _made(self, plan: Plan, binding: Binding, spared: frozenset[int], watched: Sequence[Watched]) -> Clipping:
        assert plan.grads is not None
        parameter_of = dict(zip(binding.indices, binding.parameters, strict=True))
        splits = [
            split_of(parameter_of[index], watched[index].axis, watched[index].groups, self.agc.granularity)
            for index in plan.indices
        ]
        positions = {position for position, index in enumerate(plan.indices) if index in spared}
        return Clipping(plan.grads, plan.weights, splits, positions, self.agc.eps, self.agc.granularity)


def listed(watched: Sequence[Watched]) -> tuple[list[str], list[Tensor]]:
    """Return names and parameters; one that is gone keeps its place, as a tensor that nobody excludes."""
    parameters = [known.parameter() for known in watched]
    return (
        [known.name for known in watched],
        [torch.empty(0) if parameter is None else parameter for parameter in parameters],
    )
