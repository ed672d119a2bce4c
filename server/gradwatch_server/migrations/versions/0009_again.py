"""What was begun and is gone on with: a run that is being deleted, a delivery that is sent again."""

import sqlalchemy as sa
from alembic import op

revision = "0009_again"
down_revision = "0008_partitions"


def upgrade() -> None:
    """Add the columns."""
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
