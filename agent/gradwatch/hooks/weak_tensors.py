"""Tensors that are held weakly, so that no model is kept alive, and in a way that lets torch swap them.

``torch.utils.swap_tensors``, by which sharded models are moved and converted, refuses a tensor to which anything refers
weakly. So there is one reference to each tensor, shared by all who hold it, and it is let go of while torch swaps.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

Reference = Callable[[], Tensor | None]

_known: "Final[weakref.WeakValueDictionary[int, Held]]" = weakref.WeakValueDictionary()
"""By the id of the tensor, which may be gone, and its id another's by now."""
_era = object()
"""Another one after each death of a tensor that was held."""


class Held:
    """A tensor that is held weakly; called, it gives the tensor, or None where that is gone. Made by ``held``."""

    __slots__ = ("__weakref__", "reference")

    def __init__(self, tensor: Tensor) -> None:
        self.reference: Reference = weakref.ref(tensor, _begin_era)
        """Gives the tensor, too, in less time."""

    def __call__(self) -> Tensor | None:
        """Return the tensor."""
        return self.reference()


def held(tensor: Tensor) -> Held:
    """Return what holds ``tensor`` weakly."""
    known = _known.get(id(tensor))
    if known is None or known.reference() is not tensor:
        known = _known[id(tensor)] = Held(tensor)
    return known


def era() -> object:
    """Return what is the same object as before unless a tensor that was held is gone since."""
    return _era


def _begin_era(_reference: "weakref.ref[Tensor]") -> None:
    global _era
    _era = object()


def _gone() -> None:
    """Give nothing, in place of a tensor that is being swapped."""


_swap_tensors: Final[Callable[..., Any]] = torch.utils.swap_tensors


@functools.wraps(_swap_tensors)
def _swap(t1: Tensor, t2: Tensor) -> Any:
    known = [(tensor, _known.get(id(tensor))) for tensor in (t1, t2)]
    ours = [(tensor, holder) for tensor, holder in known if holder is not None and holder.reference() is tensor]
    for _, holder in ours:
        holder.reference = _gone
    try:
        return _swap_tensors(t1, t2)
    finally:
        for tensor, holder in ours:
            holder.reference = weakref.ref(tensor, _begin_era)


torch.utils.swap_tensors = _swap
