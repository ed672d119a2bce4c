"""Listening to torch: optimizer steps, backward passes, clipping, loss scaling and ``zero_grad``.

The hooks and patches are in place from the first agent that attaches to the last one that leaves. All are global to the
process and none touches a model: a watched model can be copied, pickled, compiled and sharded like any other.
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from operator import itemgetter
from types import FrameType
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from gradwatch.hooks import weak_tensors
from gradwatch.hooks.patch import AddedHook, Function, Patch, around, compiler, inside_no_grad

_STEP_WRAPPER: Final = next(
    (code for code in Optimizer.profile_hook_step.__code__.co_consts if getattr(code, "co_name", "") == "wrapper"), None
)
"""Code of what torch puts around each ``step``; None in a torch that has another: steps within steps are one there."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Listener(Protocol):
    """Receives the events of a training. Only ``before_step`` may raise an error, if clipping fails."""

    def ignores(self, optimizer: Optimizer) -> bool:
        """Return whether the steps of an optimizer are known not to matter; it may be asked at each of them."""

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Optimizer | None
    ) -> Arguments | None:
        """An optimizer is about to step, within the step of ``outer``; returned arguments replace its own."""

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""

    def before_backward(self, tensors: Sequence[Tensor], losses: Sequence[Tensor]) -> object:
        """Tensors, the losses among them, are about to be differentiated; ``after_backward`` gets what this returns."""

    def after_backward(self, losses: Sequence[Tensor], before: object, retained: bool) -> None:
        """A backward pass is over, whose graph may be retained; where it failed, ``before`` is None."""

    def scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """A loss scaler has multiplied ``original``."""

    def after_scaler_step(self, scaler: object, optimizer: Optimizer) -> None:
        """A loss scaler has stepped an optimizer, or skipped its step."""

    def before_norm_clip(
        self, parameters: Sequence[Tensor], total_norm: Tensor, max_norm: Any, norm_type: float, *, done: bool = False
    ) -> bool | None:
        """Gradients are about to be clipped by their norm, or were (``done``); return whether to tell afterwards."""

    def after_norm_clip(self, parameters: Sequence[Tensor]) -> None:
        """Gradients have been clipped by their total norm."""

    def before_value_clip(self, parameters: Sequence[Tensor]) -> None:
        """Gradients are about to be clipped by value."""

    def after_zero_grad(self, owner: Optimizer | nn.Module) -> None:
        """An optimizer or a module has cleared its gradients."""

    def exiting(self, status: object) -> None:
        """``sys.exit`` was called, by any thread; it may be caught."""

    def after_fork(self) -> bool:
        """Return whether to go on listening in a forked child, in which this is called."""


_listeners: tuple[Listener, ...] = ()
_patches: list[Patch | AddedHook] = []
"""Those that are applied."""
_stepping: dict[int, tuple[int, weakref.ref[Optimizer]]] = {}
"""The optimizers in the middle of a step, by their ids, each with the id of the frame of torch's outermost wrapper."""
_norm_type: ContextVar[float] = ContextVar("_norm_type", default=2.0)
"""Which norm ``clip_grad_norm_`` takes; whoever clips by a norm of his own is believed to take torch's usual one."""
_follows_forks = False


def listen(listener: Listener) -> None:
    """Add a listener; the first one sets the hooks."""
    global _listeners
    if not _listeners:
        _set_hooks()
    _listeners = (*_listeners, listener)


def leave(listener: Listener) -> None:
    """Remove a listener; the last one takes the hooks away. Idempotent."""
    global _listeners
    had = bool(_listeners)
    _listeners = tuple(other for other in _listeners if other is not listener)
    if had and not _listeners:
        _take_hooks_away()


def listeners() -> tuple[Listener, ...]:
    """Return the registered listeners."""
    return _listeners


def _after_fork() -> None:
    """Remove listeners in a forked child (a DataLoader worker): if it trains, it attaches an agent of its own."""
    global _listeners
    had = bool(_listeners)
    _listeners = tuple(listener for listener in _listeners if listener.after_fork())
    if had and not _listeners:
        _take_hooks_away()


def _set_hooks() -> None:
    global _follows_forks
    if not _follows_forks:
        _follows_forks = True
        os.register_at_fork(after_in_child=_after_fork)  # nothing takes it away; without listeners it does nothing
    for added in _step_hooks:
        _apply(added)
    _apply(weak_tensors.swap_patch)
    _apply(Patch(torch.autograd, "backward", _backward))
    _apply(Patch(sys, "exit", around(_exit)))
    _apply(Patch(torch.amp.GradScaler, "__init__", around(_make_scaler)))
    _apply(Patch(torch.amp.GradScaler, "scale", around(_scale)))
    _find_scalers(torch.amp.GradScaler)
    _apply(Patch(torch.amp.GradScaler, "step", around(_scaler_step)))
    _apply(Patch(Optimizer, "zero_grad", _zero_grad))
    _apply(Patch(nn.Module, "zero_grad", _zero_grad))
    fsdp1 = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp1 is not None:
        _apply(Patch(fsdp1.FullyShardedDataParallel, "clip_grad_norm_", around(_clip_flat)))
    _apply(inside_no_grad(clip_grad.clip_grad_value_, around(_clip_by_value)))
    _apply(inside_no_grad(clip_grad.clip_grad_norm_, _note_norm_type))
    _apply(inside_no_grad(clip_grad._clip_grads_with_norm_, _clip_by_norm))


def _apply(patch: Patch | AddedHook) -> None:
    patch.apply()
    _patches.append(patch)


def _take_hooks_away() -> None:
    while _patches:
        _patches.pop().undo()
    _stepping.clear()
    weak_tensors.drop_all()


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    # A compiled step must not be traced into the agent: it breaks the graph around the hooks instead.
    if torch.compiler.is_compiling() or compiler() is not None:
        return cast("Arguments | None", _before_step_untraced(optimizer, args, kwargs))
    for listener in _listeners:
        if not listener.ignores(optimizer):
            break
    else:
        return None
    caller: FrameType | None = sys._getframe(1)  # noqa: SLF001
    if caller is not None and caller.f_code is not _STEP_WRAPPER:
        caller = _step_wrapper(caller)
    outer = None
    if _stepping and caller is not None:
        above = _wrappers_above(caller)
        if _stepping.get(id(optimizer), (0, None))[0] in above:
            return None  # a subclass called ``super().step()``: the outer step was announced
        # A step that raised never announced its end: where its frame was another one may be now.
        for known in [known for known, (frame, _) in list(_stepping.items()) if frame == id(caller)]:
            _stepping.pop(known, None)
        around = [(above.index(frame), other()) for frame, other in list(_stepping.values()) if frame in above]
        outer = min(around, key=itemgetter(0))[1] if around else None
    _stepping[id(optimizer)] = id(caller), weakref.ref(optimizer)
    changed = None
    for listener in _listeners:
        answer = listener.before_step(optimizer, args, kwargs, outer)
        if answer is not None:
            changed = args, kwargs = answer
    return changed


def _after_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or compiler() is not None:
        _after_step_untraced(optimizer, _args, _kwargs)
        return
    if id(optimizer) not in _stepping:
        return
    caller: FrameType | None = sys._getframe(1)  # noqa: SLF001
    if caller is not None and caller.f_code is not _STEP_WRAPPER:
        caller = _step_wrapper(caller)
    if _stepping.get(id(optimizer), (0, None))[0] != id(caller):
        return
    del _stepping[id(optimizer)]
    for listener in _listeners:
        listener.after_step(optimizer)


_before_step_untraced: Final = torch.compiler.disable(_before_step)
_after_step_untraced: Final = torch.compiler.disable(_after_step)
_step_hooks: Final = (
    AddedHook(sys.modules[Optimizer.__module__], "_global_optimizer_pre_hooks", _before_step),
    AddedHook(sys.modules[Optimizer.__module__], "_global_optimizer_post_hooks", _after_step),
)


def _step_wrapper(frame: FrameType | None) -> FrameType | None:
    """Return the frame of torch's wrapper of one ``step``, at or above ``frame``; None where the step is compiled."""
    for _ in range(8):
        if frame is None or frame.f_code is _STEP_WRAPPER:
            return frame
        frame = frame.f_back
    return None


def _wrappers_above(frame: FrameType) -> list[int]:
    """Return the ids of the frames of steps within which a step was called, the innermost first."""
    code, above = frame.f_code, frame.f_back
    found = []
    while above is not None:
        if above.f_code is code:
            found.append(id(above))
        above = above.f_back
    return found


def _backward(original: Function, active: list[bool], aside: Function) -> Function:
    dispatches = "has_torch_function" in getattr(getattr(original, "__code__", None), "co_names", ())

    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not active or torch.compiler.is_compiling() or compiler() is not None:
            return aside(tensors, grad_tensors, *args, **kwargs)
        if isinstance(tensors, Tensor):
            several = [tensors]
            losses = several if tensors.numel() == 1 else []
        else:
            tensors, several = _listed(tensors)
            losses = [tensor for tensor in several if tensor.numel() == 1]
        if dispatches and torch.overrides.has_torch_function(several):  # within a mode, torch calls this again
            return original(tensors, grad_tensors, *args, **kwargs)
        if grad_tensors is not None:
            grad_tensors = tuple(grad_tensors) if isinstance(grad_tensors, Iterator) else grad_tensors
            losses = _weighted(several, grad_tensors)
        listening, noted = _listeners, []
        for listener in listening:
            noted.append(listener.before_backward(several, losses))  # noqa: PERF401 -- a comprehension is a call
        try:
            result = original(tensors, grad_tensors, *args, **kwargs)
        except BaseException:
            for listener in listening:
                listener.after_backward(losses, None, retained=False)
            raise
        retained = bool(args[0] if args else kwargs.get("retain_graph")) or bool(kwargs.get("create_graph"))
        for listener, before in zip(listening, noted, strict=True):
            listener.after_backward(losses, before, retained)
        return result

    return backward


def _weighted(tensors: Sequence[Tensor], gradients: Tensor | Iterable[Tensor | None]) -> list[Tensor]:
    """Return the losses among tensors that are differentiated with gradients of their own: each times its gradient.

    Pipelines give None, which stands for 1.
    """
    several = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    if len(tensors) != len(several):
        return []  # some have none: which ones does not show
    try:
        with torch.enable_grad():  # the graph tells whether the loss was scaled, and whose it is
            return [
                tensor if given is None else tensor * given.detach()
                for tensor, given in zip(tensors, several, strict=True)
                if tensor.numel() == 1 and (given is None or given.numel() == 1)
            ]
    except RuntimeError:  # the pass itself will say what is wrong with them
        return []


def _listed(tensors: Iterable[Any]) -> tuple[Iterable[Any], list[Tensor]]:
    """Return the argument as something that can be iterated over again, and the tensors in it."""
    if isinstance(tensors, Iterator):
        tensors = tuple(tensors)
    return tensors, [tensor for tensor in tensors if isinstance(tensor, Tensor)]


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
        patched = any(patch.owner is own and patch.name == "scale" for patch in _patches)
        if "scale" in vars(own) and not patched:
            _apply(Patch(own, "scale", around(_scale)))
        _find_scalers(own)


def _scaler_step(original: Callable[..., Any], scaler: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    result = original(scaler, optimizer, *args, **kwargs)
    if scaler.is_enabled():
        for listener in _listeners:
            listener.after_scaler_step(scaler, optimizer)
    return result


def _zero_grad(original: Function, active: list[bool], aside: Function) -> Function:
    def zero_grad(owner: Optimizer | nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not active or torch.compiler.is_compiling() or compiler() is not None:
            return aside(owner, *args, **kwargs)
        result = original(owner, *args, **kwargs)
        for listener in _listeners:
            listener.after_zero_grad(owner)
        return result

    return zero_grad


def _note_norm_type(original: Function, active: list[bool], aside: Function) -> Function:
    """Return a ``clip_grad_norm_`` that tells ``_clip_by_norm``, which torch calls inside, the norm type."""

    def clip_grad_norm_(
        parameters: Any, max_norm: float | Tensor, norm_type: Any = 2.0, *args: Any, **kwargs: Any
    ) -> Any:
        if not active or torch.compiler.is_compiling() or compiler() is not None:
            return aside(parameters, max_norm, norm_type, *args, **kwargs)
        if not isinstance(norm_type, Tensor) and norm_type == _norm_type.get():
            return original(parameters, max_norm, norm_type, *args, **kwargs)
        noted = _norm_type.set(norm_type)
        try:
            return original(parameters, max_norm, norm_type, *args, **kwargs)
        finally:
            _norm_type.reset(noted)

    return clip_grad_norm_


def _clip_flat(original: Callable[..., Any], module: Any, max_norm: Any, norm_type: Any = 2.0) -> Any:
    """Call FSDP1's own ``clip_grad_norm_``, which joins the norm over its ranks by itself and only then tells it."""
    total_norm = original(module, max_norm, norm_type)
    if any(handle.uses_sharded_strategy for handle in module._all_handles):  # noqa: SLF001 -- else torch's was called
        several = list(module.parameters())
        for listener in _listeners:
            if listener.before_norm_clip(several, total_norm, max_norm, float(norm_type), done=True):
                listener.after_norm_clip(several)
    return total_norm


def _clip_by_norm(original: Function, active: list[bool], aside: Function) -> Function:
    def clip_grads_with_norm_(
        parameters: Any, max_norm: float | Tensor, total_norm: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not active or torch.compiler.is_compiling() or compiler() is not None:
            return aside(parameters, max_norm, total_norm, *args, **kwargs)
        several = parameters if type(parameters) is list else _as_list(parameters)
        norm_type, asked = float(_norm_type.get()), []
        for listener in _listeners:
            if listener.before_norm_clip(several, total_norm, max_norm, norm_type):
                asked.append(listener)  # noqa: PERF401 -- a comprehension is a call
        result = original(several, max_norm, total_norm, *args, **kwargs)
        for listener in asked:
            listener.after_norm_clip(several)
        return result

    return clip_grads_with_norm_


def _as_list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _clip_by_value(original: Callable[..., Any], parameters: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
    several = _as_list(parameters)
    for listener in _listeners:
        listener.before_value_clip(several)
    return original(several, *args, **kwargs)
