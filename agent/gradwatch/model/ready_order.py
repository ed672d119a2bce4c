"""The depths of parameters, learnt from the order in which their gradients become ready."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gradwatch.hooks import autograd_graph


class ReadyOrder:
    """The order in which gradients become ready in the first backward passes: that of the output first.

    It needs a hook on each parameter; the hooks are removed when the order is known. A compiled model makes all its
    gradients ready at once, in an order that says nothing: for such a model the order of registration is kept.

    Args:
        parameters: the parameters with their indices.
    """

    def __init__(self, parameters: Iterable[tuple[int, Tensor]]) -> None:
        self._ready: dict[int, int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for index, parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                register: Callable[[_Ready], torch.utils.hooks.RemovableHandle] = (
                    parameter.register_post_accumulate_grad_hook
                )
                self._handles.append(register(_Ready(self._ready, index)))

    @property
    def known(self) -> bool:
        """Return whether a backward pass was seen."""
        return bool(self._ready)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def depths(self, count: int) -> list[int]:
        """Return the depth of each of ``count`` parameters, 0 at the input."""
        return depths(list(self._ready), count)


class _Ready:
    """A hook that notes its parameter the first time it is called.

    It is a class of this module, since a parameter that carries a lambda as a hook cannot be pickled.
    """

    def __init__(self, ready: dict[int, int], index: int) -> None:
        self._ready = ready
        self._index = index

    def __call__(self, _parameter: Tensor) -> None:
        self._ready.setdefault(self._index, len(self._ready))


def depths(ready: Sequence[int], count: int) -> list[int]:
    """Return the depth of each parameter from the order in which gradients became ready.

    A parameter without a gradient comes directly behind its predecessor in the order of registration.

    Args:
        ready: indices of parameters, the first ready first; each at most once.
        count: number of parameters.
    """
    if len(ready) < 2 or list(ready) == sorted(ready):
        return list(range(count))
    order = list(reversed(ready))
    place = {index: position for position, index in enumerate(order)}
    key: list[tuple[int, int]] = []
    last = -1
    for index in range(count):
        last = place.get(index, last)
        key.append((last, index if index not in place else -1))
    ranked = sorted(range(count), key=key.__getitem__)
    result = [0] * count
    for depth, index in enumerate(ranked):
        result[index] = depth
    return result


def compiled_leaves(losses: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the leaves of compiled graphs within the graphs of some losses: any function may have been compiled."""
    for node in autograd_graph.walk(autograd_graph.roots(losses)):
        if node.name() == "CompiledFunctionBackward":
            for below in autograd_graph.inputs(node):
                leaf = autograd_graph.leaf(below)
                if leaf is not None:
                    yield leaf
