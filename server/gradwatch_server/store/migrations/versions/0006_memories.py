"""Store the detector state of each run, for restarts and for several servers, and the step of each scalar."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006_memories"
down_revision = "0005_attempts"


def upgrade() -> None:
    """Create the table, the mark by which a server sees that another one has changed a run, and the steps."""
    op.create_table(
        "memories",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), comment="of the last sample in it"),
        sa.Column("version", sa.Integer(), nullable=False, comment="of the bytes; another one is replayed"),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_memories_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", name=op.f("pk_memories")),
    )
    comment = "changes with what is remembered of the run; none: since before that was stored"
    op.add_column("runs", sa.Column("memory_mark", sa.Text(), comment=comment))
    json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    comment = "at which steps of this attempt these were"
    op.add_column("runs", sa.Column("scalar_steps", json, nullable=False, server_default="{}", comment=comment))
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE memories ALTER COLUMN body SET STORAGE EXTERNAL")
