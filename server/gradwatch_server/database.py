"""Engines and migrations: SQLite embedded, PostgreSQL beyond."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import ConnectionPoolEntry

from gradwatch_server import vectors
from gradwatch_server.errors import DatabaseError


def open_engine(url: str) -> sa.Engine:
    """Return an engine that is ready to use.

    Raises:
        DatabaseError: the address is not of a database that gradwatch uses, or it cannot be opened.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise DatabaseError(f"{url!r} is not a database address: use sqlite:///FILE or postgresql://...") from None
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _open_postgresql(parsed)
    raise DatabaseError(f"{parsed.drivername!r} is not a database gradwatch uses: sqlite:///FILE or postgresql://...")


def _open_sqlite(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise DatabaseError("an in-memory SQLite loses what it acknowledged: name a file, sqlite:///gradwatch.db")
    folder = Path(url.database).resolve().parent
    if not folder.is_dir():
        raise DatabaseError(f"the folder {folder} of the database does not exist: create it or name another")
    engine = sa.create_engine(url, pool_size=8, connect_args={"timeout": 30})
    sa.event.listen(engine, "connect", _set_pragmas)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _open_postgresql(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), pool_size=8, pool_pre_ping=True)
    sa.event.listen(engine, "connect", lambda connection, _entry: vectors.prepare(connection))
    return engine


def _set_pragmas(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver must not begin and commit on its own: savepoints would break
    cursor = connection.cursor()
    cursor.execute("PRAGMA page_size = 8192")  # of a new file: a sample of 12 kB wastes least of these
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that takes SQLite's write lock at once, so that it never has to be upgraded midway."""
    with engine.execution_options(writes=True).begin() as connection:
        yield connection


def alembic_of(engine: sa.Engine) -> Config:
    """Return what Alembic needs to know of a database."""
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    configuration.attributes["engine"] = engine
    return configuration


def migrate(engine: sa.Engine) -> None:
    """Bring the schema to this version."""
    command.upgrade(alembic_of(engine), "head")


def prepare(engine: sa.Engine) -> None:
    """Migrate an embedded SQLite; check that a PostgreSQL has been migrated.

    Raises:
        DatabaseError: the PostgreSQL has another schema; the text says which command brings it to this version.
    """
    try:
        if engine.dialect.name == "sqlite":
            migrate(engine)
            return
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    except sa.exc.OperationalError as error:
        raise DatabaseError(f"the database {engine.url!r} cannot be opened: {error.orig}") from None
    expected = ScriptDirectory.from_config(alembic_of(engine)).get_current_head()
    if found != expected:
        raise DatabaseError(
            f"the database has schema {found or 'none'}, this version needs {expected}: back it up, then run "
            "gradwatch migrate --database-url ..."
        )


def upsert(engine: str, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """Return an insert that knows ON CONFLICT, in the form of ``sqlite`` or ``postgresql``."""
    return postgresql.insert(table) if engine == "postgresql" else sqlite.insert(table)
