"""Patching functions: every function that the agent replaces is one ``Patch``, which can be undone.

A patch is applied when the first agent attaches and undone when the last one leaves. If somebody has wrapped the
patched function meanwhile, the patch stays in place and only calls the original.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from itertools import chain
from typing import Any

import torch

_log = logging.getLogger("gradwatch")

compiler: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback  # noqa: SLF001
"""Returns None where no compiler looks at the frames that are run."""

Function = Callable[..., Any]
Make = Callable[[Function, list[bool], Function], Function]
"""Makes the function that takes the place of an original: ``make(original, active, aside)``.

The function begins by calling ``aside`` with its arguments where ``active`` is empty or a compiler is at work.
"""


def _is_one_graph() -> bool:
    """Return whether the compiler, which calls this while it traces, was asked for ``fullgraph=True``."""
    try:
        return bool(sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator.current_tx().one_graph)
    except (AttributeError, KeyError):
        return False


@functools.cache
def _tell_unheard() -> None:
    _log.warning("gradwatch: clipping that is compiled is not heard: grad_norm is the norm of what it leaves")


def _told_unheard() -> bool:
    """Tell the user, once, that calls of a compiled function are not heard; called while it is traced."""
    _tell_unheard()
    return True


# What ``torch.compiler.assume_constant_result`` does, without an import of the compiler.
_is_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
_told_unheard._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


class Patch:
    """A function that is replaced while agents are attached.

    A compiled step is not traced into the replacement: the graph breaks there, or, under ``fullgraph=True`` and where
    ``traced`` says so, the original is compiled alone. A graph that breaks elsewhere than without the agent computes
    other last bits.

    Args:
        owner: the module or class that has the function as an attribute, or the closure cell that holds it.
        name: name of the attribute.
        make: makes the replacement.
        beside_compiler: whether ``aside`` keeps the compiler out; False while torch is still being imported, where
            ``aside`` is the original.
        traced: whether a compiler compiles the original, so that the call is not heard.
    """

    def __init__(
        self, owner: Any, name: str, make: Make, *, beside_compiler: bool = True, traced: bool = False
    ) -> None:
        self.owner = owner
        self.name = name
        self._make = make
        self._beside_compiler = beside_compiler
        self._traced = traced
        self._original: Any = None
        self._patched: Any = None
        self._active: list[bool] = []
        """Not empty while this application of the patch is in force."""

    def apply(self) -> None:
        """Put the patch in place."""
        original = self._original = getattr(self.owner, self.name)
        self._active = active = [True]
        traced = self._traced

        def aside(*args: Any, **kwargs: Any) -> Any:
            if not active or (torch.compiler.is_compiling() and (traced or _is_one_graph())):
                if active and traced:
                    _told_unheard()
                return original(*args, **kwargs)
            return disabled(*args, **kwargs)

        made = self._make(original, active, aside if self._beside_compiler else original)
        self._patched = functools.wraps(original)(made)
        disabled = torch.compiler.disable(self._patched) if self._beside_compiler else original
        setattr(self.owner, self.name, self._patched)

    def undo(self) -> None:
        """Put the original back; if somebody has wrapped the patch, it stays and only calls the original."""
        self._active.clear()
        if getattr(self.owner, self.name) is self._patched:
            setattr(self.owner, self.name, self._original)


class AddedHook:
    """A hook beside those in one of torch's global dictionaries of hooks, while it is applied.

    The dictionary is not changed: a thread may be in the middle of running its hooks, and would raise an error into the
    step of an optimizer. Instead another object takes its place, which has the same hooks and this one.

    Args:
        owner: the module that has the dictionary as an attribute.
        name: name of the attribute.
        hook: the hook, which comes last.
    """

    def __init__(self, owner: Any, name: str, hook: Function) -> None:
        self.owner = owner
        self.name = name
        self._hook = hook
        self._original: Any = None
        self._hooks: _Hooks | None = None

    def apply(self) -> None:
        """Add the hook."""
        original = getattr(self.owner, self.name)
        if self._hooks is None or self._original is not original:
            # It stays the same later on: a user's hook that was set meanwhile can be removed through it alone.
            self._original, self._hooks = original, _Hooks(original, self._hook)
        setattr(self.owner, self.name, self._hooks)

    def undo(self) -> None:
        """Take the hook away; where somebody has replaced the dictionary meanwhile, nothing is done."""
        if getattr(self.owner, self.name) is self._hooks:
            setattr(self.owner, self.name, self._original)


class _Hooks(MutableMapping[int, Function]):
    """Hooks of a dictionary, and one more that only shows among the values."""

    def __init__(self, known: MutableMapping[int, Function], added: Function) -> None:
        self._known = known
        # No function of ours: each step of an optimizer asks for the hooks twice.
        self.values = partial(chain, known.values(), (added,))  # type: ignore[assignment, method-assign]

    def __getitem__(self, key: int) -> Function:
        return self._known[key]

    def __setitem__(self, key: int, hook: Function) -> None:
        self._known[key] = hook

    def __delitem__(self, key: int) -> None:
        del self._known[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def around(call: Function) -> Make:
    """Return a function that makes replacements, which call ``call(original, *args, **kwargs)``."""

    def make(original: Function, active: list[bool], aside: Function) -> Function:
        def patched(*args: Any, **kwargs: Any) -> Any:
            if not active or torch.compiler.is_compiling() or compiler() is not None:
                return aside(*args, **kwargs)
            return call(original, *args, **kwargs)

        return patched

    return make


def inside_no_grad(function: Any, make: Make) -> Patch:
    """Return a patch of the function that torch's ``_no_grad`` decorator holds in its closure.

    The clipping functions are imported by name all over (``from torch.nn.utils import clip_grad_norm_``): a name
    replaced in torch's modules would not reach those who imported it before. The decorator's cell reaches all.

    Raises:
        LookupError: the closure of the function holds no other function.
    """
    for cell in function.__closure__ or ():
        if callable(cell.cell_contents):
            return Patch(cell, "cell_contents", make, traced=True)
    raise LookupError(f"{function.__qualname__} holds no function in its closure: this torch is not known")
