"""Finds the parameters of models: their names, the units of each, and the type of the module that owns it."""

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradwatch import wire
from gradwatch.hooks.weak_tensors import WeakTensor, weak
from gradwatch.model.flat_parameters import FlatParameter, flat_parameters
from gradwatch.model.readability import reason_of, unreadable_reason
from gradwatch.norms.tensor_spec import MOST_UNITS, TensorSpec, UnitAxis, local_part, spec_of
from gradwatch.settings import LONGEST_NAME

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """Describes a watched parameter. The parameter is referenced weakly: the agent never keeps a model alive."""

    name: str
    parameter: WeakTensor
    shape: tuple[int, ...]
    dtype: str
    units: int
    trainable: bool
    kind: str
    """Type of the module that owns it."""
    axis: UnitAxis
    groups: int
    unreadable: str = ""
    """Why it cannot be measured; empty if it can."""

    def to_wire(self, depth: int) -> wire.Parameter:
        """Return the parameter in the form in which it is registered on the server."""
        return wire.Parameter(
            name=shorten_name(self.name),
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

    def judged(self) -> "ParameterInfo":
        """Return the same parameter with the reason why it cannot be measured, if it cannot."""
        parameter = self.parameter()
        if parameter is None or self.unreadable:
            return self
        reason = unreadable_reason(parameter, self.axis, self.groups)
        return replace(self, unreadable=reason) if reason else self

    def as_experts(self) -> "ParameterInfo":
        """Return the same parameter as the stacked weights of several experts: each row of each expert is a unit."""
        return replace(self, axis="experts", units=math.prod(self.shape[:2]) if math.prod(self.shape) else 0)

    def with_bounded_units(self) -> "ParameterInfo":
        """Return the same parameter as one unit where it has more than ``MOST_UNITS`` units on all ranks together."""
        units = math.prod(self.shape) // max(math.prod(self.shape[1:]), 1) if self.axis == "rows" else self.units
        return replace(self, axis="whole", units=1) if units > MOST_UNITS else self

    def spec(self, tensor: Tensor) -> TensorSpec:
        """Return the specification of ``tensor``, which is this parameter or its gradient."""
        return spec_of(tensor, self.axis, self.groups)


def shorten_name(name: str) -> str:
    """Return a name that the server accepts; one that is too long is replaced by a checksum and its end."""
    if len(name) <= LONGEST_NAME:
        return name
    checksum = f"{zlib.crc32(name.encode('utf-8', 'replace')):08x}~"
    return checksum + name[len(checksum) - LONGEST_NAME :]


def find_parameters(models: Sequence[nn.Module]) -> Iterator[ParameterInfo]:
    """Yield every parameter once in the order of registration; a tied parameter has its first name.

    A parameter of a lazy module has no shape before the first forward pass, and is left out until then. Where FSDP2 has
    put an unsharded parameter in the place of a sharded one, for the time of a pass, the sharded one is meant.
    """
    seen: set[int] = set()
    sharded_of = {id(unsharded): sharded for sharded, unsharded, _ in unsharded_parameters(models)}
    for place, model in enumerate(models):
        prefix = f"{place}." if len(models) > 1 else ""
        by_path: dict[str, nn.Module] = {}
        flat = {id(each.parameter): each for each in flat_parameters(model)}
        for path, module in without_data_parallel(model).named_modules():
            by_path[path] = module
            for name, registered in module.named_parameters(recurse=False):
                parameter = sharded_of.get(id(registered), registered)
                if id(parameter) in flat:
                    yield from _take_flat(prefix, flat.pop(id(parameter)), seen)
                if id(parameter) in seen or is_lazy(parameter):
                    continue
                seen.add(id(parameter))
                full_name = _WRAPPERS.sub("", f"{prefix}{path}.{name}" if path else f"{prefix}{name}")
                yield _describe(full_name, parameter, _owner(path, by_path))
        for each in flat.values():  # in a pass, views are in the place of the parameters
            yield from _take_flat(prefix, each, seen)


def _take_flat(prefix: str, flat: FlatParameter, seen: set[int]) -> Iterator[ParameterInfo]:
    """Yield a parameter of FSDP1 unless it was seen: its shards are cut through its units, so it counts as one."""
    if id(flat.parameter) not in seen:
        seen.add(id(flat.parameter))
        described = _describe(_WRAPPERS.sub("", prefix + flat.name), flat.parameter, flat.owner)
        yield replace(described, shape=flat.shape, axis="whole", groups=1, units=1)


def parameters_of(models: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters of models, the sharded ones of FSDP2 wherever it has others in their place."""
    several = list(models)
    for model in several:
        yield from (flat.parameter for flat in flat_parameters(model))
    sharded_of = {id(unsharded): sharded for sharded, unsharded, _ in unsharded_parameters(several)}
    for model in several:
        for parameter in model.parameters():
            yield sharded_of.get(id(parameter), parameter)


def _owner(path: str, by_path: dict[str, nn.Module]) -> nn.Module:
    """Return the module whose type decides the units: for a parametrization the module that has the parameter."""
    module = by_path[path]
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return by_path[f".{path}".rpartition(".parametrizations.")[0][1:]]
    return module


def _describe(name: str, parameter: Tensor, owner: nn.Module) -> ParameterInfo:
    shape: tuple[int, ...]
    axis: UnitAxis
    reason = ""
    try:
        axis, groups = _axis(parameter, owner)
        shape = tuple(map(int, parameter.shape))
        units = spec_of(local_part(parameter), axis, groups).units
    except Exception as error:  # a nested tensor has no shape, and raises errors of many kinds
        axis, groups, shape, units, reason = "whole", 1, (), 1, reason_of(error)
    return ParameterInfo(
        name=name,
        parameter=weak(parameter),
        shape=shape,
        dtype=str(parameter.dtype).removeprefix("torch."),
        units=units,
        trainable=parameter.requires_grad,
        kind=type(owner).__name__,
        axis=axis,
        groups=groups,
        unreadable=reason,
    )


def _axis(parameter: Tensor, owner: nn.Module) -> tuple[UnitAxis, int]:
    """Return the axis of a parameter's units, and its groups."""
    if parameter.dim() < 2 or not (parameter.is_floating_point() or parameter.is_complex()):
        return "whole", 1  # integers are packed weights, whose rows mean nothing
    if isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "transposed", owner.groups
    if type(owner).__name__.endswith("Norm"):
        return "whole", 1
    return "rows", 1


def names_and_parameters(infos: Sequence[ParameterInfo]) -> tuple[list[str], list[Tensor]]:
    """Return names and parameters; an empty tensor stands for a parameter that no longer exists."""
    parameters = [info.parameter() for info in infos]
    return (
        [info.name for info in infos],
        [torch.empty(0, device="cpu") if parameter is None else parameter for parameter in parameters],
    )


def without_data_parallel(model: nn.Module) -> nn.Module:
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


def unsharded_parameters(models: Iterable[nn.Module]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield each sharded parameter of FSDP2 with its unsharded parameter, which is in the graph of the loss.

    The third item tells whether the unsharded parameter has gradients that were not reduced after their backward pass.
    """
    for module in (module for model in models for module in model.modules()):
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for sharded in (sharded for group in groups for sharded in getattr(group, "fsdp_params", ())):
            unsharded = getattr(sharded, "_unsharded_param", None)
            if unsharded is not None:
                accumulated = getattr(sharded, "unsharded_accumulated_grad", None)
                yield sharded.sharded_param, unsharded, unsharded.grad is not None or accumulated is not None
