"""What goes: runs whose time is over. ``gradwatch prune`` removes them once, the server once an hour."""

import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
import sqlalchemy as sa

from gradwatch_server import schema

Days = Annotated[float, msgspec.Meta(gt=0)]


class Retention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a run is kept, with everything that is known of it, after it was last heard of."""

    days: Days | None = None
    """Absent: for ever."""
    projects: dict[str, Days] = {}
    """Other times for some projects."""

    def overdue(self, connection: sa.Connection, now: float) -> Sequence[str]:
        """Return the ids of the runs whose time is over."""
        if self.days is None and not self.projects:
            return []
        runs = connection.execute(sa.select(*schema.runs.c["id", "project", "last_seen_at"])).all()
        kept = {run.id: self.projects.get(run.project, self.days) for run in runs}
        return [run.id for run in runs if now - run.last_seen_at > 86_400 * (kept[run.id] or float("inf"))]


def delete_run(connection: sa.Connection, run_id: str) -> bool:
    """Remove a run with everything that is known of it; return whether it was there."""
    return connection.execute(sa.delete(schema.runs).where(schema.runs.c.id == run_id)).rowcount > 0


def delete_overdue(connection: sa.Connection, retention: Retention) -> int:
    """Remove the runs whose time is over; return how many went."""
    return sum(delete_run(connection, run_id) for run_id in retention.overdue(connection, time.time()))
