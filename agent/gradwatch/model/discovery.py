"""The parameters of a model: their names, their units, the modules that own them."""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradwatch import wire
from gradwatch.hooks.weak_tensors import Held, held
from gradwatch.norms.layout import MOST_UNITS, Axis, Spec, spec_of
from gradwatch.settings import LONGEST_NAME

_MOST_NODES: Final = 20_000
"""That are read of a graph; more could overflow the stack, see ``classifier``."""
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A parameter that is watched. It is held weakly: the agent never keeps a model alive."""

    name: str
    parameter: Held
    shape: tuple[int, ...]
    dtype: str
    units: int
    trainable: bool
    kind: str
    """Type of the owning module."""
    axis: Axis
    groups: int

    def described(self, depth: int) -> wire.Parameter:
        """Return the parameter as it is registered."""
        return wire.Parameter(
            name=shortened(self.name),
            shape=list(self.shape),
            dtype=self.dtype,
            depth=depth,
            units=self.units,
            trainable=self.trainable,
            kind=self.kind,
        )

    @property
    def module(self) -> str:
        """Return the qualified name of the module that owns it."""
        owner, parametrised, _ = self.name.partition(".parametrizations.")
        return owner if parametrised else owner.rpartition(".")[0]

    def of_experts(self) -> "Watched":
        """Return it as the stacked weights of several experts: each row of each is a unit."""
        return replace(self, axis="experts", units=math.prod(self.shape[:2]) if math.prod(self.shape) else 0)

    def bounded(self) -> "Watched":
        """Return it as one unit where it has more units than are told apart, on all ranks together."""
        units = math.prod(self.shape) // max(math.prod(self.shape[1:]), 1) if self.axis == "rows" else self.units
        return replace(self, axis="whole", units=1) if units > MOST_UNITS else self

    def spec(self, tensor: Tensor) -> Spec:
        """Return how ``tensor``, this parameter or its gradient, is reduced."""
        return spec_of(tensor, self.axis, self.groups)


def shortened(name: str) -> str:
    """Return a name that a server takes; of a longer one its end, behind what tells it from others that end so."""
    if len(name) <= LONGEST_NAME:
        return name
    mark = f"{zlib.crc32(name.encode('utf-8', 'replace')):08x}~"
    return mark + name[len(mark) - LONGEST_NAME :]


def walk(models: Sequence[nn.Module]) -> Iterator[Watched]:
    """Yield every parameter once, tied ones under their first name, in the order of registration.

    One of a lazy module, which has no shape before the first forward pass, is found when an optimizer steps it.
    """
    seen: set[int] = set()
    for place, model in enumerate(models):
        root = unwrapped(model)
        prefix = f"{place}." if len(models) > 1 else ""
        at: dict[str, nn.Module] = {}
        for path, module in root.named_modules():
            at[path] = module
            owner = at[f".{path}".rpartition(".parametrizations.")[0][1:]] if _is_parametrization(module) else module
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or is_lazy(parameter):
                    continue
                seen.add(id(parameter))
                yield watched(
                    _WRAPPERS.sub("", f"{prefix}{path}.{name}" if path else f"{prefix}{name}"), parameter, owner
                )


def _is_parametrization(module: nn.Module) -> bool:
    """Return whether a module holds what a parameter of another one is computed from: it lies there as that does."""
    return isinstance(module, nn.utils.parametrize.ParametrizationList)


def watched(name: str, parameter: Tensor, owner: nn.Module | None) -> Watched:
    """Return ``parameter`` under ``name``; its units follow the type of its owner."""
    axis, groups = _axis(parameter, owner)
    local_tensor = local(parameter)
    return Watched(
        name=name,
        parameter=held(parameter),
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        units=spec_of(local_tensor, axis, groups).units,
        trainable=parameter.requires_grad,
        kind=type(owner).__name__ if owner is not None else "",
        axis=axis,
        groups=groups,
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel and DistributedDataParallel, whose only child is named ``module``."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def is_compiled(model: nn.Module) -> bool:
    """Return whether ``torch.compile`` runs the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def compiled_leaves(losses: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the leaves that compiled graphs take in the graphs of some losses: any function may have been compiled."""
    known: set[Any] = set()
    waiting = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    while waiting and len(known) < _MOST_NODES:
        node = waiting.pop()
        if node in known:
            continue
        known.add(node)
        below = [node for node, _ in node.next_functions if node is not None]
        waiting += below
        if node.name() == "CompiledFunctionBackward":
            yield from (leaf.variable for leaf in below if hasattr(leaf, "variable"))


def gathered(models: Iterable[nn.Module]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield the sharded parameters of FSDP2 with what stands in for them while they are gathered, which graphs lead to.

    The third of each says whether that has collected gradients, of passes after which they were not reduced.
    """
    for module in (module for model in models for module in model.modules()):
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for sharded in (sharded for group in groups for sharded in getattr(group, "fsdp_params", ())):
            stand_in = getattr(sharded, "_unsharded_param", None)
            if stand_in is not None:
                collected = getattr(sharded, "unsharded_accumulated_grad", None)
                yield sharded.sharded_param, stand_in, stand_in.grad is not None or collected is not None


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor (no collective), any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = to_local() if to_local is not None else tensor
    return part


def _axis(parameter: Tensor, owner: nn.Module | None) -> tuple[Axis, int]:
    if parameter.dim() < 2 or not (parameter.is_floating_point() or parameter.is_complex()):
        return "whole", 1  # integers are packed weights, whose rows mean nothing
    if isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "transposed", owner.groups
    if type(owner).__name__.endswith("Norm"):
        return "whole", 1
    return "rows", 1


class ReadyOrder:
    """The order in which gradients become ready, learnt in the first backward passes: output first.

    It needs a hook on each parameter; they are removed when the order is known. A compiled model makes all its
    gradients ready at once, in an order that says nothing: it is not asked, and registration order is kept.
    """

    def __init__(self, parameters: Iterable[tuple[int, Tensor]]) -> None:
        self._ready: dict[int, int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for index, parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                register: Callable[[_Ready], torch.utils.hooks.RemovableHandle] = (
                    parameter.register_post_accumulate_grad_hook
                )
                self._handles.append(register(_Ready(self._ready, index)))

    @property
    def known(self) -> bool:
        """Return whether a backward pass was seen."""
        return bool(self._ready)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def depths(self, count: int) -> list[int]:
        """Return the depth of each of ``count`` parameters, 0 at the input."""
        return depths(list(self._ready), count)


class _Ready:
    """Notes its parameter the first time; at module level, so that a parameter carrying it can still be pickled."""

    def __init__(self, ready: dict[int, int], index: int) -> None:
        self._ready = ready
        self._index = index

    def __call__(self, _parameter: Tensor) -> None:
        self._ready.setdefault(self._index, len(self._ready))


def depths(ready: Sequence[int], count: int) -> list[int]:
    """Return the depth of each parameter from the order in which gradients became ready.

    A parameter without a gradient stands behind its predecessor in registration order.

    Args:
        ready: indices of parameters, the first ready first; each at most once.
        count: number of parameters.
    """
    if len(ready) < 2 or list(ready) == sorted(ready):
        return list(range(count))
    order = list(reversed(ready))
    place = {index: position for position, index in enumerate(order)}
    key: list[tuple[int, int]] = []
    last = -1
    for index in range(count):
        last = place.get(index, last)
        key.append((last, index if index not in place else -1))
    ranked = sorted(range(count), key=key.__getitem__)
    result = [0] * count
    for depth, index in enumerate(ranked):
        result[index] = depth
    return result
