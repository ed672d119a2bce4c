"""The watched parameters of some models: found again as the models change, and described for the server."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Final

from torch import Tensor, nn

from gradwatch.hooks import autograd_graph
from gradwatch.model.discovery import (
    ParameterInfo,
    find_parameters,
    is_compiled,
    names_and_parameters,
    unsharded_parameters,
)
from gradwatch.model.ready_order import ReadyOrder, compiled_leaves

_ORDER_STEPS: Final = 3
"""Steps after which the order of the gradients is no longer waited for."""
_MOST_NODES: Final = 10_000
"""Nodes of a graph that a search for a watched parameter visits at most."""


class ParameterRegistry:
    """The parameters of some models, each at an index that it keeps. Nothing of the models is kept alive.

    Args:
        models: the models.
        expert_indices: returns the indices of the parameters that hold stacked experts, given all names and parameters.
            None: nothing is clipped, and a tensor with very many units counts as one unit.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        expert_indices: Callable[[Sequence[str], Sequence[Tensor]], Iterable[int]] | None,
    ) -> None:
        self.watched: list[ParameterInfo] = []
        """By index."""
        self._models = [weakref.ref(model) for model in models]
        self._expert_indices = expert_indices
        self._index_of: dict[int, int] = {}
        """Id of a parameter -> its index."""
        self._index_of_unsharded: dict[int, int] = {}
        """Id of an unsharded parameter -> index of the sharded one."""
        self.later: set[int] = set()
        """Indices of the parameters that were found after the first search, at new places or in place of others."""
        self.newly_unreadable: list[int] = []
        """Indices of the parameters that were found to be unreadable and of which the user was not told yet."""
        self.sharded = False
        """Whether this rank holds only shards of some parameters."""
        self.trainable: list[bool] = []
        """By index: ``requires_grad`` of the parameter when it was last updated."""
        self._depths: list[int] = []
        self.order_pending = False
        """Whether the order in which gradients become ready is being learnt."""
        self._order: ReadyOrder | None = None

    @property
    def models(self) -> list[nn.Module]:
        """Return the models that still exist."""
        return [model for reference in self._models if (model := reference()) is not None]

    @property
    def are_gone(self) -> bool:
        """Return whether none of the parameters exists any more."""
        return all(info.parameter() is None for info in self.watched)

    @property
    def ids(self) -> Set[int]:
        """Return the ids of the parameters."""
        return self._index_of.keys()

    def discover(self) -> bool:
        """Look for parameters that are not known yet; return whether there were any."""
        new = [info.judged() for info in find_parameters(self.models) if not self._is_known(info)]
        if self._expert_indices is None:
            new = [info.with_bounded_units() for info in new]
        indices = {info.name: index for index, info in enumerate(self.watched)}
        searched_before = bool(self.watched)
        for info in new:
            parameter = info.parameter()
            index = self._index_of[id(parameter)] = self._add(info, indices.get(info.name))
            if searched_before:
                self.later.add(index)
            if info.unreadable:
                self.newly_unreadable.append(index)
            self.sharded |= hasattr(parameter, "to_local")
        if new and self._expert_indices is not None:
            for index in self._expert_indices(*names_and_parameters(self.watched)):
                self.watched[index] = self.watched[index].as_experts()
        return bool(new)

    def _is_known(self, info: ParameterInfo) -> bool:
        parameter = info.parameter()
        known = self._index_of.get(id(parameter))
        return known is not None and self.watched[known].parameter() is parameter

    def _add(self, info: ParameterInfo, index: int | None) -> int:
        """Put a parameter at ``index``, where a layer was replaced by one of the same name, or else at the end."""
        if index is not None:
            self.watched[index], self.trainable[index] = info, info.trainable
            return index
        self.watched.append(info)
        self.trainable.append(info.trainable)
        return len(self.watched) - 1

    def find(self, tensor: Tensor) -> int | None:
        """Return the index of a watched parameter, sharded or unsharded; None for any other tensor."""
        index = self._index_of.get(id(tensor))
        if index is not None and self.watched[index].parameter() is tensor:
            return index
        return self._index_of_unsharded.get(id(tensor))

    def note_unsharded(self) -> None:
        """Note the unsharded parameters that FSDP puts in the place of sharded ones for a forward pass."""
        index_of = {info.name: index for index, info in enumerate(self.watched)}
        for info in find_parameters(self.models):
            parameter = info.parameter()
            if id(parameter) not in self._index_of and info.name in index_of:
                self._index_of_unsharded[id(parameter)] = index_of[info.name]
        for sharded, unsharded, _ in unsharded_parameters(self.models):
            index = self.find(sharded)
            if index is not None:
                self._index_of_unsharded[id(unsharded)] = index

    def are_reached(self, losses: Iterable[Tensor]) -> bool:
        """Return whether some losses were computed from a watched parameter, as far as a bounded search shows."""
        several = list(losses)
        if self._are_reached(several):
            return True
        if not self.sharded:
            return False
        self.note_unsharded()  # some may have been made since
        return self._are_reached(several)

    def _are_reached(self, losses: Sequence[Tensor]) -> bool:
        ids = {id(parameter) for info in self.watched if (parameter := info.parameter()) is not None}
        ids |= self._index_of_unsharded.keys()
        if any(id(loss) in ids for loss in losses):
            return True
        nodes = autograd_graph.walk(autograd_graph.roots(losses), autograd_graph.NodeBudget(_MOST_NODES))
        return any((leaf := autograd_graph.leaf(node)) is not None and id(leaf) in ids for node in nodes)

    def any_has_gradient(self, indices: Iterable[int]) -> bool:
        """Return whether a parameter at any of ``indices`` has a gradient."""
        parameters = (self.watched[index].parameter() for index in indices)
        return any(parameter is not None and parameter.grad is not None for parameter in parameters)

    @property
    def any_has_unreduced_gradient(self) -> bool:
        """Return whether FSDP2 has gradients of unsharded parameters that were not reduced to the sharded ones yet."""
        return self.sharded and any(unreduced for _, _, unreduced in unsharded_parameters(self.models))

    def other_than(self, indices: Set[int]) -> list[tuple[int, Tensor]]:
        """Return all parameters that still exist and are not at ``indices``, each with its index."""
        return [
            (index, parameter)
            for index, info in enumerate(self.watched)
            if index not in indices and (parameter := info.parameter()) is not None
        ]

    def mark_unreadable(self, reasons: Mapping[int, str]) -> None:
        """Note parameters that cannot be measured any more, by index with the reason."""
        for index, reason in reasons.items():
            if not self.watched[index].unreadable:
                self.watched[index] = replace(self.watched[index], unreadable=reason)
                self.newly_unreadable.append(index)

    def flip_trainable(self, indices: Iterable[int]) -> None:
        """Note that ``requires_grad`` of some parameters has changed."""
        for index in indices:
            self.trainable[index] = not self.trainable[index]

    def described(self) -> tuple[tuple[ParameterInfo, ...], tuple[int, ...]]:
        """Return the parameters as they are to be registered on the server now, and the depth of each."""
        self._depths += range(len(self._depths), len(self.watched))
        watched = [
            info if info.trainable == trainable else replace(info, trainable=trainable)
            for info, trainable in zip(self.watched, self.trainable, strict=True)
        ]
        return tuple(watched), tuple(self._depths)

    def await_order(self) -> None:
        """Begin to learn the depths from the order in which gradients become ready.

        FSDP2 makes those of all parameters of a group ready at once, and those of the root at the very end.
        """
        if not self.sharded and not any(map(is_compiled, self.models)):
            self._order = ReadyOrder(self.other_than(frozenset()))
            self.order_pending = True

    def check_order(self, losses: Iterable[Tensor]) -> None:
        """Keep the order of registration where a compiled graph is about to make all gradients ready at once."""
        if self._order is None or self._order.known:
            return
        if any(self.find(tensor) is not None for tensor in compiled_leaves(losses)):
            self._order.close()
            self._order, self.order_pending = None, False

    def learn_order(self, step: int) -> bool:
        """Set the depths once the order is known; return whether this call set them.

        Args:
            step: number of steps made; after some steps the order is no longer awaited.
        """
        if self._order is None or not (self._order.known or step >= _ORDER_STEPS):
            return False
        self._order.close()
        known = self._order.known
        if known:
            self._depths = self._order.depths(len(self.watched))
        self._order, self.order_pending = None, False
        return known

    def close(self) -> None:
        """Remove the hooks that wait for the order."""
        if self._order is not None:
            self._order.close()
