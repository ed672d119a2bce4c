"""What is watched: the parameters of some models, looked for again as they change, and what is registered of them."""

import weakref
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn

from gradwatch.clipping.agc import AGC
from gradwatch.clipping.executor import listed
from gradwatch.model.discovery import ReadyOrder, Watched, compiled_leaves, gathered, is_compiled, walk
from gradwatch.rounds import Registered

_ORDER_STEPS: Final = 3
"""Steps after which the order of the gradients is no longer waited for."""
_MOST_NODES: Final = 10_000
"""Nodes of a graph that are searched at most."""


class Parameters:
    """The parameters of some models, each at an index that it keeps. Nothing of the models is kept alive.

    Args:
        models: whose parameters they are.
        agc: how they are clipped; None: not.
    """

    def __init__(self, models: Iterable[nn.Module], agc: AGC | None) -> None:
        self.watched: list[Watched] = []
        """By index."""
        self._models = [weakref.ref(model) for model in models]
        self._agc = agc
        self._index_of: dict[int, int] = {}
        self._stand_ins: dict[int, int] = {}
        self.sharded = False
        """Whether this rank holds only its part of some."""
        self._trained: list[bool] = []
        """By index: whether they were trained when that was last asked."""
        self._depths: list[int] = []
        self._order: ReadyOrder | None = None

    @property
    def models(self) -> list[nn.Module]:
        """Return the models that are still there."""
        return [model for reference in self._models if (model := reference()) is not None]

    @property
    def are_gone(self) -> bool:
        """Return whether none of them is left."""
        return all(watched.parameter() is None for watched in self.watched)

    @property
    def ids(self) -> Set[int]:
        """Return what tells them from others."""
        return self._index_of.keys()

    def discover(self) -> bool:
        """Look for parameters that are not known yet; return whether there were any."""
        new = []
        places = {watched.name: place for place, watched in enumerate(self.watched)}
        for watched in walk(self.models):
            parameter = watched.parameter()
            known = self._index_of.get(id(parameter))
            if known is None or self.watched[known].parameter() is not parameter:
                new.append((watched.bounded() if self._agc is None else watched, parameter))
        for watched, parameter in new:
            if watched.name in places:  # another parameter under the same name: a layer was replaced
                place = places[watched.name]
                self.watched[place], self._trained[place] = watched, watched.trainable
            else:
                place = len(self.watched)
                self.watched.append(watched)
                self._trained.append(watched.trainable)
            self._index_of[id(parameter)] = place
            self.sharded |= hasattr(parameter, "to_local")
        if new and self._agc is not None:
            for index in self._agc.stacked(*listed(self.watched)):
                self.watched[index] = self.watched[index].of_experts()
        return bool(new)

    def find(self, tensor: Tensor) -> int | None:
        """Return the index of a watched parameter, or of what stands in for it; None for any other tensor."""
        index = self._index_of.get(id(tensor))
        if index is not None and self.watched[index].parameter() is tensor:
            return index
        return self._stand_ins.get(id(tensor))

    def note_stand_ins(self) -> None:
        """Sharded parameters are gathered for the forward pass: what stands in for them then is in the graph."""
        index_of = {watched.name: index for index, watched in enumerate(self.watched)}
        for watched in walk(self.models):
            parameter = watched.parameter()
            if id(parameter) not in self._index_of and watched.name in index_of:
                self._stand_ins[id(parameter)] = index_of[watched.name]
        for parameter, stand_in, _ in gathered(self.models):
            index = self.find(parameter)
            if index is not None:
                self._stand_ins[id(stand_in)] = index

    def are_reached(self, losses: Iterable[Tensor]) -> bool:
        """Return whether the graph of some losses leads to a watched parameter, or to what stands in for one."""
        several = list(losses)
        if self._are_reached(several):
            return True
        if not self.sharded:
            return False
        self.note_stand_ins()  # what stands in for some may have been made since
        return self._are_reached(several)

    def _are_reached(self, losses: Sequence[Tensor]) -> bool:
        ids = {id(parameter) for known in self.watched if (parameter := known.parameter()) is not None}
        ids |= self._stand_ins.keys()
        if any(id(loss) in ids for loss in losses):
            return True
        nodes: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
        seen = set(nodes)
        for node in nodes:
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in ids:
                return True
            if len(nodes) > _MOST_NODES:
                return False
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    nodes.append(following)
        return False

    def some_has_gradient(self, indices: Iterable[int]) -> bool:
        """Return whether any of some has a gradient."""
        parameters = (self.watched[index].parameter() for index in indices)
        return any(parameter is not None and parameter.grad is not None for parameter in parameters)

    @property
    def some_has_collected(self) -> bool:
        """Return whether gradients of sharded parameters were collected that are not theirs yet."""
        return self.sharded and any(collected for _, _, collected in gathered(self.models))

    def other_than(self, indices: Set[int]) -> list[tuple[int, Tensor]]:
        """Return the parameters that are still there, but for some, each with its index."""
        return [
            (index, parameter)
            for index, watched in enumerate(self.watched)
            if index not in indices and (parameter := watched.parameter()) is not None
        ]

    def freeze(self, asked: Iterable[tuple[int, Tensor]]) -> bool:
        """Take note of ``requires_grad`` of some; return whether that of any has changed."""
        trained = self._trained
        flipped = {index for index, parameter in asked if parameter.requires_grad != trained[index]}
        for index in flipped:
            trained[index] = not trained[index]
        return bool(flipped)

    def registered(self) -> Registered:
        """Return what the server is told of them."""
        self._depths += range(len(self._depths), len(self.watched))
        watched = [
            known if known.trainable == trains else replace(known, trainable=trains)
            for known, trains in zip(self.watched, self._trained, strict=True)
        ]
        return Registered(tuple(watched), tuple(self._depths))

    def await_order(self) -> None:
        """Learn the depths from the order in which gradients become ready."""
        if not any(map(is_compiled, self.models)):
            self._order = ReadyOrder(self.other_than(frozenset()))

    @property
    def awaits_order(self) -> bool:
        """Return whether the next backward pass may tell the order."""
        return self._order is not None and not self._order.known

    def check_order(self, losses: Iterable[Tensor]) -> None:
        """Keep the order of registration where a compiled graph is about to make our gradients ready, all at once."""
        if self._order is not None and any(self.find(tensor) is not None for tensor in compiled_leaves(losses)):
            self._order.close()
            self._order = None

    def learn_order(self, step: int) -> bool:
        """Return whether the depths are known now, and were not before."""
        if self._order is None or not (self._order.known or step >= _ORDER_STEPS):
            return False
        self._order.close()
        known = self._order.known
        if known:
            self._depths = self._order.depths(len(self.watched))
        self._order = None
        return known

    def close(self) -> None:
        """Take the hooks away that wait for the order."""
        if self._order is not None:
            self._order.close()
