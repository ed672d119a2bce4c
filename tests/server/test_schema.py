"""The schema: what grows with what runs measure can be distributed by run."""

import sqlalchemy as sa

from gradwatch_server.store import schema

OF_OTHERS = {
    "runs",
    "events",  # at most 10,000 of a run
    "alerts",
    "transitions",
    "deliveries",
    "attempts",
    "silences",
    "disabled_receivers",
    "tokens",
    "remote_write_stores",
}
"""Tables that do not grow with samples."""


def _not_by_run(tables: list[sa.Table]) -> set[str]:
    """Return the names of tables whose key does not begin with the run."""
    return {table.name for table in tables if [column.name for column in table.primary_key][:1] != ["run"]}


def test_every_key_begins_with_the_run_where_rows_grow_with_samples() -> None:
    assert _not_by_run(list(schema.metadata.tables.values())) == OF_OTHERS


def test_a_key_that_begins_with_something_else_is_found() -> None:
    by_step = sa.Table(
        "by_step", sa.MetaData(), sa.Column("step", sa.Integer, primary_key=True), sa.Column("run", primary_key=True)
    )
    assert _not_by_run([by_step, schema.samples]) == {"by_step"}
