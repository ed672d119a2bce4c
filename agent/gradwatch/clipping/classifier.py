"""The classifier of a network, found in the graph of its loss: the weights that no other weight follows."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from torch import Tensor

LOOKS: Final = 5
"""Losses that are looked at, at first and when something has changed."""
LOOKS_TO_CLIP: Final = 100
"""Losses that are looked at first where AGC leaves the classifier alone: a head may be trained only now and then."""
_TAKES_WEIGHTS: Final = re.compile(
    r"_?(?:Addmm|Mm|Bmm|Baddbmm|Addbmm|Linear|MkldnnLinear|Convolution|ConvolutionOverrideable|SlowConv\w+"
    r"|Embedding\w*|MkldnnRnnLayer|CudnnRnn|MiopenRnn|GroupedMm|ScaledMm|ScaledGroupedMm|Bilinear|Trilinear)Backward\d+"
)
"""Operators of torch that multiply activations with a weight. A product with a vector is none of them: it is part of
parametrisations, such as the spectral norm."""
_WEIGHT_SLOT: Final = {"AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1, "ConvolutionBackward0": 1}
"""Which input of an operator is its weight; a frozen one is not in the graph."""
_OF_TORCH: Final = re.compile(r"\w+Backward\d+")
_MOST_NODES: Final = 20_000
"""Nodes that one look visits: 50 ms. Torch frees a chain of nodes that Python has seen by recursion, and some 50,000
of them overflow the stack."""
_MOST_IN_VAIN: Final = 20_000
"""Nodes that are visited by looks that find nothing new, in all."""

Node = Any
"""A node of autograd's graph."""
Weight = list[Tensor]
"""The parameters that one weight is made of: several where it is parametrised, as by ``weight_norm``."""


class Classifier:
    """Learns which weights are the last ones before the loss.

    A network may have several: one for each head. A weight that is used twice, as a tied embedding is, counts where it
    is used last.

    Args:
        find: gives the index of a watched parameter, None for any other tensor.
        looks: losses that are looked at first.
    """

    def __init__(self, find: Callable[[Tensor], int | None], looks: int = LOOKS) -> None:
        self._find = find
        self.looks = looks
        """Losses that are still to be looked at."""
        self._seen: set[frozenset[int]] = set()
        self.indices: frozenset[int] = frozenset()
        """Of the weights found so far."""
        self.frozen = False
        """Whether the last weight before the loss is not trained: there is none to be left alone."""
        self.guessed = False
        """Whether the graph did not tell: one operator takes several weights, as that of a compiled model does, or it
        was too large to be read to its end."""
        self._in_vain = 0
        """Nodes visited since something new was found."""

    def renew(self) -> None:
        """Search on, however much was searched in vain: something has changed."""
        self._in_vain = 0
        self.looks = max(self.looks, LOOKS)

    def look(self, losses: Iterable[Tensor]) -> bool:
        """Search the graphs of some losses; return whether anything new was found."""
        if self._in_vain >= _MOST_IN_VAIN:
            return False
        account = _Account()
        changed = self._look(losses, account)
        self._in_vain = 0 if changed else self._in_vain + account.paid
        return changed

    def _look(self, losses: Iterable[Tensor], account: "_Account") -> bool:
        roots = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
        operators = list(_first_operators(roots, account))
        first = {node: weights for node, weights in operators if weights}
        self.frozen |= len(first) < len(operators)
        candidates = frozenset(index for taken in first.values() for weight in taken for index in self._indices(weight))
        if not candidates or candidates in self._seen:
            return False
        self._seen.add(candidates)
        last = first if len(first) == 1 else _last(first, account)
        self.guessed |= account.is_spent
        found = set(self.indices)
        for taken in last.values():
            weights = sorted(indices for weight in taken if (indices := self._indices(weight)))
            self.guessed |= len(weights) > 1
            found.update(*weights[-1:])
        changed = found != self.indices
        self.indices = frozenset(found)
        return changed

    def _indices(self, weight: Weight) -> list[int]:
        return sorted({index for parameter in weight if (index := self._find(parameter)) is not None})


class _Account:
    """How many nodes a look has visited."""

    def __init__(self) -> None:
        self.paid = 0

    @property
    def is_spent(self) -> bool:
        """Return whether no more may be visited."""
        return self.paid >= _MOST_NODES

    def pay(self) -> bool:
        """Return whether one more may be visited."""
        self.paid += 1
        return not self.is_spent


def _first_operators(roots: Sequence[Node], account: _Account) -> Iterator[tuple[Node, list[Weight]]]:
    """Yield the operators with weights of their own that are met first on the way back from the loss.

    One with a frozen weight is among them, with none.
    """
    known: set[Node] = set()
    leaves: dict[Node, Weight | None] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node in known:
            continue
        if not account.pay():
            return
        known.add(node)
        if _takes_weights(node):
            weights = _weights_of(node, leaves, account)
            if weights or _is_frozen(node):
                yield node, weights
                continue
        waiting += _inputs(node)


def _last(first: dict[Node, list[Weight]], account: _Account) -> dict[Node, list[Weight]]:
    """Return those of the operators that no other of them follows on any way to the loss."""
    followed: set[Node] = set()
    waiting = [below for operator in first for below in _inputs(operator)]
    while waiting:
        node = waiting.pop()
        if node not in followed and account.pay():
            followed.add(node)
            waiting += _inputs(node)
    return {node: weights for node, weights in first.items() if node not in followed} or first


def _takes_weights(node: Node) -> bool:
    name = node.name().rpartition("::")[2]
    if _TAKES_WEIGHTS.fullmatch(name):
        return True
    # A function of the user's, or a compiled graph; torch's own end in a digit.
    return not _OF_TORCH.fullmatch(name) and not hasattr(node, "variable")


def _weights_of(operator: Node, known: dict[Node, Weight | None], account: _Account) -> list[Weight]:
    """Return the weights that an operator takes: what reaches it from parameters alone."""
    return [leaves for below in _inputs(operator) if (leaves := _leaves(below, known, account))]


def _is_frozen(operator: Node) -> bool:
    slot = _WEIGHT_SLOT.get(operator.name())
    return slot is not None and operator.next_functions[slot][0] is None


def _leaves(root: Node, known: dict[Node, Weight | None], account: _Account) -> Weight | None:
    """Return the matrices that a value is computed from; None where an operator with weights is among its sources.

    Args:
        root: the operator that makes the value.
        known: answers for the nodes seen before; takes those of this search. Each node is visited once in all.
        account: pays for the visits; a node that it cannot pay for counts as an operator with weights.
    """
    path: list[tuple[Node, list[Node], Iterator[Node]]] = []
    """From the root to where the search is: nodes with their inputs, and with those that were not looked at yet."""
    node: Node | None = root
    while node is not None:
        if node not in known:
            variable = getattr(node, "variable", None)
            if variable is not None:
                known[node] = [variable] if variable.dim() > 1 else []
            elif not account.pay() or _takes_weights(node):
                known[node] = None
            else:
                inputs = _inputs(node)
                path.append((node, inputs, iter(inputs)))
        if known.get(node, ()) is None:  # and so is all that is computed from it
            known.update((above, None) for above, _, _ in path)
            return None
        node = None
        while path and (node := next(path[-1][2], None)) is None:
            done, inputs, _ = path.pop()
            known[done] = _together([known[below] for below in inputs])
    return known[root]


def _together(several: Sequence[Weight | None]) -> Weight:
    parts = [weight for weight in several if weight]
    if len(parts) == 1:
        return parts[0]
    return list({id(parameter): parameter for weight in parts for parameter in weight}.values())


def _inputs(node: Node) -> list[Node]:
    return [below for below, _ in node.next_functions if below is not None]
