"""Walking autograd's graph: from losses back to the operators and parameters that they were computed from.

Every search in the agent goes through ``walk``, so that the bound on visited nodes is kept in one place: torch frees a
chain of nodes that Python has seen by recursion, and some 50,000 of them overflow the stack.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from torch import Tensor

MOST_NODES: Final = 20_000
"""Nodes that one walk visits at most: about 50 ms."""

Node = Any
"""A node of autograd's graph (``torch.autograd.graph.Node``)."""


class NodeBudget:
    """Counts the nodes that one or several walks have visited.

    Args:
        most: number of nodes that may be visited.
    """

    def __init__(self, most: int = MOST_NODES) -> None:
        self.visited = 0
        self._most = most

    @property
    def is_spent(self) -> bool:
        """Return whether no further node may be visited."""
        return self.visited >= self._most

    def take(self) -> bool:
        """Count one visit; return whether it was within the budget."""
        self.visited += 1
        return self.visited <= self._most


def roots(tensors: Iterable[Tensor]) -> list[Node]:
    """Return the nodes that computed these tensors; a tensor without a graph has none."""
    return [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]


def inputs(node: Node) -> list[Node]:
    """Return the nodes whose results ``node`` was computed from; an input without a gradient has none."""
    return [below for below, _ in node.next_functions if below is not None]


def leaf(node: Node) -> Tensor | None:
    """Return the tensor whose gradient a node accumulates, or None for an operator."""
    variable: Tensor | None = getattr(node, "variable", None)
    return variable


def walk(
    start: Iterable[Node], budget: NodeBudget | None = None, descend: Callable[[Node], bool] | None = None
) -> Iterator[Node]:
    """Yield each node that can be reached from ``start`` once, breadth first, until the budget is spent.

    Args:
        start: nodes to begin with, which are yielded as well.
        budget: number of nodes that may be visited; None: ``MOST_NODES``.
        descend: tells, after a node was yielded, whether to go on to its inputs; None: always.
    """
    budget = budget or NodeBudget()
    waiting = list(dict.fromkeys(start))
    seen = set(waiting)
    for node in waiting:
        if not budget.take():
            return
        yield node
        if descend is not None and not descend(node):
            continue
        for below in inputs(node):
            if below not in seen:
                seen.add(below)
                waiting.append(below)


def inputs_first(start: Iterable[Node], budget: NodeBudget | None = None) -> Iterator[Node]:
    """Yield each node that can be reached from ``start`` once, after all nodes that it was computed from.

    Args:
        start: nodes to begin with, which are yielded as well.
        budget: number of nodes that may be visited; None: ``MOST_NODES``. Once it is spent, nothing more is yielded.
    """
    budget = budget or NodeBudget()
    seen: set[Node] = set()
    waiting = [(node, False) for node in start]
    while waiting and not budget.is_spent:
        node, inputs_done = waiting.pop()
        if inputs_done:
            yield node
        elif node not in seen:
            budget.take()
            seen.add(node)
            waiting.append((node, True))
            waiting += [(below, False) for below in inputs(node)]


def leaves_of(
    root: Node, known: dict[Node, list[Tensor] | None], budget: NodeBudget, ends: Callable[[Node], bool]
) -> list[Tensor] | None:
    """Return the leaves that the result of ``root`` was computed from, each once; None where ``ends`` ends the search.

    Args:
        root: node to begin with.
        known: results for nodes of earlier searches; takes those of this search, so that no node is visited twice.
        budget: number of nodes that may be visited, leaves not counted. Once it is spent, every other node counts as
            one that ends the search.
        ends: tells of a node that is not a leaf whether no result is wanted for all that was computed from it.
    """
    path: list[tuple[Node, list[Node], Iterator[Node]]] = []
    """From the root to the current node: nodes with their inputs, and the inputs that were not visited yet."""
    node: Node | None = root
    while node is not None:
        # 1. The result of a node that was not visited yet, or a step down to its inputs.
        if node not in known:
            variable = leaf(node)
            if variable is not None:
                known[node] = [variable]
            elif not budget.take() or ends(node):
                known[node] = None
            else:
                below = inputs(node)
                path.append((node, below, iter(below)))
        # 2. A node that ends the search does so for all that was computed from it.
        if known.get(node, ()) is None:
            known.update((above, None) for above, _, _ in path)
            return None
        # 3. The next input; a node whose inputs are all done gets its result.
        node = None
        while path and (node := next(path[-1][2], None)) is None:
            done, below, _ = path.pop()
            known[done] = _without_repeats([known[one] or [] for one in below])
    return known[root]


def _without_repeats(several: list[list[Tensor]]) -> list[Tensor]:
    """Return the tensors of several lists, each once."""
    filled = [tensors for tensors in several if tensors]
    if len(filled) == 1:
        return filled[0]
    return list({id(tensor): tensor for tensors in filled for tensor in tensors}.values())
