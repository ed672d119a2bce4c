"""Finds the classifier of a network in the graph of its loss: the weights that no other weight follows."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from torch import Tensor

from gradwatch.hooks.autograd_graph import Node, NodeBudget, inputs, leaf, leaves_of, roots, walk

SEARCHES: Final = 5
"""Losses whose graphs are searched, at first and when something has changed."""
SEARCHES_TO_CLIP: Final = 100
"""Losses whose graphs are searched at first where AGC excludes the classifier: a head may be trained only sometimes."""
_TAKES_WEIGHTS: Final = re.compile(
    r"_?(?:Addmm|Mm|Bmm|Baddbmm|Addbmm|Linear|MkldnnLinear|Convolution|ConvolutionOverrideable|SlowConv\w+"
    r"|Embedding\w*|MkldnnRnnLayer|CudnnRnn|MiopenRnn|GroupedMm|ScaledMm|ScaledGroupedMm|Bilinear|Trilinear)Backward\d+"
)
"""Operators of torch that multiply activations with a weight. A product with a vector is none of them: it is part of
parametrisations, such as the spectral norm."""
_WEIGHT_INPUT: Final = {"AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1, "ConvolutionBackward0": 1}
"""Which input of an operator is its weight; a frozen weight is not in the graph."""
_OF_TORCH: Final = re.compile(r"\w+Backward\d+")
_MOST_NODES_IN_VAIN: Final = 20_000
"""Nodes that searches may visit, all together, without finding anything new."""

Weight = list[Tensor]
"""The parameters that one weight is computed from: several where it is parametrised, as by ``weight_norm``."""


class ClassifierFinder:
    """Learns which weights are the last ones before the loss.

    A network may have several: one for each head. A weight that is used twice, as a tied embedding is, counts where it
    is used last.

    Args:
        find: gives the index of a watched parameter, None for any other tensor.
        searches: number of losses whose graphs are searched at first.
    """

    def __init__(self, find: Callable[[Tensor], int | None], searches: int = SEARCHES) -> None:
        self._find = find
        self.searches_left = searches
        """Number of losses whose graphs are still to be searched."""
        self._seen: set[frozenset[int]] = set()
        """Sets of candidates that were compared already."""
        self.indices: frozenset[int] = frozenset()
        """Indices of the classifier's weights found so far."""
        self.frozen = False
        """Whether the last weight before the loss is not trained: then there is none to exclude."""
        self.guessed = False
        """Whether the graph did not tell: one operator takes several weights, as that of a compiled model does, or the
        graph was too large to be searched to its end."""
        self._visited_in_vain = 0
        """Nodes visited since something new was found."""

    def search_again(self) -> None:
        """Search the graphs of the next losses, however many searches were in vain: something has changed."""
        self._visited_in_vain = 0
        self.searches_left = max(self.searches_left, SEARCHES)

    def search(self, losses: Iterable[Tensor]) -> bool:
        """Search the graphs of some losses; return whether anything new was found."""
        if self._visited_in_vain >= _MOST_NODES_IN_VAIN:
            return False
        budget = NodeBudget()
        changed = self._search(losses, budget)
        self._visited_in_vain = 0 if changed else self._visited_in_vain + budget.visited
        return changed

    def _search(self, losses: Iterable[Tensor], budget: NodeBudget) -> bool:
        # 1. The operators with weights that come first on the way back from the loss.
        operators = list(_first_operators(roots(losses), budget))
        first = {node: weights for node, weights in operators if weights}
        self.frozen |= len(first) < len(operators)
        candidates = frozenset(index for taken in first.values() for weight in taken for index in self._indices(weight))
        if not candidates or candidates in self._seen:
            return False
        self._seen.add(candidates)
        # 2. Of these the ones that no other follows, as one branch of the network may join another.
        last = first if len(first) == 1 else _last(first, budget)
        self.guessed |= budget.is_spent
        # 3. Their weights; of an operator with several weights one is guessed.
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


def _first_operators(start: Sequence[Node], budget: NodeBudget) -> Iterator[tuple[Node, list[Weight]]]:
    """Yield the operators with weights that come first on the way back from the loss, each with its weights.

    An operator whose weight is frozen is among them, without weights.
    """
    leaves: dict[Node, Weight | None] = {}
    found: set[Node] = set()
    for node in walk(start, budget, descend=lambda node: node not in found):
        if not _takes_weights(node):
            continue
        weights = _weights_of(node, leaves, budget)
        if weights or _is_frozen(node):
            found.add(node)
            yield node, weights


def _last(first: dict[Node, list[Weight]], budget: NodeBudget) -> dict[Node, list[Weight]]:
    """Return the operators that no other one of the list follows on its way to the loss."""
    followed = set(walk((below for operator in first for below in inputs(operator)), budget))
    return {node: weights for node, weights in first.items() if node not in followed} or first


def _takes_weights(node: Node) -> bool:
    name = node.name().rpartition("::")[2]
    if _TAKES_WEIGHTS.fullmatch(name):
        return True
    # The names of torch's own operators end in a digit; any other is a function of the user's, or a compiled graph.
    return not _OF_TORCH.fullmatch(name) and leaf(node) is None


def _weights_of(operator: Node, known: dict[Node, Weight | None], budget: NodeBudget) -> list[Weight]:
    """Return the weights that an operator takes: the inputs that were computed from matrices among parameters alone."""
    found = (leaves_of(below, known, budget, _takes_weights) for below in inputs(operator))
    matrices = ([tensor for tensor in leaves if tensor.dim() > 1] for leaves in found if leaves)
    return [weight for weight in matrices if weight]


def _is_frozen(operator: Node) -> bool:
    place = _WEIGHT_INPUT.get(operator.name())
    return place is not None and operator.next_functions[place][0] is None
