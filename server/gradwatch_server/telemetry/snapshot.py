"""Active runs at their latest samples: what `/metrics` tells of a run, summarised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch_server.diagnosis import RunParameters, Sample
from gradwatch_server.diagnosis.sample import Floats, Profile
from gradwatch_server.store import schema
from gradwatch_server.store.parameters import load_parameter_versions, load_parameters_of_runs

_READ: tuple[wire.Statistic, ...] = (
    "grad_norm",
    "clipped_grad_norm",
    "weight_norm",
    "nonfinite_count",
    "clipped_unit_share",
)
_TINY = 1e-45
"""The smallest positive float32: stands for zero on a logarithmic scale."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The latest sample of one run."""

    layout: RunParameters
    reading: Sample
    profile: Profile

    @property
    def finite_ratios(self) -> Floats:
        """Ratios of the parameters with a finite gradient."""
        return self.profile.ratio[self.profile.finite & np.isfinite(self.profile.ratio)]

    @property
    def decades_per_layer(self) -> float:
        """Slope of log10 of the gradient's RMS over the weight matrices from input to output; NaN under two of them.

        Positive: the gradient fades on its way from the output to the input; the chain rule's factor of each layer is
        ``10 ** -slope``.
        """
        logs = np.log10(np.maximum(self.profile.rms[self.profile.matrices], _TINY))
        if len(logs) < 2:
            return math.nan
        places = np.arange(len(logs)) - (len(logs) - 1) / 2
        return float(places @ logs / (places @ places))

    @property
    def nonfinite(self) -> int:
        """Parameters whose gradient holds a NaN or an infinity."""
        return int(np.count_nonzero(self._nonfinite()))

    @property
    def zero(self) -> int:
        """Parameters whose gradient is there and exactly zero."""
        return int(np.count_nonzero(self.profile.present & (self.profile.gradient == 0.0)))

    @property
    def clipped_share(self) -> float:
        """Share of the parameters with a gradient that clipping scaled down; NaN where nothing clips."""
        size, statistics = len(self.layout.names), self.reading.statistics
        if not {"clipped_grad_norm", "clipped_unit_share"} & set(statistics) or not self.profile.present.any():
            return math.nan
        after = self.reading.vector("clipped_grad_norm", size)
        scaled = (after != wire.MISSING) & (after < self.profile.gradient * (1 - 1e-6))
        scaled |= self.reading.vector("clipped_unit_share", size) > 0.0
        return float(np.mean(scaled[self.profile.present]))

    def conspicuous(self, most: int) -> NDArray[np.intp]:
        """Return up to ``most`` parameters, the most conspicuous first.

        Not finite before exactly zero before far: how many decades the ratio is from the run's median, up or down.
        """
        ratio, present = self.profile.ratio, self.profile.present
        logs = np.log10(np.maximum(ratio, _TINY))
        usual = np.median(logs[ratio > 0.0]) if (ratio > 0.0).any() else 0.0
        distance = np.where(present, np.abs(logs - usual), -1.0)
        distance = np.where(present & (self.profile.gradient == 0.0), 1e3, distance)
        distance = np.where(self._nonfinite(), 1e6, np.nan_to_num(distance, nan=-1.0))
        return np.argsort(-distance, kind="stable")[:most]

    def _nonfinite(self) -> NDArray[np.bool_]:
        counted = self.reading.vector("nonfinite_count", len(self.layout.names)) > 0.0
        return (self.profile.present & ~self.profile.finite) | counted


def load_snapshots(connection: sa.Connection, run_ids: Sequence[str], layouts: "Layouts") -> dict[str, Snapshot]:
    """Return the latest samples of these runs; a run without samples is left out."""
    known = layouts.load(connection, run_ids)
    found = {}
    for row in _latest(connection, run_ids):
        measured = {name: getattr(row, name) for name in _READ}
        statistics = {name: vector for name, vector in measured.items() if vector is not None}
        layout, reading = known[row.run], Sample(step=row.step, at=row.at, statistics=statistics)
        found[row.run] = Snapshot(layout, reading, reading.profile(layout))
    return found


def _latest(connection: sa.Connection, run_ids: Sequence[str]) -> Sequence[sa.Row[Any]]:
    table, runs, newer = schema.samples, schema.runs, schema.samples.alias("newer")
    newest = sa.select(sa.func.max(newer.c.step)).where(newer.c.run == runs.c.id, newer.c.level == 0).correlate(runs)
    return connection.execute(
        sa.select(*table.c["run", "step", "at", *_READ])
        .select_from(runs.join(table, table.c.run == runs.c.id))
        .where(runs.c.id.in_(run_ids), table.c.level == 0, table.c.step == newest.scalar_subquery())
    ).all()


class Layouts:
    """The layouts of the runs that were asked for last: a network's parameters are read once, not at every scrape."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, RunParameters]] = {}

    def load(self, connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, RunParameters]:
        """Return the layouts of these runs; those that gained a parameter or changed one are read anew."""
        versions = load_parameter_versions(connection, run_ids)
        known = self._known
        changed = [run_id for run_id in run_ids if run_id not in known or known[run_id][0] != versions[run_id]]
        read = load_parameters_of_runs(connection, changed)
        fresh = {run_id: (versions[run_id], RunParameters.of(parameters)) for run_id, parameters in read.items()}
        self._known = {run_id: fresh.get(run_id) or known[run_id] for run_id in run_ids}
        return {run_id: layout for run_id, (_, layout) in self._known.items()}
