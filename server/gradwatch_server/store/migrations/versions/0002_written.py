"""Create the table of the last step of each run that remote write has written."""

import sqlalchemy as sa
from alembic import op

revision = "0002_written"
down_revision = "0001"


def upgrade() -> None:
    """Create the table ``written``."""
    op.create_table(
        "written",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("store", sa.Text(), nullable=False, comment="digest of the address that is written to"),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False, comment="of the last sample that was dealt with"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_written_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "store", name=op.f("pk_written")),
    )
