"""Database engines and migrations: SQLite, which is embedded, or PostgreSQL."""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import orjson
import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg import pq
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import ConnectionPoolEntry

from gradwatch_server.errors import DatabaseError
from gradwatch_server.store.vectors import register_vectors

_CONNECT_SECONDS = 10
_VALUES_PER_STATEMENT = 1_000
_BUSY_SECONDS = 30
"""How long SQLite waits for the lock of another process."""
_LOG_BYTES = 32 * 1024 * 1024
"""Size to which SQLite's write-ahead log shrinks once it has been written back."""
_CHECKPOINT_WAIT_MILLISECONDS = 200
"""How long a checkpoint waits for readers; writers wait with it."""


def open_engine(url: str, *, create: bool = True) -> sa.Engine:
    """Return an engine that is ready to use.

    Args:
        url: address of the database.
        create: whether an SQLite file that does not exist is made when something is first written to it.

    Raises:
        DatabaseError: the address is not of a database that gradwatch can use, or it cannot be opened.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # a port that is no number
        shown = "the address" if set("@=:") & set(url) else repr(url)  # it may hold a password, wherever that stands
        text = f"{shown} is not a database address: use sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME"
        raise DatabaseError(text) from None
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, create=create)
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _open_postgresql(parsed)
    raise DatabaseError(f"{parsed.drivername!r} is not a database gradwatch uses: sqlite:///FILE or postgresql://...")


def _open_sqlite(url: sa.URL, *, create: bool) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise DatabaseError("an in-memory SQLite loses what it acknowledged: name a file, sqlite:///gradwatch.db")
    folder = Path(url.database).resolve().parent
    if not folder.is_dir():
        raise DatabaseError(f"the folder {folder} of the database does not exist: create it or name another")
    if not create and not Path(url.database).exists():
        raise DatabaseError(
            f"there is no database {Path(url.database).resolve()}: name the server's with --database-url or "
            "GRADWATCH_DATABASE_URL"
        )
    engine = sa.create_engine(
        url, pool_size=8, connect_args={"timeout": _BUSY_SECONDS}, json_serializer=_json, json_deserializer=orjson.loads
    )
    file = _FileGuard(Path(url.database).resolve())
    sa.event.listen(engine, "do_connect", file.check)
    sa.event.listen(engine, "connect", _set_pragmas)
    sa.event.listen(engine, "checkout", file.check)
    sa.event.listen(engine, "begin", _begin)
    sa.event.listen(engine, "commit", file.check)
    return engine


def _json(value: Any) -> str:
    """Return the JSON of a column, whose value has Python's own types and no number that is not finite."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


class _FileGuard:
    """Guards the file of an SQLite database: if it was deleted or moved, nobody would find what is written to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        """Device and inode, once the file exists: no connection creates another file after that."""

    def check(self, *_: Any) -> None:
        """Raise an error if the file was replaced or removed, since nothing may be acknowledged then."""
        found = self._identify()
        self._identity = self._identity or found
        if found != self._identity:
            text = f"the file {self._path} was deleted or moved: bring it back, or start the server again"
            raise sa.exc.OperationalError("", {}, sqlite3.OperationalError(text))

    def _identify(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _open_postgresql(url: sa.URL) -> sa.Engine:
    given = {"connect_timeout": _CONNECT_SECONDS}
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=8,
        pool_pre_ping=True,
        pool_use_lifo=True,  # a connection that has been used knows the statements
        connect_args=given,
        json_serializer=_json,
        json_deserializer=orjson.loads,
    )
    sa.event.listen(engine, "connect", _set_up_connection)
    sa.event.listen(engine, "begin", _choose_snapshot)
    return engine


def _set_up_connection(connection: psycopg.Connection[Any], _entry: ConnectionPoolEntry) -> None:
    register_vectors(connection)
    connection.execute("SET jit = off")  # the planner overestimates the rows of these statements and would compile each
    connection.commit()


def _choose_snapshot(connection: sa.Connection) -> None:
    """Give all statements of a reading transaction the same snapshot, as on SQLite; the driver's BEGIN asks for it."""
    driver = cast("psycopg.Connection[Any]", connection.connection.dbapi_connection)
    reads = not connection.get_execution_options().get("writes", False)
    if driver.read_only is not reads:
        driver.read_only = reads
        driver.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ if reads else None


def _set_pragmas(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver must not begin and commit on its own: savepoints would break
    cursor = connection.cursor()
    cursor.execute("PRAGMA page_size = 8192")  # of a new file: a sample of 12 kB wastes least of these
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def shrink_log(engine: sa.Engine) -> None:
    """Write SQLite's write-ahead log back and empty it, if it has grown large while somebody held a snapshot.

    A checkpoint that SQLite makes on its own does not wait for readers: as long as they overlap, the log grows.
    """
    path = Path(f"{engine.url.database}-wal")
    if engine.dialect.name != "sqlite" or not path.exists() or path.stat().st_size <= _LOG_BYTES:
        return
    with closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_WAIT_MILLISECONDS}")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        cursor.execute(f"PRAGMA busy_timeout = {1_000 * _BUSY_SECONDS}")


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that writes; on PostgreSQL a connection of ``engine.connect()`` only reads.

    It takes SQLite's write lock at once, so that it never has to be upgraded in the middle.
    """
    with engine.execution_options(writes=True).begin() as connection:
        yield connection


def alembic_config(engine: sa.Engine) -> Config:
    """Return Alembic's configuration for a database."""
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    configuration.attributes["engine"] = engine
    return configuration


@contextmanager
def database_errors(engine: sa.Engine) -> Iterator[None]:
    """Turn an error of the database into a ``DatabaseError`` that says what to do.

    Raises:
        DatabaseError: the database refused a statement.
    """
    name = shown_address(engine)
    try:
        yield
    except CommandError as error:
        raise DatabaseError(
            f"the database {name} has a schema that this version does not know ({error}): upgrade gradwatch"
        ) from None
    except sa.exc.DBAPIError as error:
        reason = _without_secrets(str(error.orig).strip(), engine.url)
        raise DatabaseError(f"the database {name} cannot be used: {reason}") from None


def shown_address(engine: sa.Engine) -> str:
    """Return the address of a database without its password and its query, where another one may stand."""
    return engine.url.set(query={}).render_as_string()


def _without_secrets(text: str, url: sa.URL) -> str:
    """Return a text of the database's driver in which nothing of the address stands that may be a password."""
    options = {option.keyword.decode(): option.dispchar == b"*" for option in pq.Conninfo.get_defaults()}
    secrets = [str(url.password or "")]
    for name, values in url.normalized_query.items():
        if name not in options:  # a password that is no option, since an "&" stands in it
            secrets += [name, *values]
        elif options[name]:
            secrets += values
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def wait_until_reachable(engine: sa.Engine, seconds: float) -> None:
    """Return as soon as the database takes a connection, and after this time in any case."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            engine.connect().close()
        except sa.exc.OperationalError:
            time.sleep(min(1.0, max(deadline - time.monotonic(), 0.0)))
        else:
            return


def migrate(engine: sa.Engine) -> None:
    """Migrate the schema to this version.

    Raises:
        DatabaseError: the database refuses, or has the schema of a newer version.
    """
    with database_errors(engine):
        command.upgrade(alembic_config(engine), "head")


def prepare(engine: sa.Engine) -> None:
    """Migrate an SQLite database; check that a PostgreSQL database has been migrated.

    Raises:
        DatabaseError: it cannot be used, or a PostgreSQL database has another schema; the text says what to do.
    """
    if engine.dialect.name == "sqlite":
        migrate(engine)
        return
    with database_errors(engine), engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    expected = ScriptDirectory.from_config(alembic_config(engine)).get_current_head()
    if found != expected:
        raise DatabaseError(
            f"the database has schema {found or 'none'}, this version needs {expected}: back it up, then run "
            "gradwatch migrate --database-url ..."
        )


def read_clock(engine: sa.Engine) -> float:
    """Return the time in Unix seconds by the clock that all servers of a database share."""
    if engine.dialect.name == "sqlite":
        return time.time()
    with engine.connect() as connection:
        return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def size_bytes(connection: sa.Connection) -> int:
    """Return what the database takes on disk, without its write-ahead log."""
    if connection.dialect.name == "postgresql":
        return int(connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar_one())
    pages, size = (connection.execute(sa.text(f"PRAGMA {name}")).scalar_one() for name in ("page_count", "page_size"))
    return int(pages * size)


def batched(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield values in batches for one statement each: PostgreSQL takes 65,535 in one."""
    for begin in range(0, len(values), _VALUES_PER_STATEMENT):
        yield values[begin : begin + _VALUES_PER_STATEMENT]


def upsert(engine: str, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """Return an insert with ON CONFLICT for an engine, ``sqlite`` or ``postgresql``."""
    return postgresql.insert(table) if engine == "postgresql" else sqlite.insert(table)
