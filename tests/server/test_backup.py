"""The backup and the restore that docs/operate.md describes, run as they stand there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from gradwatch import wire
from tests.postgres import binaries, started_server
from tests.processes import PATIENCE_SECONDS, ROOT, GradwatchServer, environment, sample


def documented_commands(engine: str) -> list[str]:
    """Return the commands of the section on backup and restore that are for SQLite or PostgreSQL, one a line."""
    section = (ROOT / "docs" / "operate.md").read_text().split("## Backup and restore\n")[1].split("\n## ")[0]
    (commands,) = re.findall(rf"{engine}[^\n]*:\n\n```sh\n(.*?)\n```", section, re.DOTALL)
    return str(commands).splitlines()


def test_an_sqlite_file_that_is_restored_is_what_was_backed_up(tmp_path: Path) -> None:
    back_up, restore = documented_commands("SQLite")
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        run = server.register(["first.weight"])
        server.store(run, wire.Batch(id="before", samples=[sample(step, 1.0) for step in range(1, 101)]))
        before = server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="first.weight")
        subprocess.run(["sh", "-c", back_up], cwd=tmp_path, check=True)
        server.store(run, wire.Batch(id="after", samples=[sample(step, 2.0) for step in range(101, 201)]))
        server.kill()  # it leaves a write-ahead log, which must not be applied to the copy
        subprocess.run(["sh", "-c", restore], cwd=tmp_path, check=True)
        server.start()
        after = server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="first.weight")
        assert after == before


@pytest.fixture
def url() -> Iterator[sa.URL]:
    """The address of a database with the name that the documentation uses, in a PostgreSQL of this test alone."""
    with started_server(folder=os.environ.get("PYTEST_DEBUG_TEMPROOT", "/tmp")) as server_url:
        address = sa.make_url(server_url).set(drivername="postgresql+psycopg")
        admin = sa.create_engine(address, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sa.text("CREATE DATABASE gradwatch"))
        admin.dispose()
        yield sa.make_url(server_url).set(database="gradwatch")


def run_beside(url: sa.URL, command: str, folder: Path) -> None:
    """Run what is documented to be run in the container of PostgreSQL; a warning or an error is a failure."""
    inside = re.sub(r"^docker compose exec (-T )?postgres ", "", command)
    place = environment(PGHOST=str(url.host), PGPORT=str(url.port), PATH=f"{binaries()}:{os.environ['PATH']}")
    done = subprocess.run(
        ["sh", "-c", inside],
        cwd=folder,
        env=place,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), inside


def test_what_is_restored_is_what_was_backed_up(url: sa.URL, tmp_path: Path) -> None:
    address = url.render_as_string(hide_password=False)
    subprocess.run(
        [sys.executable, "-m", "gradwatch", "migrate", "--database-url", address], env=environment(), check=True
    )
    with GradwatchServer(tmp_path / "gradwatch.db", url=address) as server:
        run = server.register(["first.weight"])
        server.store(run, wire.Batch(id="before", samples=[sample(step, 1.0) for step in range(1, 101)]))
        before = server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="first.weight")
        for command in documented_commands("PostgreSQL"):
            if command == "docker compose stop server":
                server.store(run, wire.Batch(id="after", samples=[sample(step, 2.0) for step in range(101, 201)]))
                server.stop()
            elif command == "docker compose start server":
                server.start()
            else:
                run_beside(url, command, tmp_path)
        after = server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="first.weight")
        assert after == before
        server.store(run, wire.Batch(id="later", samples=[sample(101, 3.0)]))
        assert server.get(f"/api/v1/runs/{run}")["last_step"] == 101
