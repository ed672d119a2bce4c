"""The places where torch is listened to: optimizer steps, clipping, loss scaling, backward.

They are set when the first agent attaches and taken away when the last one leaves. All of them are global to the
process, and none touches a model: a watched model can be copied, pickled, compiled and sharded as if it were not.
"""

import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from operator import itemgetter
from types import FrameType
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_OPTIMIZER_FILE: Final = Optimizer.profile_hook_step.__code__.co_filename
_compiler: Callable[[], object] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)  # noqa: SLF001
"""None where no compiler looks at the frames that are run; torch before 2.6 does not tell."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Listener(Protocol):
    """What an agent hears. None of these may raise, but for ``before_step`` where it clips."""

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Optimizer | None
    ) -> Arguments | None:
        """An optimizer is about to step, within the step of ``outer``; returned arguments replace its own."""

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""

    def before_backward(self, tensors: Sequence[Tensor], losses: Sequence[Tensor]) -> object:
        """Gradients of these, the losses among them, are about to be accumulated; what is returned comes back then."""

    def after_backward(self, losses: Sequence[Tensor], before: object) -> None:
        """They were accumulated; where that failed, ``before`` is None."""

    def scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """A loss scaler multiplied ``original``."""

    def after_scaler_step(self, scaler: object, optimizer: Optimizer) -> None:
        """A loss scaler had its chance to step ``optimizer``, or skipped it."""

    def before_norm_clip(
        self, parameters: Sequence[Tensor], total_norm: Tensor, max_norm: float | Tensor, norm_type: float
    ) -> None:
        """Gradients are about to be clipped by their total norm."""

    def before_value_clip(self, parameters: Sequence[Tensor]) -> None:
        """Gradients are about to be clipped by value."""

    def after_zero_grad(self, owner: Optimizer | nn.Module) -> None:
        """An optimizer or a module forgot its gradients."""

    def exiting(self, status: object) -> None:
        """``sys.exit`` was called, by any thread; it may be caught."""

    def forget_after_fork(self) -> bool:
        """Be what is right in a forked child; return whether to listen on there."""


_listeners: tuple[Listener, ...] = ()
_undo: list[Callable[[], None]] = []
_replaced: set[tuple[Any, str]] = set()
"""Owners and names of the attributes that are wrapped."""
_stepping: dict[int, tuple[int, weakref.ref[Optimizer]]] = {}
"""The optimizers in the middle of a step, by their ids, each with the id of the frame of torch's outermost wrapper."""
_norm_type: ContextVar[float] = ContextVar("_norm_type", default=2.0)
"""Which norm ``clip_grad_norm_`` takes; whoever clips by a norm of his own is believed to take torch's usual one."""


def listen(listener: Listener) -> None:
    """Add a listener; the first one sets the taps."""
    global _listeners
    if not _listeners:
        _set()
    _listeners = (*_listeners, listener)


def leave(listener: Listener) -> None:
    """Remove a listener; the last one takes the taps away. Idempotent."""
    global _listeners
    had = bool(_listeners)
    _listeners = tuple(other for other in _listeners if other is not listener)
    if had and not _listeners:
        while _undo:
            _undo.pop()()


def listeners() -> tuple[Listener, ...]:
    """Return those who listen now."""
    return _listeners


def _after_fork() -> None:
    """A forked child (a DataLoader worker) does not measure: it attaches for itself if it trains."""
    global _listeners
    _listeners = tuple(listener for listener in _listeners if listener.forget_after_fork())
    while _undo and not _listeners:
        _undo.pop()()


os.register_at_fork(after_in_child=_after_fork)


def _set() -> None:
    # A compiled step must not be traced into the agent: it breaks the graph around the hooks instead.
    _undo.append(register_optimizer_step_pre_hook(untraced(_before_step)).remove)
    _undo.append(register_optimizer_step_post_hook(untraced(_after_step)).remove)
    _replace(torch.autograd, "backward", _backward)
    _replace(sys, "exit", _exit)
    _replace(torch.amp.GradScaler, "__init__", _make_scaler)
    _replace(torch.amp.GradScaler, "scale", _scale)
    _find_scalers(torch.amp.GradScaler)
    _replace(torch.amp.GradScaler, "step", _scaler_step)
    _replace(Optimizer, "zero_grad", _zero_grad)
    _replace(nn.Module, "zero_grad", _zero_grad)
    _replace_inside(clip_grad.clip_grad_value_, _clip_by_value)
    if hasattr(clip_grad, "_clip_grads_with_norm_"):
        _replace_inside(clip_grad.clip_grad_norm_, _note_norm_type)
        _replace_inside(clip_grad._clip_grads_with_norm_, _clip_by_norm)
    else:
        _replace_inside(clip_grad.clip_grad_norm_, _measure_and_clip_by_norm)


def _replace(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper`` around an attribute. If somebody wraps it again, ours stays inside and merely calls through."""
    original = getattr(owner, name)
    ours = _bound(wrapper, original)
    _replaced.add((owner, name))
    setattr(owner, name, ours)

    def undo() -> None:
        _replaced.discard((owner, name))
        if getattr(owner, name) is ours:
            setattr(owner, name, original)

    _undo.append(undo)


def _bound(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    wrapper = untraced(wrapper)
    listening = [True]
    _undo.append(listening.clear)  # of this one for good: others may listen later, through a wrapper of their own

    @functools.wraps(original)
    def ours(*args: Any, **kwargs: Any) -> Any:
        if not (_listeners and listening) or (torch.compiler.is_compiling() and _is_one_graph()):
            return original(*args, **kwargs)
        return wrapper(original, *args, **kwargs)

    return ours


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` so that the compiler leaves it alone; where no compiler is at work, that costs nothing."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def untraced(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _compiler() is not None:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return untraced


def _is_one_graph() -> bool:
    """Return whether the compiler, which calls this while it traces, was asked for ``fullgraph=True``."""
    try:
        return bool(sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator.current_tx().one_graph)
    except (AttributeError, KeyError):
        return False


# What ``torch.compiler.assume_constant_result`` does, without an import of the compiler.
_is_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def _replace_inside(function: Any, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper`` around the function that torch's ``_no_grad`` decorator holds.

    The clipping functions are imported by name all over (``from torch.nn.utils import clip_grad_norm_``): a name
    replaced in torch's modules would not reach those who imported it before. The decorator's cell reaches all.
    """
    for cell in function.__closure__ or ():
        original = cell.cell_contents
        if callable(original):
            cell.cell_contents = _bound(wrapper, original)
            _undo.append(functools.partial(setattr, cell, "cell_contents", original))
            return


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    caller = _torchs_wrapper()
    outer = None
    if _stepping and caller is not None:
        above = _above(caller)
        if _stepping.get(id(optimizer), (0, None))[0] in above:
            return None  # a subclass called ``super().step()``: the outer step was announced
        # A step that raised never announced its end: where its frame was another one may be now.
        for known in [known for known, (frame, _) in _stepping.items() if frame == id(caller)]:
            del _stepping[known]
        around = [(above.index(frame), other()) for frame, other in _stepping.values() if frame in above]
        outer = min(around, key=itemgetter(0))[1] if around else None
    _stepping[id(optimizer)] = id(caller), weakref.ref(optimizer)
    changed = None
    for listener in _listeners:
        answer = listener.before_step(optimizer, args, kwargs, outer)
        if answer is not None:
            changed = args, kwargs = answer
    return changed


def _after_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    if _stepping.get(id(optimizer), (0, None))[0] != id(_torchs_wrapper()):
        return
    del _stepping[id(optimizer)]
    for listener in _listeners:
        listener.after_step(optimizer)


def _torchs_wrapper() -> FrameType | None:
    """Return the frame of torch's wrapper of one ``step``; None where the step is compiled."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001
    for _ in range(8):
        if frame is None or (frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _OPTIMIZER_FILE):
            return frame
        frame = frame.f_back
    return None


def _above(frame: FrameType) -> list[int]:
    """Return the ids of the wrappers of steps within which a wrapper was called, the innermost first."""
    code, above = frame.f_code, frame.f_back
    found = []
    while above is not None:
        if above.f_code is code:
            found.append(id(above))
        above = above.f_back
    return found


def _backward(original: Callable[..., Any], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensors, Iterator):
        tensors = tuple(tensors)
    several = [tensors] if isinstance(tensors, Tensor) else [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    losses = [tensor for tensor in several if tensor.numel() == 1] if grad_tensors is None else []
    listening = _listeners
    before = [listener.before_backward(several, losses) for listener in listening]
    try:
        result = original(tensors, grad_tensors, *args, **kwargs)
    except BaseException:
        for listener in listening:
            listener.after_backward(losses, None)
        raise
    for listener, marks in zip(listening, before, strict=True):
        listener.after_backward(losses, marks)
    return result


def _scale(original: Callable[..., Any], scaler: Any, outputs: Any) -> Any:
    result = original(scaler, outputs)
    if isinstance(outputs, Iterator):
        return result
    pairs = [(outputs, result)] if isinstance(outputs, Tensor) else zip(outputs, result, strict=True)
    for output, scaled in pairs:
        if isinstance(output, Tensor):
            for listener in _listeners:
                listener.scaled(scaler, output, scaled)
    return result


def _exit(original: Callable[..., Any], status: object = None, *args: Any, **kwargs: Any) -> Any:
    for listener in _listeners:
        listener.exiting(status)
    return original(status, *args, **kwargs)


def _make_scaler(original: Callable[..., Any], scaler: Any, *args: Any, **kwargs: Any) -> None:
    _find_scalers(torch.amp.GradScaler)
    original(scaler, *args, **kwargs)


def _find_scalers(scaler: Any) -> None:
    """Listen to the loss scalers that scale in their own way, as FSDP's does; they may be imported at any time."""
    for own in scaler.__subclasses__():
        if "scale" in vars(own) and (own, "scale") not in _replaced:
            _replace(own, "scale", _scale)
        _find_scalers(own)


def _scaler_step(original: Callable[..., Any], scaler: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    result = original(scaler, optimizer, *args, **kwargs)
    if scaler.is_enabled():
        for listener in _listeners:
            listener.after_scaler_step(scaler, optimizer)
    return result


def _zero_grad(original: Callable[..., Any], owner: Optimizer | nn.Module, *args: Any, **kwargs: Any) -> Any:
    result = original(owner, *args, **kwargs)
    for listener in _listeners:
        listener.after_zero_grad(owner)
    return result


def _several(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _note_norm_type(
    original: Callable[..., Any],
    parameters: Any,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Tell ``_clip_by_norm``, which torch calls inside, what its norm is."""
    noted = _norm_type.set(norm_type)
    try:
        return original(parameters, max_norm, norm_type, *args, **kwargs)
    finally:
        _norm_type.reset(noted)


def _clip_by_norm(
    original: Callable[..., Any],
    parameters: Any,
    max_norm: float | Tensor,
    total_norm: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    several = _several(parameters)
    for listener in _listeners:
        listener.before_norm_clip(several, total_norm, max_norm, float(_norm_type.get()))
    return original(several, max_norm, total_norm, *args, **kwargs)


def _measure_and_clip_by_norm(
    original: Callable[..., Any],
    parameters: Any,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Torch before 2.6 measures and clips in one function: it is heard when it is done."""
    several = _several(parameters)
    total_norm = original(several, max_norm, norm_type, *args, **kwargs)
    for listener in _listeners:
        listener.before_norm_clip(several, total_norm, max_norm, float(norm_type))
    return total_norm


def _clip_by_value(original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
    several = _several(parameters)
    for listener in _listeners:
        listener.before_value_clip(several)
    return original(several, *args, **kwargs)
