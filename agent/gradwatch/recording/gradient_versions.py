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
"""Backward passes after which only those gradients are looked at that changed in every one of them."""
_FEW: Final = 4


class GradientVersions:
    """Tells whether a backward pass added to a gradient of the watched parameters, by looking at a few of them.

    All gradients are checked until some have changed in each of many passes; from then on only a few of these are. If a
    pass changes none of the few, its graph is searched once to find which model it belongs to, and all gradients are
    checked again: another head may be trained now, one of the few may be frozen, or the loss was another model's.
    """

    def __init__(self, parameters: ParameterRegistry) -> None:
        self._parameters = parameters
        """All parameters of the run. Sharded ones may collect gradients elsewhere over several passes."""
        self._few: list[int] | None = None
        """Indices of the parameters that are looked at; None: all."""
        self._always: set[int] | None = None
        """Indices of the parameters whose gradients changed in every pass lately; None: there was no pass yet."""
        self._passes = 0
        self.mark: Mark | None = None
        """The smallest gradient that the last pass is known to have changed; kept alive until the step."""
        self._unchanged = 0
        """Passes that changed no gradient."""
        self._moved = False
        """Whether one of them was this training's: hooks move the gradients elsewhere."""

    def before(self, also: Iterable[int]) -> dict[int, Version]:
        """Return the versions of the gradients to check after a pass, by index.

        Args:
            also: indices of others to check after this pass.
        """
        watched = self._parameters.watched
        few = self._few
        versions: dict[int, Version] = {}
        for index in range(len(watched)) if few is None else {*few, *also} if also else few:
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
        changed = frozenset(found)
        if self._few is None:
            self._narrow(changed)
        elif changed.isdisjoint(self._few):
            self._few, self._always, self._passes = None, None, 0
            return changed if changed or self._parameters.are_reached(losses) else None
        if changed or ((self._parameters.sharded or self._may_be_elsewhere()) and self._is_mine(losses)):
            return changed
        return None

    def _may_be_elsewhere(self) -> bool:
        """Return whether to search the graph of a pass that changed no gradient, as hooks may have moved them.

        Passes of other models are many, and each search costs: the more were in vain, the fewer are made.
        """
        self._unchanged += 1
        return self._moved or self._unchanged <= _FEW or self._unchanged & (self._unchanged - 1) == 0

    def _is_mine(self, losses: Sequence[Tensor]) -> bool:
        mine = self._parameters.are_reached(losses)
        self._moved = self._moved or mine
        return mine

    def _narrow(self, changed: frozenset[int]) -> None:
        """Check only a few gradients from now on, if some have changed in every pass for long enough."""
        if not changed:
            self._passes = 0  # another model's: as long as these come, only a look at all tells them
            return
        self._always = set(changed) if self._always is None else self._always & changed
        self._passes += 1
        if self._passes >= _SURE_PASSES:
            self._few = sorted(self._always)[:: max(len(self._always) // _FEW, 1)][:_FEW] or None
            self._always, self._passes = None, 0
