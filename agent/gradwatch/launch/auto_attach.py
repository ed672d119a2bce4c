"""Auto-attach: attaching to a program that does not call ``attach``, set up by ``gradwatch run`` in every process.

Nothing is hooked before the first backward pass: a hook on forward passes would be traced into compiled models, and
would keep ``torch.compile`` from compiling them, make it compile again, or warn. At the first backward pass the
models and optimizers are looked up among the objects of the process.
"""

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from gradwatch.hooks.patch import Function, Patch, around

if TYPE_CHECKING:
    from gradwatch.launch.auto_runs import AutoRuns


class AutoAttach:
    """Attaches to the models that are trained, at the first backward pass and again after an optimizer was made.

    It keeps no object of the program alive. Every other backward pass costs one look at a flag.
    """

    def __init__(self) -> None:
        self._due = True
        """Whether the next backward pass may belong to a training that has no agent yet."""
        self._removed = False
        self._new_optimizers: list[weakref.ref[Optimizer]] = []
        """Optimizers that were made since the last search."""
        self._runs: AutoRuns | None = None
        self._backward_patch = Patch(torch.autograd, "backward", self._make_backward, beside_compiler=False)
        self._init_patch = Patch(Optimizer, "__init__", self._make_init, beside_compiler=False)
        self._init_patch.apply()
        self._backward_patch.apply()

    def _make_init(self, original: Function, active: list[bool], _aside: Function) -> Function:
        def noting_init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            if active:
                self._new_optimizers.append(weakref.ref(optimizer))
                self._due = True

        return noting_init

    def _make_backward(self, original: Function, active: list[bool], _aside: Function) -> Function:
        def watched_backward(*args: Any, **kwargs: Any) -> Any:
            return self._watched_backward(original, *args, **kwargs) if active else original(*args, **kwargs)

        return watched_backward

    def _watched_backward(self, original: Function, *args: Any, **kwargs: Any) -> Any:
        if self._due and not self._removed and self._attach(args[0] if args else kwargs.get("tensors")):
            return torch.autograd.backward(*args, **kwargs)  # the new session has patched it: this pass is its first
        if self._runs is not None and self._runs.some_may_be_over:
            self._finish_idle()
        return original(*args, **kwargs)

    def _attach(self, losses: Any) -> bool:
        """Attach to models that are trained and have no agent yet; return whether there were any.

        Args:
            losses: the first argument of the backward pass: a tensor or several.
        """
        self._due = False
        references, self._new_optimizers = self._new_optimizers, []
        try:
            runs = self._runs or self._start()
            if not runs.program_attaches_itself:
                several = losses if isinstance(losses, list | tuple) else [losses]
                return runs.attach(several, [made for reference in references if (made := reference()) is not None])
        except Exception as error:  # the program must not notice
            _print_failure(error)
        self._remove()
        return False

    def _finish_idle(self) -> None:
        assert self._runs is not None
        try:
            self._runs.finish_idle()
        except Exception as error:  # the program must not notice
            _print_failure(error)
            self._remove()

    def _start(self) -> "AutoRuns":
        """Import the modules that need all of torch, which was half imported until now."""
        from gradwatch.launch.auto_runs import AutoRuns

        self._backward_patch.undo()
        self._backward_patch = Patch(torch.autograd, "backward", around(self._watched_backward))
        self._backward_patch.apply()
        self._runs = AutoRuns()
        return self._runs

    def _remove(self) -> None:
        """Undo the patches."""
        self._removed = True
        self._backward_patch.undo()
        self._init_patch.undo()


def _print_failure(error: Exception) -> None:
    sys.stderr.write(f"gradwatch: cannot watch this process: {type(error).__name__}: {error}\n")
