"""Attaching without a word from the program: what ``gradwatch run`` sets up in each process that imports torch.

Nothing is hooked before the first backward pass: a hook on forward passes would be traced into compiled models, and
keep ``torch.compile`` from compiling them, make it compile again, or warn. What is trained is found then, among the
objects that are there.
"""

import functools
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_MOST_NODES: Final = 20_000
"""Of the graph of a loss, where no optimizer is there yet to tell what is trained; more could overflow the stack, see
``classifier``."""
_kept: Final[list[nn.Module]] = []
"""Stands for the model of a program that has parameters but no modules."""


class Waiting:
    """Waits for the first backward pass, and attaches to what is trained then. It holds nothing of the program."""

    def __init__(self) -> None:
        self._done = False
        self._backward = torch.autograd.backward

        @functools.wraps(self._backward)
        def first_backward(*args: Any, **kwargs: Any) -> Any:
            return self._first_backward(*args, **kwargs)

        self._ours = first_backward
        torch.autograd.backward = first_backward

    def _first_backward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.autograd.backward is self._ours:
            torch.autograd.backward = self._backward
        if self._done:
            return self._backward(*args, **kwargs)
        self._done = True
        try:
            attached = _attach(args[0] if args else kwargs.get("tensors"))
        except Exception as error:  # the program must not notice
            sys.stderr.write(f"gradwatch: cannot watch this process: {type(error).__name__}: {error}\n")
            attached = False
        through = torch.autograd.backward if attached else self._backward
        return through(*args, **kwargs)


def _attach(losses: Any) -> bool:
    """Attach to what is trained; return False where there is nothing to watch, or the program attaches by itself.

    Args:
        losses: what the first backward pass is called with: a tensor or several.
    """
    from gradwatch import taps
    from gradwatch.agent import Agent
    from gradwatch.settings import resolve

    if taps.listeners():
        return False
    optimizers, modules = _there()
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    trained = [parameter for group in groups for parameter in group["params"]]
    several = losses if isinstance(losses, list | tuple) else [losses]
    models = _roots(modules, trained or _reached(several)) or _named(optimizers)
    if not models:
        return False
    Agent(models, None, resolve(), ends_run=False)
    return True


def _there() -> tuple[list[Optimizer], list[nn.Module]]:
    """Return the optimizers and the modules of the program, about in the order in which they were made."""
    optimizers: list[Optimizer] = []
    modules: list[nn.Module] = []
    for generation in (2, 1, 0):
        for found in gc.get_objects(generation):
            kind = type(found)  # what an object says of itself (``isinstance``) may run code of its own
            if issubclass(kind, nn.Module):
                modules.append(found)
            elif issubclass(kind, Optimizer):
                optimizers.append(found)
    return optimizers, modules


def _roots(modules: Sequence[nn.Module], trained: Iterable[Tensor]) -> list[nn.Module]:
    """Return the outermost modules that hold parameters of ``trained``."""
    wanted = {id(parameter) for parameter in trained}
    inside = {id(part) for module in modules for part in _parts(module)}
    outermost = (module for module in modules if id(module) not in inside)
    return [module for module in outermost if any(id(parameter) in wanted for parameter in _parameters(module))]


def _parts(module: nn.Module) -> list[nn.Module]:
    with suppress(Exception):  # one that is half made, or has ways of its own
        return list(module.children())
    return []


def _parameters(module: nn.Module) -> list[Tensor]:
    with suppress(Exception):
        return list(module.parameters())
    return []


def _reached(losses: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters in the graphs of some losses."""
    known: set[Any] = set()
    waiting = [loss.grad_fn for loss in losses if isinstance(loss, Tensor) and loss.grad_fn is not None]
    while waiting and len(known) < _MOST_NODES:
        node = waiting.pop()
        if node not in known:
            known.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            waiting += [below for below, _ in node.next_functions if below is not None]


def _named(optimizers: Iterable[Optimizer]) -> list[nn.Module]:
    """Return a module made of the parameters of optimizers that were given names, for programs without modules."""
    model = nn.Module()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                _put(model, name.split("."), parameter)
    if not any(True for _ in model.parameters()):
        return []
    _kept.append(model)
    return [model]


def _put(model: nn.Module, path: list[str], parameter: torch.Tensor) -> None:
    for part in path[:-1]:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    if isinstance(parameter, nn.Parameter):
        model.register_parameter(path[-1], parameter)
    else:
        model.register_parameter(path[-1], None)
        model._parameters[path[-1]] = parameter  # type: ignore[assignment] # noqa: SLF001


def script_name(argument: str) -> str:
    """Return what a run is named after: the script, or the package of ``python -m package``."""
    path = Path(argument)
    if argument in ("", "-c", "-m"):
        return "python"
    return path.parent.name if path.stem == "__main__" else path.stem
