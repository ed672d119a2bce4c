"""Mark runs whose deletion has begun, and count the attempts of a delivery before its last replay.

An index is added from which SQLite reads the steps of buckets, whose rows lie far apart among the samples.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009_again"
down_revision = "0008_partitions"


def upgrade() -> None:
    """Add the columns and the index."""
    op.add_column(
        "runs",
        sa.Column("deleted_at", sa.Double(), nullable=True, comment="since then it goes, a little at a time"),
    )
    op.add_column(
        "deliveries",
        sa.Column(
            "attempts_before", sa.Integer(), nullable=False, server_default="0", comment="it was last sent again"
        ),
    )
    if op.get_bind().dialect.name == "sqlite":
        columns = ["run", "level", "step", "last_step"]
        op.create_index("ix_samples_spans", "samples", columns, sqlite_where=sa.text("level > 0"))
