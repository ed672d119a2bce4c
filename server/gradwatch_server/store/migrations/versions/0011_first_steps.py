"""Store the first step of every attempt of a run: a late batch is cut where any later attempt begins."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011_first_steps"
down_revision = "0010_in_place"

_json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_runs = sa.table(
    "runs",
    sa.column("id", sa.Text),
    sa.column("attempt", sa.BigInteger),
    sa.column("attempt_first_step", sa.BigInteger),
    sa.column("first_steps", _json),
)
_samples = sa.table("samples", *map(sa.column, ("run", "level", "step", "attempt")))
_trails = sa.table("trails", *map(sa.column, ("run", "first_step", "attempt")))


def upgrade() -> None:
    """Replace the column; if older attempts have stored rows, find the first step of each stored attempt."""
    comment = "attempt -> its first step: from there on nothing is of an older one, see shelf.py"
    op.add_column("runs", sa.Column("first_steps", _json, nullable=False, server_default="{}", comment=comment))
    connection = op.get_bind()
    for run, attempt, first in connection.execute(sa.select(*_runs.c["id", "attempt", "attempt_first_step"])).all():
        begun = {} if first is None else {attempt: first}
        if _oldest(connection, run) - {attempt}:
            begun = _stored(connection, run) | begun
        told = {str(number): step for number, step in begun.items()}
        connection.execute(sa.update(_runs).where(_runs.c.id == run).values(first_steps=told))
    op.drop_column("runs", "attempt_first_step")


def _oldest(connection: sa.Connection, run: str) -> set[int]:
    """Return the attempts of a run's first sample and its first trail: only resumed runs are searched as a whole."""
    first_sample = sa.select(_samples.c.attempt).where(_samples.c.run == run, _samples.c.level == 0)
    first_trail = sa.select(_trails.c.attempt).where(_trails.c.run == run)
    found = (
        connection.execute(first_sample.order_by(_samples.c.step).limit(1)).scalar(),
        connection.execute(first_trail.order_by(_trails.c.first_step).limit(1)).scalar(),
    )
    return {attempt for attempt in found if attempt is not None}


def _stored(connection: sa.Connection, run: str) -> dict[int, int]:
    """Return the first stored step of each attempt."""
    steps = sa.select(_samples.c.attempt, sa.func.min(_samples.c.step).label("first"))
    told = sa.select(_trails.c.attempt, sa.func.min(_trails.c.first_step).label("first"))
    both = sa.union_all(
        steps.where(_samples.c.run == run, _samples.c.level == 0).group_by(_samples.c.attempt),
        told.where(_trails.c.run == run).group_by(_trails.c.attempt),
    ).subquery()
    found = connection.execute(sa.select(both.c.attempt, sa.func.min(both.c.first)).group_by(both.c.attempt))
    return {row[0]: row[1] for row in found}
