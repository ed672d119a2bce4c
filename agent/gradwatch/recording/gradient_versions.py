"""Gradient versions: what a backward pass, or the program after clipping, has changed; no gradient is read."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from torch import Tensor

from gradwatch.model.registry import ParameterRegistry
from gradwatch.recording.optimizer_parameters import OptimizerParameters

Version = tuple[Tensor, int] | None
"""A gradient and its version; None where there is none. The gradient is kept while the pass lasts: once it is gone, its
identity, and its memory, may be another one's."""

Mark = tuple[int, Tensor, int]
"""Index of a parameter, its gradient as a backward pass left it, and the version of that."""

_SURE_PASSES: Final = 10
"""Backward passes in a row that a few gradients must have told before only these are looked at."""
_FEW: Final = 16
"""Most gradients that stand for all others."""
_SEARCHED: Final = 8
"""Passes of something else whose graphs are all searched; then ever fewer of them are."""
_SURE_SAMPLES: Final = 10
"""Samples in which gradients were left alone after which they are believed to be."""
_CHECKED_AGAIN: Final = 32
"""Samples after which both norms are measured again."""


class GradientVersions:
    """Tells whether a backward pass added to a gradient of the watched parameters, by looking at a few of them.

    All gradients are checked until a few are known of which each pass has changed at least one: one of the trunk, or
    one of each network where trainings take turns. A pass that changes none of them is another model's, or trains
    another head: its graph is searched for a watched parameter, each time at first and then ever more rarely.
    """

    def __init__(self, parameters: ParameterRegistry) -> None:
        self._parameters = parameters
        """All parameters of the run. Sharded ones may collect gradients elsewhere over several passes."""
        self._few: list[int] = []
        """Indices of the parameters that stand for all others."""
        self.is_sure = False
        """Whether only the few are looked at."""
        self._passes = 0
        """Passes in a row that changed one of the few."""
        self.elsewhere = 0
        """Passes that changed none of them and were another model's."""
        self.mark: Mark | None = None
        """The smallest gradient that the last pass is known to have changed; kept alive until the step."""
        self._unchanged = 0
        """Passes that changed no gradient."""
        self._moved = False
        """Whether one of them was this training's: hooks move the gradients elsewhere."""

    def before(self, also: Iterable[int] = ()) -> dict[int, Version]:
        """Return the versions of the gradients to check after a pass, by index.

        Args:
            also: indices of others to check after this pass.
        """
        watched, few = self._parameters.watched, self._few
        versions: dict[int, Version] = {}
        for index in ({*few, *also} if also else few) if self.is_sure else range(len(watched)):
            parameter = watched[index].parameter.reference()
            grad = None if parameter is None else parameter.grad
            versions[index] = None if grad is None else (grad, grad._version)  # noqa: SLF001
        return versions

    def changed(self, before: dict[int, Version], losses: Sequence[Tensor]) -> frozenset[int] | None:
        """Return the checked parameters whose gradients a pass has changed; None if it was another training's pass.

        Args:
            before: the versions that ``before`` returned.
            losses: the tensors that were differentiated.
        """
        watched = self._parameters.watched
        found = []
        mark: Mark | None = None
        for index, version in before.items():
            parameter = watched[index].parameter.reference()
            grad = None if parameter is None else parameter.grad
            if grad is None:
                if version is not None:
                    found.append(index)
            elif version is None or grad is not version[0] or version[0]._version != version[1]:  # noqa: SLF001
                found.append(index)
                if mark is None or grad.numel() < mark[1].numel():
                    mark = index, grad, grad._version  # noqa: SLF001
        self.mark = mark
        if not found and self.is_sure and self.elsewhere >= _SEARCHED and self.elsewhere & (self.elsewhere + 1):
            self.elsewhere += 1
            return None  # another model's, as many before it
        changed = frozenset(found)
        if not self.is_sure:
            self._learn(changed)
        elif changed.isdisjoint(self._few):
            return self._changed_no_known_one(changed, losses)
        if changed or ((self._parameters.sharded or self._may_be_elsewhere()) and self._is_mine(losses)):
            return changed
        return None

    def _may_be_elsewhere(self) -> bool:
        """Return whether to search the graph of a pass that changed no gradient, as hooks may have moved them.

        Passes of other models are many, and each search costs: the more were in vain, the fewer are made.
        """
        self._unchanged += 1
        return self._moved or self._unchanged <= _SEARCHED or self._unchanged & (self._unchanged - 1) == 0

    def _is_mine(self, losses: Sequence[Tensor]) -> bool:
        mine = self._parameters.are_reached(losses)
        self._moved = self._moved or mine
        return mine

    def _changed_no_known_one(self, changed: frozenset[int], losses: Sequence[Tensor]) -> frozenset[int] | None:
        """Return what ``changed`` does for a pass that changed none of the few."""
        self.elsewhere += 1
        if self.elsewhere > _SEARCHED and self.elsewhere & (self.elsewhere - 1):
            return changed or None
        if not (changed or self._parameters.are_reached(losses)):
            return None
        self._few, self.is_sure, self._passes, self.elsewhere = [], False, 0, 0
        return changed

    def _learn(self, changed: frozenset[int]) -> None:
        """Find a few gradients of which each pass changes at least one."""
        if not changed:
            return  # another model's
        if changed.isdisjoint(self._few):
            self._few.append(min(changed))
            self._passes = 0
        self._passes += 1
        self.is_sure = self._passes >= _SURE_PASSES and len(self._few) <= _FEW


class ClippedGradients:
    """Knows whether a training leaves gradients alone between clipping and stepping.

    Between the two a program may add noise (differential privacy), decay weights by hand, mask, average over ranks, or
    put other gradients in place. The norm before clipping then does not follow from the gradients that are stepped
    with: it has to be measured when clipping is called, which costs a second pass. So both are measured until they
    have agreed often enough; from then on one pass does, identity and version of each gradient tell of a change, and
    both are measured now and then, since no version tells of what is done to a gradient's ``data``.
    """

    def __init__(self) -> None:
        self._agreement = _Agreement()
        self._left: dict[int, tuple[int, int]] = {}
        """Index of a parameter -> identity and version of its gradient after it was clipped for the next step."""

    @property
    def are_left_alone(self) -> bool:
        """Return whether one measurement does, at the step."""
        return self._agreement.samples >= _SURE_SAMPLES and self._agreement.unchecked < _CHECKED_AGAIN

    def note(self, listed: OptimizerParameters) -> None:
        """Note the gradients that a clipping has left for a sampled step."""
        self._agreement.unchecked += 1
        for index, parameter in zip(listed.indices, listed.parameters, strict=True):
            if parameter.grad is not None:
                self._left[index] = id(parameter.grad), parameter.grad._version  # noqa: SLF001

    def changed(self, listed: OptimizerParameters) -> frozenset[int]:
        """Return the parameters of an optimizer that steps whose gradients are not what clipping left."""
        left, self._left = self._left, {}
        found = [
            index
            for index, parameter in zip(listed.indices, listed.parameters, strict=True)
            if index in left and _state_of(parameter.grad) != left.pop(index)
        ]
        self._left = left
        if found:
            self._agreement = _Agreement()
        return frozenset(found)

    def comparison(self) -> Callable[[bool], None]:
        """Return what takes note of a sample in which both are measured: whether they agree.

        The collector's thread calls it, maybe many samples later; what was before a change then says nothing any more.
        """
        return self._agreement.compared


class _Agreement:
    """How well the two norms of a training have agreed since its gradients were last seen to change."""

    __slots__ = ("samples", "unchecked")

    def __init__(self) -> None:
        self.samples = 0
        """Samples in a row whose two norms agreed."""
        self.unchecked = 0
        """Samples since then in which only one was measured."""

    def compared(self, agree: bool) -> None:
        """Take note of a sample in which both were measured."""
        self.samples = self.samples + 1 if agree else 0
        self.unchecked = 0


def _state_of(grad: object) -> tuple[int, int]:
    return id(grad), getattr(grad, "_version", -1)
