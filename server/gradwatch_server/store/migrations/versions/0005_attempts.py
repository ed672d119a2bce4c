"""Store the server's number of each attempt that came from a host with a wrong clock."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005_attempts"
down_revision = "0004_bytes"


def upgrade() -> None:
    """Add the column; stored rows keep their numbers."""
    json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    comment = "numbers of agents whose clock goes wrong -> start of the attempt by the server's clock"
    op.add_column("runs", sa.Column("attempts", json, nullable=False, server_default="{}", comment=comment))
