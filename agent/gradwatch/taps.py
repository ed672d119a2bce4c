"""Taps into torch: optimizer steps, the loss that ``backward()`` starts from, the norm that clipping returns.

They are put in with the first agent and taken out with the last one. Everything goes through the module globals that
torch's own functions look up when they are called, so that it does not matter how user code imported them.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Listener(Protocol):
    """What an agent hears."""

    def on_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An optimizer is about to step."""

    def on_backward(self, loss: Tensor) -> None:
        """``backward()`` is called on a scalar."""

    def on_clip(self, parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
        """``clip_grad_norm_`` is about to scale gradients to ``max_norm`` where ``total_norm`` exceeds it."""


_lock = threading.Lock()
_listeners: list[Listener] = []
_removers: list[Callable[[], None]] = []


def listen(listener: Listener) -> None:
    """Put the taps in, or share those that are in."""
    with _lock:
        if not _listeners:
            _removers.append(register_optimizer_step_pre_hook(_step).remove)
            _replace(torch.autograd, "backward", _tapped_backward)
            if hasattr(clip_grad, "_clip_grads_with_norm_"):
                _replace(clip_grad, "_clip_grads_with_norm_", _tapped_clip)
        _listeners.append(listener)


def ignore(listener: Listener) -> None:
    """Stop telling this listener; the last one takes the taps out."""
    with _lock:
        if listener in _listeners:
            _listeners.remove(listener)
        if not _listeners:
            while _removers:
                _removers.pop()()


def _replace(module: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(module, name)
    tapped = make(original)
    setattr(module, name, tapped)

    def restore() -> None:
        if getattr(module, name) is tapped:  # somebody else may have wrapped it since
            setattr(module, name, original)

    _removers.append(restore)


def _step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    changed = None
    for listener in _listeners:
        answer = listener.on_step(optimizer, args, kwargs)
        if answer is not None:
            args, kwargs = changed = answer
    return changed


def _tapped_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensors, Tensor) and tensors.numel() == 1:
            for listener in _listeners:
                listener.on_backward(tensors)
        return original(tensors, *args, **kwargs)

    return backward


def _tapped_clip(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def clip(parameters: Any, max_norm: float, total_norm: Tensor, *args: Any, **kwargs: Any) -> Any:
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for listener in _listeners:
            listener.on_clip(listed, max_norm, total_norm)
        return original(listed, max_norm, total_norm, *args, **kwargs)

    return clip
