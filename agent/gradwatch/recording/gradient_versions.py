"""Gradient versions: which gradients a backward pass added to, by their identities and versions; none is read."""

from collections.abc import Iterable, Sequence
from typing import Final

from torch import Tensor

from gradwatch.model.registry import ParameterRegistry

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
