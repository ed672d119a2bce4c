"""Keep vectors inside their rows on PostgreSQL if two rows fit on a page: fetching each from elsewhere was slower."""

from alembic import op

revision = "0010_in_place"
down_revision = "0009_again"

_ROW_BYTES = 4_096
"""Half a page. A larger row's vectors are put elsewhere, one after the other, until it is no larger than this."""


def upgrade() -> None:
    """Set the size up to which new rows keep their vectors; stored rows stay as they are."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, first in (("samples", 0), ("rollups", 1)):
        for part in (*range(first, 4), "above"):
            op.execute(f"ALTER TABLE {table}_{part} SET (toast_tuple_target = {_ROW_BYTES})")
