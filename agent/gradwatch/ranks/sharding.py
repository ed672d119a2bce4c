"""Units that lie on several ranks (FSDP2, tensor parallelism): one packed all-reduce joins their norms.

A weight that is sharded along the dim of its units keeps each unit whole: nothing is sent for it. Vectors, and whole
tensors where a tensor is the unit, are split: each rank sums its squares, and the sums are added over the ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from gradwatch.norms.layout import Axis

Granularity = Literal["unit", "tensor"]

_UNIT_DIMS: dict[Axis, tuple[int, ...]] = {"rows": (0,), "transposed": (1,), "experts": (0, 1), "whole": ()}

Join = Callable[[Sequence[tuple[Tensor, Tensor]]], None]


@dataclass(frozen=True, slots=True)
class Split:
    """How the norms of one tensor lie on several ranks."""

    groups: tuple[Any, ...]
    """Process groups over which its squares are added, one after the other."""
    norms: int
    """Number of its norms on each of these ranks, empty shards included."""


def split_of(tensor: Tensor, axis: Axis, groups: int, granularity: Granularity) -> Split | None:
    """Return how the norms of a distributed tensor lie on several ranks; None where each lies on one.

    Args:
        tensor: a parameter; anything but a DTensor is not split.
        axis: where its units lie.
        groups: of a transposed convolution.
        granularity: ``unit``, or ``tensor`` where the whole tensor is one.

    Raises:
        NotImplementedError: it is distributed in a way that norms cannot be joined for.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return None
    whole = granularity == "tensor" or axis == "whole" or tensor.dim() < 2
    kept = () if whole else _UNIT_DIMS[axis]
    split = []
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial():
            raise NotImplementedError(f"a tensor of shape {tuple(tensor.shape)} holds partial sums ({placement})")
        if placement.is_shard() and placement.dim % tensor.dim() not in kept:
            split.append(tensor.device_mesh.get_group(mesh_dim))  # type: ignore[attr-defined]
    if not split:
        return None
    if axis == "transposed" and groups > 1 and not whole:
        raise NotImplementedError(
            f"a grouped transposed convolution of shape {tuple(tensor.shape)} is sharded across its units: exclude it"
        )
    local = tensor.to_local().shape  # type: ignore[attr-defined]
    norms = 1
    for dim in kept:
        norms *= local[dim]
    return Split(tuple(split), norms)


def joins(
    splits: Sequence[Split | None], places: Sequence[Mapping[int, range]], devices: Sequence[torch.device]
) -> list[Join]:
    """Return what joins the norms of split tensors, one all-reduce for each process group.

    Args:
        splits: of each tensor.
        places: for each arena, where the norms of each tensor lie; a tensor that is empty on this rank has none.
        devices: of each arena.
    """
    members: dict[int, tuple[Any, list[int]]] = {}
    for position, split in enumerate(splits):
        for group in split.groups if split is not None else ():
            members.setdefault(id(group), (group, []))[1].append(position)
    return [_join(group, positions, splits, places, devices) for group, positions in members.values()]


def _join(
    group: Any,
    positions: Sequence[int],
    splits: Sequence[Split | None],
    places: Sequence[Mapping[int, range]],
    devices: Sequence[torch.device],
) -> Join:
    slots: dict[int, int] = {}
    total = 0
    for position in positions:
        slots[position] = total
        split = splits[position]
        assert split is not None
        total += split.norms
    device = _device_for(group, devices[0])
    sources, targets = [], []
    for place, own in zip(places, devices, strict=True):
        here = [position for position in positions if position in place]
        sources.append(torch.tensor([at for position in here for at in place[position]], dtype=torch.int64).to(own))
        slot = [slots[position] + offset for position in here for offset in range(len(place[position]))]
        targets.append(torch.tensor(slot, dtype=torch.int64).to(device))

    def join(measured: Sequence[tuple[Tensor, Tensor]]) -> None:
        packed = torch.zeros(2, total, dtype=torch.float64, device=device)
        for pair, source, target in zip(measured, sources, targets, strict=True):
            for row, norms in zip(packed, pair, strict=True):
                row.index_copy_(0, target, norms.index_select(0, source).to(device, torch.float64).square_())
        distributed.all_reduce(packed, group=group)
        packed.sqrt_()
        for pair, source, target in zip(measured, sources, targets, strict=True):
            for row, norms in zip(packed, pair, strict=True):
                norms.index_copy_(0, source, row.index_select(0, target).to(norms.device, norms.dtype))

    return join


def _device_for(group: Any, own: torch.device) -> torch.device:
    """Return where the ranks of a group put numbers together: where they are, unless the group cannot do it there."""
    known = list(getattr(group, "_device_types", ()))
    return own if not known or any(device.type == own.type for device in known) else known[0]
