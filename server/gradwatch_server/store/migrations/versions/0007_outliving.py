"""Keep the alerts of a deleted run until their notifications are delivered; they have no run then."""

import sqlalchemy as sa
from alembic import op

revision = "0007_outliving"
down_revision = "0006_memories"

_CHAIN = ("alerts", "transitions", "deliveries", "attempts")
"""Each refers to those before it."""


def upgrade() -> None:
    """Allow alerts without a run.

    SQLite cannot change a column, and dropping a table deletes the rows that refer to it. So the table and all tables
    that refer to it are made anew.
    """
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.alter_column("alerts", "run", nullable=True)
        return
    listed = sa.text("SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    made = [row for row in connection.execute(listed) if row.tbl_name in _CHAIN]
    tables = {row.name: row.sql for row in made if row.type == "table"}
    tables["alerts"] = tables["alerts"].replace("run TEXT NOT NULL", "run TEXT", 1)
    for name in _CHAIN:
        op.execute(f"CREATE TEMPORARY TABLE kept_{name} AS SELECT * FROM {name}")  # noqa: S608
    for name in reversed(_CHAIN):
        op.execute(f"DROP TABLE main.{name}")
    for name in _CHAIN:
        connection.exec_driver_sql(tables[name])
        op.execute(f"INSERT INTO {name} SELECT * FROM kept_{name}")  # noqa: S608
        op.execute(f"DROP TABLE kept_{name}")
    for row in made:
        if row.type == "index":
            connection.exec_driver_sql(row.sql)
