"""Finding the origin of the first non-finite number: the module that first produced a NaN or an infinity.

A loss that is not finite makes every gradient non-finite at once, and the next step every weight, so that the origin
has to be found before that. On the CPU the graph of the loss still holds the tensors that the operators saved in the
forward pass; they are checked from the input on. On other devices, and where reading the saved tensors would run
somebody's hooks (activation checkpointing computes them anew, offloading may hand a tensor out only once), forward
hooks flag the outputs of the next steps without waiting for the device. They help only while the weights are finite.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gradwatch import wire
from gradwatch.hooks.autograd_graph import Node, inputs, inputs_first, leaf, roots, walk
from gradwatch.hooks.module_outputs import FiniteFlags, OutputHooks
from gradwatch.model.discovery import is_compiled
from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.tensor_spec import local_part
from gradwatch.norms.transfer import is_finite
from gradwatch.statistics import MISSING
from gradwatch.steps.state import StepRecord

_EVERY_STEPS: Final = 100
"""Steps from one search to the next."""
_MOST_SHOWN: Final = 5
"""Parameters whose names an event tells."""
_HOOKED_STEPS: Final = 3
"""Steps for which the forward hooks stay."""
_ELEMENTWISE: Final = ("MulBackward", "AddBackward", "SubBackward", "DivBackward", "AddcmulBackward", "PowBackward")
_LAYOUT_ONLY: Final = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "ToCopyBackward")
"""Operators that a parameter may pass on its way to the operator that uses it."""

ModuleOf = Callable[[Tensor], str | None]
"""Returns the name of the module that owns a parameter; None for any other tensor."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The module that the first non-finite number came from."""

    module: str
    """Its qualified name; empty: the loss itself."""
    message: str

    def event(self, step: int, at: float) -> wire.Event:
        """Return the event that reports it; ``at`` is in Unix seconds."""
        return wire.Event(step=step, at=at, kind="nonfinite_module", message=self.message, parameter=self.module)


class OriginFinder:
    """Looks for the origin of a non-finite loss, in its graph or with forward hooks over the next steps.

    Args:
        parameters: the parameters that are watched.
    """

    def __init__(self, parameters: ParameterRegistry) -> None:
        self._parameters = parameters
        self._next_search = 0
        """The first step at which the next search may start."""
        self._hooks: OutputHooks | None = None
        self._hooked_steps_left = 0
        self._hooks_wanted = False
        self.is_active = False
        """Whether ``finish_step`` has something to do."""

    def search_graph(self, losses: Sequence[Tensor], originals: Sequence[Tensor], step: int) -> wire.Event | None:
        """Search the graph of losses of which at least one is not finite; where it does not tell, ask for hooks.

        Args:
            losses: tensors of one element on the CPU, before their backward pass.
            originals: the losses before a loss scaler multiplied them, as far as it did.
            step: number of the last step.
        """
        if step < self._next_search:
            return None
        if originals and all(map(is_finite, originals)):
            return None  # the loss scale overflowed, and the scaler will lower it
        self._next_search = step + _EVERY_STEPS
        for watched in self._parameters.watched:
            parameter = watched.parameter.reference()
            if parameter is None or watched.unreadable:
                continue
            # A check of a whole DTensor would be a collective.
            if not bool(torch.isfinite(local_part(parameter.detach())).all().numpy().item()):
                return None  # the origin lies in an earlier step
        if self._parameters.sharded:
            self._parameters.note_unsharded()  # the graph holds those that FSDP puts in the place of sharded ones
        origin = origin_in_graph(losses, self._module_of)
        self._hooks_wanted = origin is None
        self.is_active |= self._hooks_wanted
        return None if origin is None else origin.event(step + 1, time.time())

    def _module_of(self, tensor: Tensor) -> str | None:
        index = self._parameters.find(tensor)
        return None if index is None else self._parameters.watched[index].module

    def request_hooks(self, step: int) -> None:
        """Hook the next steps: something is not finite at ``step``, and no graph tells where it began."""
        if step >= self._next_search:
            self._next_search = step + _EVERY_STEPS
            self._hooks_wanted = self.is_active = True

    def finish_step(self, record: StepRecord) -> None:
        """Give a finished step the flags of the hooks; set hooks that were asked for, remove them after some steps."""
        if self._hooks is not None:
            record.seen = self._hooks.take()
            self._hooked_steps_left -= 1
            if not self._hooked_steps_left:
                self._hooks.close()
                self._hooks = None
        elif self._hooks_wanted:
            self._hooks_wanted = False
            models = self._parameters.models
            if not any(map(is_compiled, models)):
                self._hooks = OutputHooks(models)
                self._hooked_steps_left = _HOOKED_STEPS
        self.is_active = self._hooks is not None or self._hooks_wanted

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        if self._hooks is not None:
            self._hooks.close()


class NonfiniteSteps:
    """Tells of the first step on an accelerator that is not finite what can be told without waiting for the device.

    By the time the host learns of it the weights are not finite either, and no forward pass shows where it began.
    """

    def __init__(self) -> None:
        self.names: Sequence[str] = ()
        """Names of the parameters."""
        self._was_bad = False

    def look(self, record: StepRecord, trail: Mapping[str, float], counts: wire.Vector | None) -> wire.Event | None:
        """Return the event of a step that is not finite where the last one was.

        Args:
            record: the step; its numbers have been read.
            trail: its scalars.
            counts: non-finite elements or units of each gradient, shape (parameters,); None: it was not sampled.
        """
        was_bad = self._was_bad
        numbers = [trail[name] for name in ("loss", "clip_norm") if name in trail]
        self._was_bad = not all(map(math.isfinite, numbers)) or (counts is not None and bool((counts > 0).any()))
        on_device = record.buffers is not None and record.buffers.is_on_device
        if was_bad or not self._was_bad or record.skipped or not on_device:
            return None
        text = "its gradients were not sampled" if counts is None else self._gradients(counts)
        text = f"the first step that is not finite: {text}; on an accelerator the module where this began cannot be "
        message = text + "told without waiting for the device"
        return wire.Event(step=record.step, at=record.at, kind="nonfinite_step", message=message)

    def _gradients(self, counts: wire.Vector) -> str:
        bad = [name for name, count in zip(self.names, counts.tolist(), strict=True) if count > 0]
        more = f" and {len(bad) - _MOST_SHOWN} more" if len(bad) > _MOST_SHOWN else ""
        measured = int((counts != MISSING).sum())
        return f"{len(bad)} of {measured} gradients are not ({', '.join(bad[:_MOST_SHOWN]) or 'none'}{more})"


def origin_in_graph(losses: Sequence[Tensor], module_of: ModuleOf) -> Origin | None:
    """Return the origin of the first non-finite number according to the graphs of some losses.

    Args:
        losses: on the CPU, before their backward pass; all weights are finite.
        module_of: names the module of a parameter.

    Returns:
        None where the graph does not tell, or must not be read.
    """
    watched = False
    for node in inputs_first(roots(losses)):
        parameter = leaf(node)
        watched |= parameter is not None and module_of(parameter) is not None
        if _has_unpack_hook(node):
            return None
        if not all(map(_all_finite, _saved_tensors(node))):
            return _origin_at(node, module_of)
    return Origin("", "its graph holds no number that is not finite") if watched else None


def origin_in_flags(flags: Sequence[FiniteFlags]) -> Origin | None:
    """Return the first module whose output, or else whose gradient, was not finite; the flags have been read."""
    last_finite = ""
    for entry in flags:
        if entry.kind == "gradient":
            continue
        if _holds(entry.finite):
            last_finite = entry.module
        elif not _holds(entry.weights_finite):
            return None
        elif _holds(entry.inputs_finite):
            return Origin(entry.module, "its output was not finite, its input and its weights were")
        elif last_finite:
            return Origin(last_finite, f"what was made of its result was not finite when it reached {entry.module}")
        else:
            return Origin(entry.module, "its input was not finite already: look at the data")
    for entry in flags:
        if not _holds(entry.finite):
            return Origin(entry.module, "the gradient that reached its output was not finite, while all outputs were")
    return None


def _holds(flag: float | None) -> bool:
    return flag is None or bool(flag)


def _origin_at(node: Node, module_of: ModuleOf) -> Origin | None:
    """Return the module around the first operator that was given, or produced, a non-finite number."""
    operator = node.name().removesuffix("0").removesuffix("Backward")
    own = [name for below in inputs(node) if (name := _owner(below, module_of)) is not None]
    before = _nearest_module([below for below in inputs(node) if _parameter_behind(below) is None], module_of)
    if own and node.name().startswith(_ELEMENTWISE):
        return Origin(own[0], f"{operator} took a number that is not finite")
    if before is not None:
        return Origin(before, f"what was made of its result was not finite when it reached {operator}")
    return Origin(own[0], f"the input of {operator} was not finite already: look at the data") if own else None


def _nearest_module(nodes: Sequence[Node], module_of: ModuleOf) -> str | None:
    """Return the module of the parameter that is the fewest operators away from ``nodes``."""
    owners = (_owner(below, module_of) for node in walk(nodes) for below in inputs(node))
    return next((owner for owner in owners if owner is not None), None)


def _owner(node: Node, module_of: ModuleOf) -> str | None:
    parameter = _parameter_behind(node)
    return None if parameter is None else module_of(parameter)


def _parameter_behind(node: Node) -> Tensor | None:
    """Return the parameter that reaches an operator through ``node`` unchanged or merely transposed."""
    while (parameter := leaf(node)) is None:
        below = inputs(node)
        if len(below) != 1 or not node.name().startswith(_LAYOUT_ONLY):
            return None
        node = below[0]
    return parameter


def _has_unpack_hook(node: Node) -> bool:
    """Return whether reading the saved tensors of a node would run somebody's code.

    Activation checkpointing would compute them anew, offloading might hand each out only once. On a version of torch
    that does not tell, every node counts as hooked.
    """
    return any(getattr(raw, "unpack_hook", raw) is not None for _, several in _raw_saved(node) for raw in several)


def _raw_saved(node: Node) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the attribute name and the packed values of everything that a node saved for its backward pass."""
    for name in dir(type(node)):
        if name.startswith("_raw_saved_"):
            try:
                raw = getattr(node, name)
            except RuntimeError:  # freed
                continue
            yield name.removeprefix("_raw"), raw if isinstance(raw, tuple) else (raw,)


def _saved_tensors(node: Node) -> Iterator[Tensor]:
    for name, _ in _raw_saved(node):
        try:
            # A function in Python (FSDP adds some) has them all in one attribute, whose name begins otherwise.
            saved = node.saved_tensors if name == "_saved_tensors" else getattr(node, name)
        except RuntimeError:  # changed in place since
            continue
        yield from (each for each in (saved if isinstance(saved, tuple) else (saved,)) if isinstance(each, Tensor))


def _all_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return True
    if not tensor.untyped_storage().nbytes():
        return True  # FSDP has freed a weight until its backward pass; weights are finite
    with torch.no_grad():
        return tensor.numel() == 0 or all(
            bool(torch.isfinite(bound).numpy().item()) for bound in torch.aminmax(tensor.detach())
        )
