"""Attaching without a word from the program: what ``gradwatch run`` sets up in each process that imports torch."""

import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

_kept: Final[list[nn.Module]] = []
"""Stands for the model of a program that has parameters but no modules."""


class Waiting:
    """Waits for the first backward pass, and learns from the forward passes before it which modules are the roots."""

    def __init__(self) -> None:
        self.roots: list[nn.Module] = []
        self._known: set[int] = set()
        self._done = False

        def note(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001
            self._note(module)

        # Disabled for the compiler, lazily: it must not trace into this, nor be imported for it.
        disabled: Callable[[Any], Any] = vars(torch)["_disable_dynamo"]
        self._handle = register_module_forward_pre_hook(disabled(note))
        self._backward = torch.autograd.backward

        @functools.wraps(self._backward)
        def first_backward(*args: Any, **kwargs: Any) -> Any:
            return self._first_backward(*args, **kwargs)

        self._ours = first_backward
        torch.autograd.backward = first_backward

    def _note(self, module: nn.Module) -> None:
        if id(module) not in self._known and any(True for _ in module.parameters()):
            self._known.update(map(id, module.modules()))
            inside = set(map(id, module.modules()))
            self.roots = [*(root for root in self.roots if id(root) not in inside), module]

    def _first_backward(self, *args: Any, **kwargs: Any) -> Any:
        self._handle.remove()
        if torch.autograd.backward is self._ours:
            torch.autograd.backward = self._backward
        roots, self.roots = self.roots, []
        if self._done:
            return self._backward(*args, **kwargs)
        self._done = True
        try:
            attached = _attach(roots)
        except Exception as error:  # the program must not notice
            sys.stderr.write(f"gradwatch: cannot watch this process: {type(error).__name__}: {error}\n")
            attached = False
        through = torch.autograd.backward if attached else self._backward
        return through(*args, **kwargs)


def _attach(roots: list[nn.Module]) -> bool:
    """Attach to ``roots``; return False where there is nothing to watch, or the program attaches by itself."""
    from gradwatch import taps
    from gradwatch.agent import Agent
    from gradwatch.settings import resolve

    if taps.listeners():
        return False
    models = roots or _named()
    if not models:
        return False
    Agent(models, None, resolve(), ends_run=False)
    return True


def _named() -> list[nn.Module]:
    """Return a module made of the parameters of optimizers that were given names, for programs without modules."""
    model = nn.Module()
    for optimizer in gc.get_objects():
        if not isinstance(optimizer, Optimizer):
            continue
        for group in optimizer.param_groups:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                _put(model, name.split("."), parameter)
    _kept.append(model)
    return [model] if any(True for _ in model.parameters()) else []


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
