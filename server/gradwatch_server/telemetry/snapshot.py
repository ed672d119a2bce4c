"""The latest sample of each active run, summarised for ``/metrics`` by the same functions that the rules use."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.diagnosis import RunParameters, Sample
from gradwatch_server.diagnosis.run_parameters import Floats, Indices
from gradwatch_server.diagnosis.sample import Profile, log10
from gradwatch_server.store import schema
from gradwatch_server.store.parameters import load_parameter_versions, load_parameters_of_runs

_STATISTICS: tuple[wire.Statistic, ...] = (
    "grad_norm",
    "clipped_grad_norm",
    "weight_norm",
    "nonfinite_count",
    "clipped_unit_share",
)
_MOST_CACHED_PARAMETERS = 500_000


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The latest sample of one run."""

    parameters: RunParameters
    sample: Sample
    profile: Profile

    @property
    def finite_ratios(self) -> Floats:
        """Ratios of the parameters with a finite gradient."""
        return self.profile.ratio[self.profile.finite & np.isfinite(self.profile.ratio)]

    @property
    def decades_per_layer(self) -> float:
        """Decades that the gradient loses per layer on its way from the output to the input; NaN for fewer than two."""
        return self.profile.decades_per_layer(self.profile.matrices)

    @property
    def nonfinite(self) -> int:
        """Number of parameters whose gradient holds a NaN or an infinity."""
        return int(np.count_nonzero(self.profile.nonfinite))

    @property
    def zero(self) -> int:
        """Number of parameters with a gradient of exactly zero."""
        return int(np.count_nonzero(self.profile.zero))

    @property
    def clipped_share(self) -> float:
        """Share of the parameters with a gradient that clipping scaled down; NaN where nothing clips."""
        size, statistics = len(self.parameters.names), self.sample.statistics
        if not {"clipped_grad_norm", "clipped_unit_share"} & set(statistics) or not self.profile.present.any():
            return math.nan
        after = self.sample.vector("clipped_grad_norm", size)
        scaled = (after != wire.MISSING) & (after < self.profile.gradient * (1 - 1e-6))
        scaled |= self.sample.vector("clipped_unit_share", size) > 0.0
        return float(np.mean(scaled[self.profile.present]))

    def conspicuous(self, most: int) -> Indices:
        """Return the indices of up to ``most`` parameters, the most conspicuous first.

        A gradient that is not finite is more conspicuous than one of exactly zero, which is more so than any other. The
        others are ordered by how many decades their ratio lies above or below the run's median; missing gradients come
        last.
        """
        ratio, present = self.profile.ratio, self.profile.present
        logs = log10(ratio)
        usual = np.median(logs[ratio > 0.0]) if (ratio > 0.0).any() else 0.0
        distance = np.where(present, np.abs(logs - usual), -1.0)
        distance = np.where(self.profile.zero, 1e3, distance)
        distance = np.where(self.profile.nonfinite, 1e6, np.nan_to_num(distance, nan=-1.0))
        return np.argsort(-distance, kind="stable")[:most]


def load_snapshots(connection: sa.Connection, run_ids: Sequence[str], cache: "ParameterCache") -> dict[str, Snapshot]:
    """Return the latest samples of these runs by run id, without the runs that have no sample."""
    parameters = cache.load(connection, run_ids)
    found = {}
    for row in _load_latest(connection, run_ids):
        measured = {name: getattr(row, name) for name in _STATISTICS}
        statistics = {name: vector for name, vector in measured.items() if vector is not None}
        sample = Sample(step=row.step, at=row.at, statistics=statistics)
        found[row.run] = Snapshot(parameters[row.run], sample, sample.profile(parameters[row.run]))
    return found


def _load_latest(connection: sa.Connection, run_ids: Sequence[str]) -> Sequence[sa.Row[Any]]:
    table, runs, newer = schema.samples, schema.runs, schema.samples.alias("newer")
    newest = sa.select(sa.func.max(newer.c.step)).where(newer.c.run == runs.c.id, newer.c.level == 0).correlate(runs)
    return connection.execute(
        sa.select(*table.c["run", "step", "at", *_STATISTICS])
        .select_from(runs.join(table, table.c.run == runs.c.id))
        .where(runs.c.id.in_(run_ids), table.c.level == 0, table.c.step == newest.scalar_subquery())
    ).all()


class ParameterCache:
    """The parameters of the runs of the last scrape, so that not every scrape loads them; up to a number of them."""

    def __init__(self) -> None:
        self._cached: dict[str, tuple[str, RunParameters]] = {}

    def load(self, connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, RunParameters]:
        """Return the parameters of these runs by run id; load those of runs that gained or changed a parameter."""
        versions, cached = load_parameter_versions(connection, run_ids), dict(self._cached)
        changed = [run_id for run_id in run_ids if run_id not in cached or cached[run_id][0] != versions[run_id]]
        loaded = load_parameters_of_runs(connection, changed)
        fresh = {run_id: (versions[run_id], RunParameters.of(parameters)) for run_id, parameters in loaded.items()}
        kept = {run_id: entry for run_id, entry in cached.items() if run_id not in fresh}
        width = sum(len(parameters.names) for _, parameters in kept.values())
        for run_id, entry in fresh.items():
            width += len(entry[1].names)
            if width <= _MOST_CACHED_PARAMETERS:
                kept[run_id] = entry
        self._cached = kept
        return {run_id: (fresh.get(run_id) or cached[run_id])[1] for run_id in run_ids}

    def retain(self, run_ids: Iterable[str]) -> None:
        """Forget all runs but these."""
        wanted = set(run_ids)
        self._cached = {run_id: entry for run_id, entry in self._cached.items() if run_id in wanted}
