"""Keep the rows of each level together on PostgreSQL: those of a coarse one lay far apart, each on its own page."""

from alembic import op

revision = "0008_partitions"
down_revision = "0007_outliving"

_KEYS = {"samples": "run, level, step", "rollups": "run, statistic, level, step"}
_COARSEST = 3
"""The last level with a partition of its own; those above share one."""


def upgrade() -> None:
    """Move the rows into partitions; the samples themselves, of level 0, stay where they are."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, key in _KEYS.items():
        op.execute(f"ALTER TABLE {table} RENAME TO {table}_whole")
        for kind, tail in (("pk", ""), ("fk", "_run_runs")):
            op.execute(f"ALTER TABLE {table}_whole RENAME CONSTRAINT {kind}_{table}{tail} TO {kind}_{table}_whole")
        op.execute(
            f"CREATE TABLE {table} (LIKE {table}_whole INCLUDING COMMENTS INCLUDING STORAGE, "
            f"CONSTRAINT pk_{table} PRIMARY KEY ({key}), "
            f"CONSTRAINT fk_{table}_run_runs FOREIGN KEY (run) REFERENCES runs (id) ON DELETE CASCADE) "
            "PARTITION BY LIST (level)"
        )
        op.execute(f"CREATE TABLE {table}_above PARTITION OF {table} DEFAULT")
        for level in range(1, _COARSEST + 1):
            op.execute(f"CREATE TABLE {table}_{level} PARTITION OF {table} FOR VALUES IN ({level})")
        op.execute(f"INSERT INTO {table} SELECT * FROM {table}_whole WHERE level > 0 ORDER BY {key}")  # noqa: S608
    op.execute("DROP TABLE rollups_whole")
    op.execute("DELETE FROM samples_whole WHERE level > 0")
    op.execute("ALTER TABLE samples_whole RENAME TO samples_0")
    op.execute("ALTER TABLE samples ATTACH PARTITION samples_0 FOR VALUES IN (0)")
