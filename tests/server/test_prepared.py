"""Prepared statements: values, rows and errors are those of SQLAlchemy, on both engines."""

import secrets

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch.wire import STATISTICS
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.database import upsert, writing
from gradwatch_server.store.prepared import Prepared

_NAMES = ("run", "level", "step", "attempt", "at", "scalars", "histograms", *STATISTICS)
_insert = Prepared(lambda _: sa.insert(schema.samples), _NAMES)
_select = Prepared(
    lambda _: sa.select(schema.samples).where(schema.samples.c.run == sa.bindparam("of_run")).order_by("step")
)


@pytest.fixture
def run(engine: sa.Engine) -> str:
    """A run without samples."""
    name = secrets.token_hex(4)
    with writing(engine) as connection:
        Ingest(Configuration(), "http://localhost").register(connection, name, wire.Registration(parameters=[]))
    return name


def _row(run: str, step: int) -> dict[str, object]:
    vector = np.array([np.nan, np.inf, -0.0, step], np.float32)
    row = {"run": run, "level": 0, "step": step, "attempt": 1, "at": 0.1, "scalars": {"loss": 2, "x": "NaN"}}
    return dict.fromkeys(_NAMES) | row | {STATISTICS[0]: vector}


def _exact(value: object) -> tuple[type, object]:
    return type(value), value.tobytes() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_inserted_is_read_the_same_by_both(engine: sa.Engine, run: str, count: int) -> None:
    with writing(engine) as connection:
        assert _insert.execute(connection, *(_row(run, step) for step in range(count))) == count
    with engine.connect() as connection:
        found = _select.all(connection, {"of_run": run})
        mine = schema.samples.c.run == run
        expected = connection.execute(sa.select(schema.samples).where(mine).order_by("step")).all()
    assert len(found) == len(expected) == count
    for one, other in zip(found, expected, strict=True):
        assert list(one._fields) == list(other._fields)
        assert [_exact(value) for value in one] == [_exact(value) for value in other]


def test_a_row_that_exists_is_told_by_what_is_returned(engine: sa.Engine, run: str) -> None:
    table = schema.batches
    insert = Prepared(
        lambda name: upsert(name, table).on_conflict_do_nothing().returning(table.c.id), ("run", "rank", "id", "at")
    )
    row = {"run": run, "rank": 0, "id": "b", "at": 1.0}
    with writing(engine) as connection:
        first, second = insert.one_or_none(connection, row), insert.one_or_none(connection, row)
    assert first is not None
    assert first.id == "b"
    assert second is None


def test_what_the_database_refuses_is_an_error_of_sqlalchemy(engine: sa.Engine, run: str) -> None:
    with pytest.raises(sa.exc.IntegrityError), writing(engine) as connection:
        _insert.execute(connection, _row("nobody", 1))
    with writing(engine) as connection:  # the transaction was rolled back, the connection is of use
        assert _insert.execute(connection, _row(run, 1)) == 1


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # SQLite's connections are not lost
def test_a_connection_that_is_lost_is_replaced(engine: sa.Engine, database_url: str) -> None:
    with engine.connect() as connection:
        own = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        with psycopg.connect(database_url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", [own])
        with pytest.raises(sa.exc.OperationalError) as raised:
            _select.all(connection, {"of_run": ""})
    assert raised.value.connection_invalidated
    with engine.connect() as connection:
        assert _select.all(connection, {"of_run": ""}) == []


def test_it_begins_a_transaction_as_other_statements_do(engine: sa.Engine, run: str) -> None:
    with engine.execution_options(writes=True).connect() as connection:
        _insert.execute(connection, _row(run, 1))
        connection.rollback()
        assert _select.all(connection, {"of_run": run}) == []


def test_a_parameter_that_is_missing_is_an_error(engine: sa.Engine) -> None:
    with engine.connect() as connection, pytest.raises(KeyError, match="of_run"):
        _select.all(connection, {})


def test_a_statement_with_defaults_of_sqlalchemy_is_refused() -> None:
    table = sa.Table("t", sa.MetaData(), sa.Column("a", sa.Integer, default=lambda: 1), sa.Column("b", sa.Integer))
    with sa.create_engine("sqlite://").connect() as connection, pytest.raises(TypeError, match="cannot be prepared"):
        Prepared(lambda _: sa.insert(table), ("b",)).execute(connection, {"b": 1})
