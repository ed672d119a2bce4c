"""What one rank holds of the watched parameters: found on the training thread, told to the other ranks.

Which ranks hold the shards of a parameter is told in global ranks. Coordinates mean nothing to another rank: each
parameter may lie on a mesh of its own, and two ranks may have the same coordinates in different meshes.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from torch import Tensor, distributed, nn

from gradwatch import wire
from gradwatch.model.discovery import ParameterInfo, parameters_of
from gradwatch.model.flat_parameters import flat_parameters
from gradwatch.ranks.sharding import dims_that_split, shard_dim
from gradwatch.ranks.stages import stages_of_parameters

_STAGE_DIMS: Final = ("pp", "pipe", "pipeline", "stage", "pipeline_parallel")
"""Names of the dim of a mesh along which the stages of a pipeline lie."""


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """What one rank holds of one parameter."""

    ranks: tuple[int, ...] = ()
    """Global ranks that hold shards of the parameter, ascending; empty where this rank holds all of it."""
    first: int = 0
    """The first of those ranks that holds the same shard as this rank: it alone reports it."""
    split: bool = False
    """Whether units of the parameter lie on several ranks."""
    one_unit: bool = False
    """Whether the parameter is one unit."""
    stage: int | None = None
    """Stage of a pipeline that the parameter belongs to, as far as PyTorch says."""


class Holdings(msgspec.Struct, frozen=True):
    """What one rank holds of the run's parameters."""

    parameters: list[wire.Parameter]
    held: list[Holding]
    """One for each parameter."""
    peers: list[int]
    """Ranks on which the same model is trained, as PyTorch says; empty where it says nothing."""


@dataclass(frozen=True, slots=True)
class RegisteredParameters:
    """The parameters of the run as they are registered on the server."""

    watched: Sequence[ParameterInfo]
    depths: Sequence[int]
    held: Sequence[Holding] | None
    """What this rank holds; None where it measures alone. It is found where the parameters exist for certain: by the
    time the collector registers them, the training may be over and its tensors gone."""
    peers: Sequence[int] = ()

    def described(self) -> list[wire.Parameter]:
        """Return the parameters in the form in which they are registered on the server."""
        return [info.to_wire(self.depths[place]) for place, info in enumerate(self.watched)]

    def holdings(self) -> Holdings:
        """Return what this rank tells the others."""
        return Holdings(self.described(), list(self.held or ()), list(self.peers))


def holdings_of(watched: Sequence[ParameterInfo], models: Iterable[nn.Module], rank: int) -> list[Holding]:
    """Return what this rank holds of each parameter of the models."""
    stages = stages_of_parameters()
    flat = {id(each.parameter): each for model in models for each in flat_parameters(model)}
    found = []
    for info in watched:
        parameter = info.parameter()
        known = None if parameter is None else flat.get(id(parameter))
        if known is None:
            found.append(_holding(info, rank, stages))
        else:
            stage = stages.get(id(parameter))
            found.append(Holding(known.ranks, known.first, True, len(known.shape) < 2, stage))
    return found


def _holding(info: ParameterInfo, rank: int, stages: dict[int, int]) -> Holding:
    parameter = info.parameter()
    one_unit = info.axis == "whole" or len(info.shape) < 2
    stage = None if parameter is None else stages.get(id(parameter))
    mesh = None if parameter is None else getattr(parameter, "device_mesh", None)
    if parameter is None or mesh is None:
        return Holding(first=rank, one_unit=one_unit, stage=stage)
    # A rank outside of the mesh holds nothing of the parameter: the first rank of the mesh stands for it.
    coordinate = _coordinate(mesh, rank)
    placements = parameter.placements  # type: ignore[attr-defined]
    place = [
        0 if coordinate is None or shard_dim(placement) is None else coordinate[dim]
        for dim, placement in enumerate(placements)
    ]
    return Holding(
        ranks=tuple(sorted(mesh.mesh.flatten().tolist())),
        first=int(mesh.mesh[tuple(place)]),
        split=bool(dims_that_split(parameter, info.axis, "unit")),
        one_unit=one_unit,
        stage=_stage_in_mesh(mesh, rank) if stage is None else stage,
    )


def _coordinate(mesh: Any, rank: int) -> list[int] | None:
    """Return where a rank stands in a mesh; None where it is not in it."""
    places = np.argwhere(mesh.mesh.numpy() == rank)
    return places[0].tolist() if len(places) else None


def peers_of(models: Sequence[nn.Module], rank: int) -> list[int]:
    """Return the ranks on which PyTorch trains the same models as on this one; empty where it does not say.

    These are the ranks of the meshes that parameters are sharded over, those of the data-parallel wrappers, and the
    other ranks of a named mesh that a parameter's mesh is a part of, but for those along a dim of pipeline stages.
    """
    found: set[int] = set()
    seen: set[int] = set()
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                found.update(distributed.get_process_group_ranks(module.process_group))
        for flat in flat_parameters(model):
            found.update(flat.peers)
    for mesh in (getattr(parameter, "device_mesh", None) for parameter in parameters_of(models)):
        if mesh is not None and id(mesh) not in seen:
            seen.add(id(mesh))
            found.update(_peers_in_mesh(mesh, rank))
    return sorted(found | {rank}) if found else []


def _root(mesh: Any) -> Any:
    """Return the mesh that a mesh was cut out of, itself where it was not; None where its dims have no names."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh  # noqa: SLF001
    return root if root is not None and getattr(root, "mesh_dim_names", None) else None


def _stage_dim(root: Any) -> int | None:
    names = [str(name).lower() for name in root.mesh_dim_names]
    return next((dim for dim, name in enumerate(names) if name in _STAGE_DIMS), None)


def _stage_in_mesh(mesh: Any, rank: int) -> int | None:
    root = _root(mesh)
    dim = None if root is None else _stage_dim(root)
    coordinate = None if dim is None else _coordinate(root, rank)
    return None if coordinate is None or dim is None else int(coordinate[dim])


def _peers_in_mesh(mesh: Any, rank: int) -> list[int]:
    root = _root(mesh)
    coordinate = None if root is None else _coordinate(root, rank)
    if coordinate is None:
        return list(mesh.mesh.flatten().tolist())
    dim = _stage_dim(root)
    ranks: Tensor = root.mesh if dim is None else root.mesh.select(dim, coordinate[dim])
    return [*mesh.mesh.flatten().tolist(), *ranks.flatten().tolist()]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is distributed over ranks by PyTorch (DTensor), so that each may hold only a shard."""
    return any(shard_dim(placement) is not None for placement in getattr(tensor, "placements", ()))


def is_partial(norm: Tensor) -> bool:
    """Return whether a norm is this rank's part of the whole norm."""
    return any(placement.is_partial() for placement in getattr(norm, "placements", ()))


def ranks_of_norm(norm: Tensor) -> tuple[tuple[int, ...], bool]:
    """Return the global ranks whose parts make up a partial norm, ascending, and whether this rank repeats a part."""
    mesh, placements = norm.device_mesh, norm.placements  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate() or [0] * len(placements)
    repeats = any(coordinate[dim] for dim, placement in enumerate(placements) if not placement.is_partial())
    return tuple(sorted(mesh.mesh.flatten().tolist())), repeats


def uses_pipelining() -> bool:
    """Return whether the program has made stages of a pipeline with ``torch.distributed.pipelining``."""
    return "torch.distributed.pipelining.stage" in sys.modules and bool(stages_of_parameters())
