"""Marks: which gradients a backward pass added to, by their identities and versions; none is read."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import Tensor

from gradwatch.model import Watched

Mark = tuple[int, int] | None
"""Identity and version of a gradient; None where there is none."""

_SURE: Final = 10
"""Backward passes after which only those are looked at that got a gradient in every one of them."""
_FEW: Final = 4
_NODES: Final = 10_000
"""Nodes of a graph that are searched at most."""


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

    def before(self, watched: Sequence[Watched], also: Iterable[int] = ()) -> dict[int, Mark]:
        """Return the marks of what is looked at, by index.

        Args:
            watched: all parameters of the run.
            also: indices of others to look at in this pass.
        """
        looked_at = range(len(watched)) if self._few is None else {*self._few, *also}
        return {index: _mark(watched[index]) for index in looked_at}

    def changed(
        self, before: dict[int, Mark], watched: Sequence[Watched], losses: Iterable[Tensor]
    ) -> tuple[bool, frozenset[int]]:
        """Return whether the pass added to any gradient, and which of those looked at changed.

        Args:
            before: what ``before`` returned.
            watched: all parameters of the run.
            losses: what was differentiated.
        """
        changed = frozenset(index for index, mark in before.items() if _mark(watched[index]) != mark)
        if self._few is None:
            self._narrow(changed)
        elif changed.isdisjoint(self._few):
            self._few, self._always, self._passes = None, None, 0
            return bool(changed) or leads_to(losses, watched), changed
        return bool(changed), changed

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


def _mark(known: Watched) -> Mark:
    parameter = known.parameter()
    grad = None if parameter is None else parameter.grad
    return None if grad is None else (id(grad), grad._version)  # noqa: SLF001


def leads_to(losses: Iterable[Tensor], watched: Sequence[Watched]) -> bool:
    """Return whether the graph of some losses leads to a watched parameter."""
    ids = {id(parameter) for known in watched if (parameter := known.parameter()) is not None}
    losses = list(losses)
    if any(id(loss) in ids for loss in losses):
        return True
    nodes: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in ids:
            return True
        if len(nodes) > _NODES:
            return False
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return False
