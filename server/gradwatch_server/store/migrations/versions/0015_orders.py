"""Keep the order in which an attempt lists the parameters of its run, where it is not the run's own."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0015_orders"
down_revision = "0014_fingerprints"


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "runs",
        sa.Column(
            "orders",
            sa.JSON().with_variant(postgresql.JSONB(), "postgresql"),
            nullable=False,
            server_default="{}",
            comment="attempt -> segments of the run's parameters, where it lists them in another order",
        ),
    )
