"""The whole model: which rank reports what, worked out on rank 0 from what every rank says that it holds.

Parts of a parameter are added up only over the ranks that hold its shards, each shard once. Two sets of ranks hold
copies of a parameter where PyTorch says that they train the same model, and two parameters of the same name where it
says that they are stages of a pipeline. Where it says neither, the first set is reported and the others are refused.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch.model.discovery import shorten_name
from gradwatch.ranks.holdings import Holding, Holdings

Indices = NDArray[np.intp]
NOWHERE: Final = -1
"""The index of what is not reported."""


@dataclass(slots=True)
class WholeModel:
    """The parameters of all ranks. An index that was given to a parameter stays with it."""

    parameters: list[wire.Parameter] = field(default_factory=list)
    """As they are registered on the server."""
    reported: dict[int, Indices] = field(default_factory=dict)
    """Rank -> for each parameter it holds the index in the whole model, ``NOWHERE`` where another rank reports it."""
    held: dict[int, Indices] = field(default_factory=dict)
    """The same, but with the index also where another rank reports the same shard."""
    whole_units: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Whether each unit of the parameter lies on one rank, shape (parameters,)."""
    one_unit: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Whether the parameter is one unit, shape (parameters,)."""
    refused: list[str] = field(default_factory=list)
    """What does not fit together and is not measured, in words."""
    stage_ranks: list[int] = field(default_factory=list)
    """The first rank of each stage, the first stage first."""
    _index_of: dict[str, int] = field(default_factory=dict)

    @property
    def reporting(self) -> list[int]:
        """Return the ranks that report anything, ascending."""
        return sorted(rank for rank, indices in self.reported.items() if (indices != NOWHERE).any())

    def resolve(self, holdings: Mapping[int, Holdings]) -> None:
        """Work out who reports what.

        Args:
            holdings: rank -> what it says that it holds.
        """
        self.refused = []
        stages = _stages(holdings, self.refused)
        prefixes = _prefixes(stages)
        for rank, known in holdings.items():
            self.reported[rank] = np.full(len(known.held), NOWHERE, np.intp)
            self.held[rank] = np.full(len(known.held), NOWHERE, np.intp)
        self.stage_ranks = [min(copy.rank for copies in stage.values() for copy in copies) for _, stage in stages]
        depth = 0
        for prefix, (_, stage) in zip(prefixes, stages, strict=True):
            depth += self._add_stage(prefix, stage, depth)

    def _add_stage(self, prefix: str, stage: "_Stage", depth: int) -> int:
        """Add the parameters of one stage; return their number."""
        order = sorted(stage, key=lambda name: _depth(stage[name][0]))
        depths = {name: depth + place for place, name in enumerate(order)}
        for name, copies in stage.items():
            owners = _owners(name, copies, self.refused)
            if not owners:
                continue
            units = sum(copy.parameter.units for copy in owners)
            first = owners[0]
            parameter = msgspec.structs.replace(
                first.parameter,
                name=shorten_name(prefix + name),
                depth=depths[name],
                units=first.parameter.units if first.holding.split or first.holding.one_unit else units,
            )
            index = self._set(parameter, first.holding)
            for copy in copies:
                self.held[copy.rank][copy.place] = index
            for copy in owners:
                self.reported[copy.rank][copy.place] = index
        return len(stage)

    def _set(self, parameter: wire.Parameter, holding: Holding) -> int:
        index = self._index_of.setdefault(parameter.name, len(self.parameters))
        if index == len(self.parameters):
            self.parameters.append(parameter)
            self.whole_units = np.append(self.whole_units, not holding.split)
            self.one_unit = np.append(self.one_unit, holding.one_unit)
        else:
            known = self.parameters[index]
            self.parameters[index] = msgspec.structs.replace(
                known, depth=parameter.depth, trainable=parameter.trainable
            )
        return index


class _Copy(NamedTuple):
    """What one rank holds of a parameter."""

    rank: int
    place: int
    """Among the parameters of the rank."""
    parameter: wire.Parameter
    holding: Holding


_Stage = dict[str, list[_Copy]]
"""Name of a parameter -> what each rank holds of it, by rank."""


def _stages(holdings: Mapping[int, Holdings], refused: list[str]) -> list[tuple[int, _Stage]]:
    """Return the stages of the run, each with its number, in the order of the forward pass."""
    # 1. By the number that PyTorch gives to the stage; without one, by the ranks that train the same model.
    groups = _groups(holdings)
    by_stage: dict[tuple[int, int], _Stage] = {}
    for rank in sorted(holdings):
        known = holdings[rank]
        # What is not sharded is in no mesh: it belongs to the stage of what else the rank holds.
        usual = min((holding.stage for holding in known.held if holding.stage is not None), default=None)
        for place, (parameter, holding) in enumerate(zip(known.parameters, known.held, strict=True)):
            number = usual if holding.stage is None else holding.stage
            key = (1, groups[rank]) if number is None else (0, number)
            stage = by_stage.setdefault(key, {})
            stage.setdefault(parameter.name, []).append(_Copy(rank, place, parameter, holding))
    # 2. Groups of ranks that are no stages for certain are one set of parameters, as far as their names are the same.
    numbered = [(key[1], stage) for key, stage in sorted(by_stage.items(), key=lambda item: item[0]) if key[0] == 0]
    others = [stage for key, stage in sorted(by_stage.items(), key=lambda item: item[0]) if key[0] == 1]
    merged: list[_Stage] = []
    for stage in others:
        same = next((known for known in merged if not known.keys().isdisjoint(stage)), None)
        if same is None:
            merged.append(stage)
            continue
        refused += _unclear(same, stage)
        for name, copies in stage.items():
            same.setdefault(name, []).extend(copies)
    return numbered + list(enumerate(merged, start=len(numbered)))


def _groups(holdings: Mapping[int, Holdings]) -> dict[int, int]:
    """Return rank -> the first rank of those that train the same model."""
    group_of = {rank: rank for rank in holdings}
    for rank in sorted(holdings):
        peers = {rank, *holdings[rank].peers} & holdings.keys()
        several = {group_of[peer] for peer in peers}
        first = min(several)
        group_of = {other: first if group in several else group for other, group in group_of.items()}
    return group_of


def _unclear(known: _Stage, other: _Stage) -> list[str]:
    """Return what is to be said of sharded parameters of which nothing says whether they are copies of others."""
    for name in known.keys() & other.keys():
        first, second = (sorted(stage[name][0].holding.ranks) for stage in (known, other))
        if first and second:
            return [
                f"ranks {second} hold parameters of the same names as ranks {first}, and PyTorch does not say whether "
                f"they are copies or another stage of a pipeline: only those of ranks {first} are measured. Cut both "
                "meshes out of one mesh whose dims have names, such as pp and dp"
            ]
    return []


def _prefixes(stages: Sequence[tuple[int, _Stage]]) -> list[str]:
    """Return what is put before the names of each stage: nothing, unless two stages have a name in common."""
    stages_of_name: defaultdict[str, int] = defaultdict(int)
    for _, stage in stages:
        for name in stage:
            stages_of_name[name] += 1
    if max(stages_of_name.values(), default=1) == 1:
        return [""] * len(stages)
    return [f"stage{number}." for number, _ in stages]


def _depth(copy: _Copy) -> tuple[int, int]:
    return copy.parameter.depth or 0, copy.place


def _owners(name: str, copies: Sequence[_Copy], refused: list[str]) -> list[_Copy]:
    """Return the copies that are reported, one for each shard; none where they do not fit together."""
    first = copies[0]
    ranks = first.holding.ranks or (first.rank,)
    for copy in copies:
        if copy.parameter.shape != first.parameter.shape:
            text = f"{name} has shape {first.parameter.shape} on rank {first.rank}"
            refused.append(f"{text} and {copy.parameter.shape} on rank {copy.rank}: only the former is measured")
            break
    owners = [
        copy for copy in copies if (copy.holding.ranks or (copy.rank,)) == ranks and copy.holding.first == copy.rank
    ]
    needed = {copy.holding.first for copy in copies if (copy.holding.ranks or (copy.rank,)) == ranks}
    if needed != {copy.rank for copy in owners} or not set(ranks) <= {copy.rank for copy in copies}:
        refused.append(f"of {name} not every shard is reported: attach on each of the ranks {list(ranks)}")
        return []
    return owners
