"""Keep no statistics of vectors on PostgreSQL: counting their values took a core, and no query searches by them."""

from alembic import op

revision = "0012_unanalysed"
down_revision = "0011_first_steps"

_STATISTICS = (
    "grad_norm",
    "clipped_grad_norm",
    "weight_norm",
    "max_unit_ratio",
    "zero_unit_share",
    "nonfinite_count",
    "clipped_unit_share",
    "update_norm",
)
_COLUMNS = {
    "samples": ("scalars", "histograms", *_STATISTICS),
    "rollups": ("low", "high", "mean", "last", "finite", "nonfinite"),
}


def upgrade() -> None:
    """Turn off the statistics of vectors, in the tables and in their partitions."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, columns in _COLUMNS.items():
        asked = (f"ALTER COLUMN {column} SET STATISTICS 0" for column in columns)
        op.execute(f"ALTER TABLE {table} {', '.join(asked)}")
