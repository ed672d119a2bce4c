"""Clipping of sharded parameters (FSDP2, tensor parallelism): joins the norms of units that lie on several ranks.

A weight that is sharded along the dim of its units keeps each unit whole: nothing is sent for it. Vectors, and whole
tensors where a tensor is the unit, are split: each rank sums its squares, and one packed all-reduce adds the sums.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from gradwatch.norms.tensor_spec import UnitAxis

Granularity = Literal["unit", "tensor"]
"""What AGC clips as one: each unit, or each tensor."""

_UNIT_DIMS: dict[UnitAxis, tuple[int, ...]] = {"rows": (0,), "transposed": (1,), "experts": (0, 1), "whole": ()}

NormAllReduce = Callable[[Sequence[tuple[Tensor, Tensor]]], None]
"""Joins norms over ranks, in place. It gets the norms of gradients and of weights, for each buffer."""


@dataclass(frozen=True, slots=True)
class UnitSplit:
    """How the units of one tensor are split over ranks."""

    groups: tuple[Any, ...]
    """Process groups over which squares are added, one after the other."""
    norms: int
    """Number of norms on each of these ranks, empty shards included."""


def split_of(tensor: Tensor, axis: UnitAxis, groups: int, granularity: Granularity) -> UnitSplit | None:
    """Return how the units of a DTensor are split over ranks; None where each lies on one rank.

    Args:
        tensor: a parameter; any other tensor than a DTensor is not split.
        axis: axis of its units.
        groups: groups of a transposed convolution.
        granularity: ``unit``, or ``tensor`` where the whole tensor is one unit.

    Raises:
        NotImplementedError: the tensor is distributed in a way for which norms cannot be joined.
    """
    for placement in getattr(tensor, "placements", ()):
        if placement.is_partial():
            raise NotImplementedError(f"a tensor of shape {tuple(tensor.shape)} holds partial sums ({placement})")
    mesh_dims = dims_that_split(tensor, axis, granularity)
    if not mesh_dims:
        return None
    unit_dims = _unit_dims(tensor, axis, granularity)
    process_groups = [tensor.device_mesh.get_group(mesh_dim) for mesh_dim in mesh_dims]  # type: ignore[attr-defined]
    if axis == "transposed" and groups > 1 and unit_dims:
        raise NotImplementedError(
            f"a grouped transposed convolution of shape {tuple(tensor.shape)} is sharded across its units: exclude it"
        )
    local_shape = tensor.to_local().shape  # type: ignore[attr-defined]
    norms = 1
    for dim in unit_dims:
        norms *= local_shape[dim]
    return UnitSplit(tuple(process_groups), norms)


def dims_that_split(tensor: Tensor, axis: UnitAxis, granularity: Granularity) -> list[int]:
    """Return the dims of a DTensor's mesh along which its units are split; none for any other tensor."""
    unit_dims = _unit_dims(tensor, axis, granularity)
    sharded = ((place, shard_dim(placement)) for place, placement in enumerate(getattr(tensor, "placements", ())))
    return [place for place, dim in sharded if dim is not None and dim % tensor.dim() not in unit_dims]


def _unit_dims(tensor: Tensor, axis: UnitAxis, granularity: Granularity) -> tuple[int, ...]:
    """Return the dims of a tensor that tell its units apart; none where it is one unit."""
    return () if granularity == "tensor" or axis == "whole" or tensor.dim() < 2 else _UNIT_DIMS[axis]


def shard_dim(placement: Any) -> int | None:
    """Return the dim of a tensor that a placement of torch splits over ranks; None where it splits none.

    ``_StridedShard``, which FSDP2 leaves on top of tensor parallelism, is no ``Shard`` and denies ``is_shard()``.
    """
    if placement.is_replicate() or placement.is_partial():
        return None
    dim: int | None = getattr(placement, "dim", None)
    return dim


def norm_all_reduces(
    splits: Sequence[UnitSplit | None], places: Sequence[Mapping[int, range]], devices: Sequence[torch.device]
) -> list[NormAllReduce]:
    """Return the functions that join the norms of split tensors: one all-reduce for each process group.

    Args:
        splits: for each tensor, how its units are split.
        places: for each buffer, where the norms of each tensor lie; a tensor that is empty on this rank has none.
        devices: device of each buffer.
    """
    members: dict[int, tuple[Any, list[int]]] = {}
    for position, split in enumerate(splits):
        for group in split.groups if split is not None else ():
            members.setdefault(id(group), (group, []))[1].append(position)
    return [_all_reduce_of(group, positions, splits, places, devices) for group, positions in members.values()]


def _all_reduce_of(
    group: Any,
    positions: Sequence[int],
    splits: Sequence[UnitSplit | None],
    places: Sequence[Mapping[int, range]],
    devices: Sequence[torch.device],
) -> NormAllReduce:
    """Return the function that joins the norms of the tensors at ``positions`` over one process group."""
    offsets: dict[int, int] = {}
    total = 0
    for position in positions:
        offsets[position] = total
        split = splits[position]
        assert split is not None
        total += split.norms
    device = _device_of(group, devices[0])
    # For each buffer: indices of the norms in it, and indices of the same norms in the packed tensor.
    in_buffer, in_packed = [], []
    for place, own in zip(places, devices, strict=True):
        here = [position for position in positions if position in place]
        indices = [index for position in here for index in place[position]]
        in_buffer.append(torch.tensor(indices, dtype=torch.int64, device="cpu").to(own))
        packed_indices = [offsets[position] + k for position in here for k in range(len(place[position]))]
        in_packed.append(torch.tensor(packed_indices, dtype=torch.int64, device="cpu").to(device))

    def all_reduce(by_buffer: Sequence[tuple[Tensor, Tensor]]) -> None:
        packed = torch.zeros(2, total, dtype=torch.float64, device=device)
        for pair, source, target in zip(by_buffer, in_buffer, in_packed, strict=True):
            for row, norms in zip(packed, pair, strict=True):
                row.index_copy_(0, target, norms.index_select(0, source).to(device, torch.float64).square_())
        distributed.all_reduce(packed, group=group)
        packed.sqrt_()
        for pair, source, target in zip(by_buffer, in_buffer, in_packed, strict=True):
            for row, norms in zip(packed, pair, strict=True):
                norms.index_copy_(0, source, row.index_select(0, target).to(norms.device, norms.dtype))

    return all_reduce


def _device_of(group: Any, own: torch.device) -> torch.device:
    """Return the device on which a process group communicates: ``own`` where the group can."""
    known = list(getattr(group, "_device_types", ()))
    return own if not known or any(device.type == own.type for device in known) else known[0]
