"""Store vectors of norms uncompressed: PostgreSQL spent half of its time on trying to compress them, in vain."""

from alembic import op

revision = "0003_uncompressed"
down_revision = "0002_written"

NORMS = ("grad_norm", "clipped_grad_norm", "weight_norm", "max_unit_ratio", "update_norm")


def upgrade() -> None:
    """Change how new rows are stored; shares and counts, mostly zeros, are still compressed."""
    if op.get_bind().dialect.name == "postgresql":
        for column in NORMS:
            op.execute(f"ALTER TABLE samples ALTER COLUMN {column} SET STORAGE EXTERNAL")
