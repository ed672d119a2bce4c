"""Number each run's samples as they are stored: remote write follows these numbers, whatever the steps are."""

import sqlalchemy as sa
from alembic import op

revision = "0013_arrivals"
down_revision = "0012_unanalysed"

_NUMBER = sa.text(
    """
    UPDATE samples SET arrival = (
        SELECT count(*) FROM samples AS before
        WHERE before.run = samples.run AND before.level = 0 AND before.attempt = samples.attempt
        AND before.step <= samples.step AND before.step > (SELECT min(step) FROM written WHERE run = samples.run)
    )
    WHERE level = 0
    AND attempt = (SELECT attempt FROM runs WHERE id = samples.run)
    AND attempt = (SELECT min(attempt) FROM written WHERE run = samples.run)
    AND step > (SELECT min(step) FROM written WHERE run = samples.run)
    """
)
"""Numbers the samples that a store still lacks; of a run that was never written nothing was owed but the backlog."""
_COUNT = sa.text(
    "UPDATE runs SET arrivals = coalesce((SELECT max(arrival) FROM samples WHERE run = runs.id AND level = 0), 0) "
    "WHERE id IN (SELECT run FROM written)"
)


def upgrade() -> None:
    """Add the numbers, and keep the last one that each store has in the place of the step."""
    op.add_column("runs", sa.Column("arrivals", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("samples", sa.Column("arrival", sa.BigInteger(), comment="order of the run's samples, from 1 on"))
    op.create_table(
        "remote_write_stores",
        sa.Column("store", sa.Text(), nullable=False, comment="digest of the address that is written to"),
        sa.Column("since", sa.Double(), nullable=False, comment="when it was first written to"),
        sa.PrimaryKeyConstraint("store", name=op.f("pk_remote_write_stores")),
    )
    op.execute(_NUMBER)
    op.execute(_COUNT)
    op.execute("INSERT INTO remote_write_stores SELECT DISTINCT store, 0.0 FROM written")
    op.add_column("written", sa.Column("arrival", sa.BigInteger(), nullable=False, server_default="0"))
    op.drop_column("written", "attempt")
    op.drop_column("written", "step")
    table = "samples" if op.get_bind().dialect.name == "sqlite" else "samples_0"
    numbered = sa.text("arrival IS NOT NULL")
    op.create_index("ix_samples_arrivals", table, ["run", "arrival"], sqlite_where=numbered, postgresql_where=numbered)
