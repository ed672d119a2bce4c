"""Marks: which gradients a backward pass added to, by what they are and their versions; none is read."""

from collections.abc import Iterable, Sequence
from typing import Final

from torch import Tensor

from gradwatch.model.discovery import ParameterInfo
from gradwatch.model.registry import ParameterRegistry

Mark = tuple[Tensor, int] | None
"""A gradient and its version; None where there is none. It is kept while the pass lasts: of one that is gone the
identity, and the memory, may be another's."""

_SURE: Final = 10
"""Backward passes after which only those are looked at that got a gradient in every one of them."""
_FEW: Final = 4


class Marks:
    """Tells whether a backward pass added to a gradient of the watched parameters, at the cost of a few of them.

    All are looked at until some have got a gradient in each of many passes; from then on a few of these. When a pass
    leaves those alone, its graph says whose it was, once, and all are looked at again: another head is trained now,
    or what was marked is frozen, or the loss was another model's.
    """

    def __init__(self) -> None:
        self._few: list[int] | None = None
        """Indices of those that are looked at; None: all."""
        self._always: set[int] | None = None
        """Indices of those that got a gradient in every pass lately; None: there was no pass yet."""
        self._passes = 0

    def before(self, watched: Sequence[ParameterInfo], also: Iterable[int] = ()) -> dict[int, Mark]:
        """Return the marks of what is looked at, by index.

        Args:
            watched: all parameters of the run.
            also: indices of others to look at in this pass.
        """
        looked_at = range(len(watched)) if self._few is None else {*self._few, *also}
        return {index: _mark(watched[index]) for index in looked_at}

    def changed(
        self, before: dict[int, Mark], parameters: ParameterRegistry, losses: Iterable[Tensor]
    ) -> tuple[bool, frozenset[int]]:
        """Return whether the pass added to any gradient, and which of those looked at changed.

        Args:
            before: what ``before`` returned.
            parameters: all parameters of the run. Sharded ones may collect gradients elsewhere over several passes.
            losses: what was differentiated.
        """
        watched = parameters.watched
        changed = frozenset(index for index, mark in before.items() if not _is_same(_mark(watched[index]), mark))
        if self._few is None:
            self._narrow(changed)
        elif changed.isdisjoint(self._few):
            self._few, self._always, self._passes = None, None, 0
            return bool(changed) or parameters.are_reached(losses), changed
        return bool(changed) or (parameters.sharded and parameters.are_reached(losses)), changed

    def _narrow(self, changed: frozenset[int]) -> None:
        """Look at a few from now on, where some have changed in every pass for long enough."""
        if not changed:
            self._passes = 0  # another model's: as long as these come, only a look at all tells them
            return
        self._always = set(changed) if self._always is None else self._always & changed
        self._passes += 1
        if self._passes >= _SURE:
            self._few = sorted(self._always)[:: max(len(self._always) // _FEW, 1)][:_FEW] or None
            self._always, self._passes = None, 0


def _mark(known: ParameterInfo) -> Mark:
    parameter = known.parameter()
    grad = None if parameter is None else parameter.grad
    return None if grad is None else (grad, grad._version)  # noqa: SLF001


def _is_same(one: Mark, other: Mark) -> bool:
    return one is other if one is None or other is None else one[0] is other[0] and one[1] == other[1]
