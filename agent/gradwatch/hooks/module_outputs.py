"""Forward hooks on every module that flag which outputs and gradients are finite.

The hooks never wait for a device: a flag is a tensor of one element, which the collector's thread reads later.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_MOST_FLAGS: Final = 100_000


Flag = Any
"""A tensor of one element on its device; once it was read, a number."""


@dataclass(slots=True)
class FiniteFlags:
    """Tells whether an output of a module, or the gradient that reached it, was finite."""

    module: str
    """Qualified name of the module."""
    kind: Literal["output", "gradient"]
    finite: Flag
    inputs_finite: Flag | None = None
    """Of an output: whether the module's inputs were finite; None: it has no floating-point input."""
    weights_finite: Flag | None = None
    """Of an output: whether the module's own parameters were finite; None: it has none."""

    def map_numbers(self, change: Callable[[Flag], Flag]) -> None:
        """Put another flag in the place of each."""
        self.finite = change(self.finite)
        if self.inputs_finite is not None:
            self.inputs_finite = change(self.inputs_finite)
        if self.weights_finite is not None:
            self.weights_finite = change(self.weights_finite)


class OutputHooks:
    """Hooks the forward pass of all modules of some models until it is closed.

    Args:
        models: the models; they are not kept alive.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._flags: list[FiniteFlags] = []
        self._handles: list[RemovableHandle] = []
        for model in models:
            for name, module in model.named_modules():
                self._handles.append(module.register_forward_hook(_ForwardHook(name, self._flags)))

    def take(self) -> list[FiniteFlags]:
        """Return the flags since the last call, in the order of the forward and backward passes."""
        flags = list(self._flags)
        self._flags.clear()
        return flags

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _ForwardHook:
    """A forward hook; a top-level class, so that a model that carries it can be pickled."""

    def __init__(self, name: str, flags: list[FiniteFlags]) -> None:
        self._name = name
        self._flags = flags

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or len(self._flags) >= _MOST_FLAGS:
            return
        with suppress(Exception), torch.no_grad():  # a tensor subclass without isfinite, a function transform
            self._flag(module, inputs, output)

    def _flag(self, module: nn.Module, inputs: Any, output: Any) -> None:
        inputs_finite = _all_finite(_tensors(inputs))
        weights_finite = _all_finite(module.parameters(recurse=False))
        for tensor in _tensors(output):
            self._flags.append(FiniteFlags(self._name, "output", _is_finite(tensor), inputs_finite, weights_finite))
            if tensor.requires_grad:
                tensor.register_hook(_GradientHook(self._name, self._flags))


class _NoHook:
    """Takes the hook's place in a copy of the model."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Do nothing."""


class _GradientHook:
    def __init__(self, name: str, flags: list[FiniteFlags]) -> None:
        self._name = name
        self._flags = flags

    def __call__(self, gradient: Tensor) -> None:
        with suppress(Exception), torch.no_grad():
            self._flags.append(FiniteFlags(self._name, "gradient", _is_finite(gradient)))


def _is_finite(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    to_local = getattr(detached, "to_local", None)  # a check of a whole DTensor would be a collective
    return torch.isfinite(detached if to_local is None else to_local()).all()


def _all_finite(tensors: Iterable[Tensor]) -> Tensor | None:
    flags = [_is_finite(tensor) for tensor in tensors]
    return torch.stack(flags).all() if flags else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the dense floating-point tensors in an argument or a result of a module."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout == torch.strided:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
