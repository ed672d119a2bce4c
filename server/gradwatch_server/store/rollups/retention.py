"""Retention settings: how long runs are kept, and how long the levels of their samples.

The server deletes expired runs and levels once an hour, ``gradwatch prune`` when it is called.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa

from gradwatch_server.store import schema

Days = Annotated[float, msgspec.Meta(gt=0)]


class Retention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a run is kept after its last report, and how long each level is kept after it was measured."""

    days: Days | None = None
    """Absent: for ever."""
    projects: dict[str, Days] = {}
    """Other times for some projects."""
    level_days: list[Days] = []
    """Every sample, every bucket of level 1, of level 2 and so on; levels that are not listed: as long as the run."""
    project_level_days: dict[str, list[Days]] = {}
    """Others for some projects, in the place of the whole list."""

    def __post_init__(self) -> None:
        _check_ascending("level_days", self.level_days)
        for project, days in self.project_level_days.items():
            _check_ascending(f"project_level_days.{project}", days)

    def levels_of(self, project: str) -> list[Days]:
        """Return how many days each level of a project's runs is kept, from level 0 on."""
        return self.project_level_days.get(project, self.level_days)

    def expired_runs(self, engine: sa.Engine, now: float) -> Sequence[str]:
        """Return the ids of the runs that have expired."""
        chosen = sa.select(*schema.runs.c["id", "project", "last_seen_at", "deleted_at"])
        if self.days is None and not self.projects:
            chosen = chosen.where(schema.runs.c.deleted_at.is_not(None))
        with engine.connect() as connection:
            return [run.id for run in connection.execute(chosen) if self.is_expired(run, now)]

    def is_expired(self, run: sa.Row[Any], now: float) -> bool:
        """Return whether a run has not reported for its time of retention, or its deletion has begun."""
        days = self.projects.get(run.project, self.days)
        return run.deleted_at is not None or (days is not None and now - run.last_seen_at > 86_400 * days)


def _check_ascending(name: str, days: list[Days]) -> None:
    for level, (finer, coarser) in enumerate(pairwise(days)):
        if coarser < finer:
            raise ValueError(
                f"{name} = {days}: level {level + 1} goes after {coarser:g} days, level {level} after {finer:g}: a "
                "coarser level is kept at least as long as a finer one"
            )
