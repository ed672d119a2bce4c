"""Where the first number that is not finite came from.

A loss that is not finite makes every gradient bad at once, and the step that follows every weight: which module it was
shows only now. On the CPU the graph of the loss still holds what the operators kept of the forward pass, and is read
from the input on. Elsewhere, and where reading it would run somebody's hooks (activation checkpointing computes anew,
offloading may hand a tensor out once), hooks watch the next steps, without waiting for the device, and are removed;
they say something only while the weights are still finite.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradwatch import wire

Node = Any
"""A node of autograd's graph."""

_ELEMENTWISE: Final = ("MulBackward", "AddBackward", "SubBackward", "DivBackward", "AddcmulBackward", "PowBackward")
_TURNING: Final = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "ToCopyBackward")
_MOST_SEEN: Final = 100_000
_MOST_NODES: Final = 20_000
"""That are read of a graph; more could overflow the stack, see ``classifier``."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The module out of which the first number came that was not finite."""

    module: str
    """Its qualified name; empty: the loss itself."""
    message: str

    def event(self, step: int, at: float) -> wire.Event:
        """Return what is told of it."""
        return wire.Event(step=step, at=at, kind="nonfinite_module", message=self.message, parameter=self.module)


def in_graph(losses: Sequence[Tensor], module_of: Callable[[Tensor], str | None]) -> Origin | None:
    """Return where the first bad number was born, from what the graphs of some losses hold.

    Args:
        losses: on the CPU, before their backward pass; all weights are finite.
        module_of: gives the name of the module that owns a parameter; None for any other tensor.

    Returns:
        None where the graph does not tell, or must not be read.
    """
    watched = False
    for node in _from_the_input([loss.grad_fn for loss in losses if loss.grad_fn is not None]):
        watched |= hasattr(node, "variable") and module_of(node.variable) is not None
        if _is_hooked(node):
            return None
        if not all(map(_all_finite, _kept(node))):
            return _named(node, module_of)
    return Origin("", "its graph holds no number that is not finite") if watched else None


def _named(node: Node, module_of: Callable[[Tensor], str | None]) -> Origin | None:
    """Name the module around the first operator that got or made something bad."""
    operator = node.name().removesuffix("0").removesuffix("Backward")
    own = [name for below in _inputs(node) if (name := _owner(below, module_of)) is not None]
    above = _nearest([below for below in _inputs(node) if _leaf(below) is None], module_of)
    if own and node.name().startswith(_ELEMENTWISE):
        return Origin(own[0], f"{operator} took a number that is not finite")
    if above is not None:
        return Origin(above, f"what was made of its result was not finite when it reached {operator}")
    return Origin(own[0], f"the input of {operator} was not finite already: look at the data") if own else None


def _nearest(nodes: Sequence[Node], module_of: Callable[[Tensor], str | None]) -> str | None:
    """Return the module of the parameter that is the fewest operators away."""
    known: set[Node] = set()
    waiting = list(nodes)
    while waiting and len(known) < _MOST_NODES:
        later: list[Node] = []
        for node in waiting:
            if node in known:
                continue
            known.add(node)
            for below in _inputs(node):
                owner = _owner(below, module_of)
                if owner is not None:
                    return owner
                later.append(below)
        waiting = later
    return None


def _owner(node: Node, module_of: Callable[[Tensor], str | None]) -> str | None:
    """Return the module of a parameter that reaches its operator as it is, or turned round."""
    variable = _leaf(node)
    return None if variable is None else module_of(variable)


def _leaf(node: Node) -> Tensor | None:
    while not hasattr(node, "variable"):
        below = _inputs(node)
        if len(below) != 1 or not node.name().startswith(_TURNING):
            return None
        node = below[0]
    leaf: Tensor = node.variable
    return leaf


def _from_the_input(roots: Sequence[Node]) -> Iterator[Node]:
    """Yield every node after all that it depends on."""
    done: set[Node] = set()
    waiting: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while waiting and len(done) < _MOST_NODES:
        node, ready = waiting.pop()
        if ready:
            yield node
        elif node not in done:
            done.add(node)
            waiting.append((node, True))
            waiting += [(below, False) for below in _inputs(node)]


def _inputs(node: Node) -> list[Node]:
    return [below for below, _ in node.next_functions if below is not None]


def _is_hooked(node: Node) -> bool:
    """Return whether reading what a node keeps would run somebody's code: offloading, or activation checkpointing.

    It may compute anew, or hand each tensor out only once. A version of torch that does not tell counts as hooked.
    """
    return any(getattr(raw, "unpack_hook", raw) is not None for _, several in _raw(node) for raw in several)


def _raw(node: Node) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield what a node of torch's keeps, packed as it is, under the name of what it is."""
    for name in dir(type(node)):
        if name.startswith("_raw_saved_"):
            try:
                raw = getattr(node, name)
            except RuntimeError:  # freed
                continue
            yield name.removeprefix("_raw"), raw if isinstance(raw, tuple) else (raw,)


def _kept(node: Node) -> Iterator[Tensor]:
    """Yield the tensors that a node of torch's keeps for its backward pass."""
    for name, _ in _raw(node):
        try:
            kept = getattr(node, name)
        except RuntimeError:  # changed in place since
            continue
        if isinstance(kept, Tensor):
            yield kept


def _all_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return True
    with torch.no_grad():
        return tensor.numel() == 0 or all(
            bool(torch.isfinite(bound).numpy().item()) for bound in torch.aminmax(tensor.detach())
        )


class Hooks:
    """Watches the outputs of all modules, and the gradients that reach them, for some steps.

    Args:
        models: what is watched; nothing of it is kept.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.seen: list[Seen] = []
        self._handles: list[RemovableHandle] = []
        for model in models:
            for name, module in model.named_modules():
                self._handles.append(module.register_forward_hook(_Forward(name, self.seen)))

    def take(self) -> "list[Seen]":
        """Return what was seen since the last time."""
        seen = list(self.seen)
        self.seen.clear()
        return seen

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a hook saw of a module: whether numbers were finite, each a flag on its device."""

    module: str
    what: str
    """``output`` or ``gradient``."""
    finite: Tensor
    given: Tensor | None = None
    """The same of its input, for an output."""
    weights: Tensor | None = None
    """The same of its own parameters."""


class _Forward:
    """A forward hook, at module level so that a model that carries it can be pickled."""

    def __init__(self, name: str, seen: "list[Seen]") -> None:
        self._name = name
        self._seen = seen

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or len(self._seen) >= _MOST_SEEN:
            return
        with suppress(Exception), torch.no_grad():  # a type that cannot be asked, a transformation
            self._see(module, inputs, output)

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        given, weights = _flags(_tensors(inputs)), _flags(module.parameters(recurse=False))
        for tensor in _tensors(output):
            self._seen.append(Seen(self._name, "output", _flag(tensor), given, weights))
            if tensor.requires_grad:
                tensor.register_hook(_Backward(self._name, self._seen))


class _Nothing:
    """What is left of a hook on a copy of the model."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """See nothing."""


class _Backward:
    def __init__(self, name: str, seen: "list[Seen]") -> None:
        self._name = name
        self._seen = seen

    def __call__(self, gradient: Tensor) -> None:
        with suppress(Exception), torch.no_grad():
            self._seen.append(Seen(self._name, "gradient", _flag(gradient)))


def _flag(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor.detach()).all()


def _flags(tensors: Iterable[Tensor]) -> Tensor | None:
    flags = [_flag(tensor) for tensor in tensors]
    return torch.stack(flags).all() if flags else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout == torch.strided:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def of_seen(seen: Sequence[Seen]) -> Origin | None:
    """Return the first module whose output, or else gradient, was not finite; waits for the device."""
    last = ""
    for entry in seen:
        if entry.what == "gradient":
            continue
        if _holds(entry.finite):
            last = entry.module
        elif not _holds(entry.weights):
            return None
        elif _holds(entry.given):
            return Origin(entry.module, "its output was not finite, its input and its weights were")
        elif last:
            return Origin(last, f"what was made of its result was not finite when it reached {entry.module}")
        else:
            return Origin(entry.module, "its input was not finite already: look at the data")
    for entry in seen:
        if not _holds(entry.finite):
            return Origin(entry.module, "the gradient that reached its output was not finite, while all outputs were")
    return None


def _holds(flag: Tensor | None) -> bool:
    return flag is None or bool(flag.cpu().numpy().item())
