"""FSDP1 (``FullyShardedDataParallel``): where the parameters lie that it has flattened and cut into shards.

With ``use_orig_params=True`` each parameter of the model is there outside of the passes, as a vector of those of its
elements that lie on this rank; within them, views on whole parameters are in its place.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from torch import Tensor, distributed, nn

_MODULE: Final = "torch.distributed.fsdp.fully_sharded_data_parallel"


class FlatParameter(NamedTuple):
    """A parameter that FSDP1 has cut into shards."""

    parameter: Tensor
    """This rank's elements, one dim."""
    name: str
    """Qualified name within the model."""
    owner: nn.Module
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    ranks: tuple[int, ...]
    """Global ranks that hold its shards, ascending."""
    first: int
    """The first global rank that holds the same shard as this one."""
    peers: tuple[int, ...]
    """Global ranks that hold shards or copies of them, as far as this rank knows."""


def wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the FSDP1 modules in a model that shard anything, each with its name."""
    module = sys.modules.get(_MODULE)
    if module is None:
        return
    for path, inner in model.named_modules():
        if isinstance(inner, module.FullyShardedDataParallel) and inner.sharding_strategy.name != "NO_SHARD":
            yield path, inner


def flat_parameters(model: nn.Module) -> Iterator[FlatParameter]:
    """Yield the parameters of a model that FSDP1 has cut into shards with ``use_orig_params=True``."""
    for path, wrapper in wrappers(model):
        handle = getattr(wrapper, "_handle", None)
        if handle is None or not wrapper._use_orig_params:  # noqa: SLF001
            continue
        ranks = tuple(sorted(distributed.get_process_group_ranks(handle.process_group)))
        between = getattr(wrapper, "_inter_node_pg", None)
        copies = [distributed.get_rank()] if between is None else distributed.get_process_group_ranks(between)
        flat = handle.flat_param
        for parameter, info, shape in zip(flat._params, flat._param_infos, flat._shapes, strict=True):  # noqa: SLF001
            name = ".".join(part for part in (path, info.module_name, info.param_name) if part)
            peers = tuple(sorted({*ranks, *copies}))
            yield FlatParameter(parameter, name, info.module, tuple(shape), ranks, min(copies), peers)


def uses_fsdp1(models: Iterable[nn.Module]) -> bool:
    """Return whether FSDP1 has cut any of the models into shards, with or without ``use_orig_params``."""
    return any(_is_flattened(model) for model in models)


def _is_flattened(model: nn.Module) -> bool:
    if any(True for _ in wrappers(model)):
        return True
    module = sys.modules.get(_MODULE)
    if module is None or any(isinstance(inner, module.FullyShardedDataParallel) for inner in model.modules()):
        return False
    return any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters())


def are_shards(tensors: Iterable[Tensor]) -> bool:
    """Return whether some parameters are shards of FSDP1. Outside of the passes it leaves vectors of all of them."""
    flat = [tensor for tensor in tensors if getattr(tensor, "_fsdp_flattened", False)]
    return bool(flat) and all(tensor.dim() < 2 for tensor in flat)


def flat_reason(models: Iterable[nn.Module]) -> str:
    """Return why what FSDP1 has flattened cannot be measured; empty where it can."""
    for model in models:
        found = [wrapper for _, wrapper in wrappers(model)]
        if any(not wrapper._use_orig_params for wrapper in found):  # noqa: SLF001
            return (
                "FullyShardedDataParallel (FSDP1) without use_orig_params=True hides which parameters it holds: "
                "pass use_orig_params=True, or use fully_shard (FSDP2)"
            )
        if not found and _is_flattened(model):
            return (
                "the model lies inside of FullyShardedDataParallel (FSDP1): give attach() the module that it returns, "
                "or use fully_shard (FSDP2)"
            )
    return ""
