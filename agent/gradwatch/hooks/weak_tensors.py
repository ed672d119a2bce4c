"""Weak references to tensors, so that no model is kept alive, of a kind that lets torch swap the tensors.

``torch.utils.swap_tensors``, by which sharded models are moved and converted, refuses a tensor to which anything refers
weakly. So there is one reference to each tensor, shared by all who need it, and it is dropped while torch swaps. The
patch that does so is in place while agents listen; when the last one leaves, all references are dropped for good.
"""

import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from gradwatch.hooks.patch import Patch, around

Reference = Callable[[], Tensor | None]

_known: "Final[weakref.WeakValueDictionary[int, WeakTensor]]" = weakref.WeakValueDictionary()
"""By the id of the tensor, which may be gone, and its id another's by now."""


class _Deaths:
    """Counts the referenced tensors that have died."""

    count = 0


deaths: Final = _Deaths()
"""``deaths.count`` stays the same as long as no referenced tensor dies."""


class WeakTensor:
    """Weak reference to a tensor, made by ``weak``; a call returns the tensor, or None if it no longer exists."""

    __slots__ = ("__weakref__", "reference")

    def __init__(self, tensor: Tensor) -> None:
        self.reference: Reference = weakref.ref(tensor, _note_death)
        """Returns the tensor as well, in less time."""

    def __call__(self) -> Tensor | None:
        """Return the tensor, or None if it no longer exists."""
        return self.reference()


def weak(tensor: Tensor) -> WeakTensor:
    """Return the one weak reference to ``tensor``."""
    known = _known.get(id(tensor))
    if known is None or known.reference() is not tensor:
        known = _known[id(tensor)] = WeakTensor(tensor)
    return known


def _note_death(_reference: "weakref.ref[Tensor]") -> None:
    deaths.count += 1


def _no_tensor() -> None:
    """Stand in for the reference to a tensor that is being swapped, or that nobody may refer to any more."""


def _swap(original: Callable[..., Any], t1: Tensor, t2: Tensor) -> Any:
    known = [(tensor, _known.get(id(tensor))) for tensor in (t1, t2)]
    ours = [(tensor, weak) for tensor, weak in known if weak is not None and weak.reference() is tensor]
    for _, weak in ours:
        weak.reference = _no_tensor
    try:
        return original(t1, t2)
    finally:
        for tensor, weak in ours:
            weak.reference = weakref.ref(tensor, _note_death)


swap_patch: Final = Patch(torch.utils, "swap_tensors", around(_swap))
"""In place while agents listen."""


def drop_all() -> None:
    """Drop all references to tensors: without the patch, a reference would keep torch from swapping."""
    for weak in list(_known.values()):
        weak.reference = _no_tensor
    _known.clear()
