"""What a database may do to a server and its commands: give other numbers back, change meanwhile, stand still, go."""

import contextlib
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec
import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.store.database import open_engine, prepare, shrink_log, writing
from tests.postgres import migrated_database, plain_owner, postgres_database, started_server
from tests.processes import GradwatchServer, environment, free_port, sample


def _command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradwatch", *arguments]
    return subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, check=False)


def _says(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_scalar_of_any_size_is_told_as_the_number_that_it_was(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    scalars: dict[str, wire.Number] = {"huge": 1e300, "exploded": 1e20, "whole": 3.0, "bad": "NaN"}
    measured = msgspec.structs.replace(sample(1, 1.0), scalars=scalars)
    assert shared_server.store(run, wire.Batch(id="b", samples=[measured])).status_code == 200
    for path in (f"/api/v1/runs/{run}/latest", f"/api/v1/runs/{run}"):
        assert shared_server.get(path)["scalars"] == scalars
        assert '"whole":3.0' in shared_server.http.get(path).text


def test_all_reads_of_an_answer_see_one_state(engine: sa.Engine) -> None:
    count = sa.text("SELECT count(*) FROM silences")
    silence = "INSERT INTO silences VALUES ('s', '*', '*', '*', 'me', '', 0, 1)"
    with engine.connect() as connection:
        before = connection.scalar(count)
        with writing(engine) as other:
            other.execute(sa.text(silence))
        assert connection.scalar(count) == before
    with engine.connect() as connection:
        assert connection.scalar(count) == before + 1
        if engine.dialect.name == "postgresql":
            with pytest.raises(sa.exc.InternalError, match="read-only"):
                connection.execute(sa.text(silence))
    with writing(engine) as connection:
        connection.execute(sa.text("DELETE FROM silences"))


def test_no_statement_waits_for_a_compiler(postgres: str) -> None:
    engine = open_engine(postgres)
    with engine.connect() as reader, writing(engine) as writer:
        assert [connection.scalar(sa.text("SHOW jit")) for connection in (reader, writer)] == ["off", "off"]
    engine.dispose()


def test_a_connection_that_has_been_used_is_used_again(postgres: str) -> None:
    engine = open_engine(postgres)
    number = sa.text("SELECT pg_backend_pid()")
    with engine.connect() as one, engine.connect() as other, engine.connect() as third:
        assert len({connection.scalar(number) for connection in (one, other, third)}) == 3
    found = set()
    for _ in range(3):
        with engine.connect() as connection:
            found.add(connection.scalar(number))
    engine.dispose()
    assert len(found) == 1


READS = (
    "",
    "/series?statistic=ratio&parameter=a",
    "/series?statistic=ratio",
    "/series?statistic=loss",
    "/series?statistic=loss&parameter=a",
    "/map",
    "/tile",
    "/profile",
    "/latest",
    "/clip-advice",
)


@pytest.mark.parametrize("read", READS)
def test_a_run_that_is_not_known_is_told_as_such(shared_server: GradwatchServer, read: str) -> None:
    answer = shared_server.http.get(f"/api/v1/runs/nowhere{read}")
    assert (answer.status_code, answer.json()["title"]) == (404, "Unknown run")
    assert "'nowhere' is not known here" in answer.json()["detail"]


def test_a_server_whose_database_stands_still_lives(postgres: str, tmp_path: Path) -> None:
    with migrated_database(postgres) as url, GradwatchServer(tmp_path / "server.db", url=url) as server:
        engine = open_engine(url)
        with engine.connect() as connection:
            connection.execute(sa.text("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE"))
            asked = threading.Barrier(46)

            def ask() -> None:
                with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
                    asked.wait()
                    assert http.get("/api/v1/runs").status_code in (200, 503)

            readers = [threading.Thread(target=ask) for _ in range(45)]
            for reader in readers:
                reader.start()
            asked.wait()
            assert [server.http.get("/healthz").status_code for _ in range(20)] == [200] * 20
        for reader in readers:
            reader.join()
        engine.dispose()


@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced"])
def test_nothing_is_acknowledged_for_a_file_that_is_not_there(server: GradwatchServer, fate: str) -> None:
    run = server.register(["a"])
    assert server.store(run, wire.Batch(id="b1", samples=[sample(1, 1.0)])).status_code == 200
    path = server.database
    away = path.rename(path.with_name("away.db"))
    if fate == "deleted":
        away.unlink()
    if fate == "replaced":
        path.touch()
    refused = server.store(run, wire.Batch(id="b2", samples=[sample(2, 1.0)]))
    assert refused.status_code == 503
    assert "was deleted or moved" in refused.json()["detail"]
    assert server.http.get("/readyz").status_code == server.http.get("/api/v1/runs").status_code == 503
    assert path.exists() == (fate == "replaced")
    if fate == "moved":
        away.rename(path)
        assert server.store(run, wire.Batch(id="b2", samples=[sample(2, 1.0)])).status_code == 200
        assert server.get(f"/api/v1/runs/{run}")["sample_count"] == 2


@pytest.mark.parametrize("command", [["export", "a"], ["token", "list"], ["prune", "--config", "a.toml"]])
def test_what_only_reads_makes_no_database(tmp_path: Path, command: Sequence[str]) -> None:
    """In the wrong folder it would look as if there were no runs."""
    (tmp_path / "a.toml").write_text("")
    _says(_command(tmp_path, *command), f"there is no database {tmp_path / 'gradwatch.db'}")
    assert not (tmp_path / "gradwatch.db").exists()


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_port_that_is_none_is_refused_in_words(tmp_path: Path, port: str) -> None:
    refused = _command(tmp_path, "serve", f"--port={port}")
    assert refused.returncode == 2
    assert f"{port!r} is not a port: a whole number from 0 to 65535" in refused.stderr


def test_a_host_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    made = _command(tmp_path, "token", "create", "--scope", "admin")
    assert (made.returncode, "in sqlite:///gradwatch.db" in made.stderr) == (0, True)
    _says(_command(tmp_path, "serve", "--port=0", "--host=192.0.2.1"), "choose another with --host")


_COMMANDS = [["serve", "--port", "0"], ["migrate"], ["token", "list"], ["export", "a"]]


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda command: command[0])
def test_a_database_of_a_newer_version_is_refused_in_words(tmp_path: Path, command: Sequence[str]) -> None:
    assert _command(tmp_path, "migrate").returncode == 0
    with sqlite3.connect(tmp_path / "gradwatch.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999_later'")
    _says(_command(tmp_path, *command), "upgrade gradwatch")


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda command: command[0])
def test_a_file_that_is_no_database_is_refused_in_words(tmp_path: Path, command: Sequence[str]) -> None:
    (tmp_path / "gradwatch.db").write_text("these are notes, and no database\n" * 100)
    _says(_command(tmp_path, *command), "file is not a database")


def test_a_migration_waits_for_a_database_that_is_still_starting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as early:
        early.settimeout(60.0)
        port = early.getsockname()[1]
        url = f"postgresql://gradwatch@127.0.0.1:{port}/postgres"
        _says(_command(tmp_path, "migrate", "--database-url", f"{url}?connect_timeout=2"), "cannot be used")
        early.accept()[0].close()
        command = [sys.executable, "-m", "gradwatch", "migrate", "--wait", "120", "--database-url", url]
        waiting = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        early.accept()[0].close()
    with started_server(port=port):
        assert "has the schema of this version" in waiting.communicate(timeout=60.0)[0]
    assert waiting.returncode == 0


@pytest.mark.parametrize("seconds", ["nan", "inf", "3601", "a minute"])
def test_a_wait_without_end_is_refused_in_words(tmp_path: Path, seconds: str) -> None:
    refused = _command(tmp_path, "migrate", "--wait", seconds)
    assert (refused.returncode, f"'{seconds}' is not a number of seconds from 0 to 3600" in refused.stderr) == (2, True)


def test_health_is_an_exit_code(server: GradwatchServer, tmp_path: Path) -> None:
    ready = _command(tmp_path, "health", "--url", server.url)
    assert (ready.returncode, ready.stdout) == (0, "ready\n")
    assert server.stop() == 0
    _says(_command(tmp_path, "health", "--url", server.url), "is the server running?")


def test_a_role_without_rights_is_refused_in_words(postgres: str, tmp_path: Path) -> None:
    with postgres_database(postgres) as url, plain_owner(url) as plain_url:
        assert _command(tmp_path, "migrate", "--database-url", url).returncode == 0
        for command in (["migrate"], ["token", "list"]):
            _says(_command(tmp_path, command[0], "--database-url", plain_url, *command[1:]), "permission denied")


def test_a_client_that_hangs_up_is_no_error_of_the_server(server: GradwatchServer) -> None:
    run = server.register(["a"])
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        head = f"POST /api/v1/runs/{run}/samples HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall((head + "Content-Length: 1000\r\n\r\n{").encode())
        client.shutdown(socket.SHUT_WR)
        client.recv(1)  # until the server has seen it
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_the_write_ahead_log_shrinks_after_a_long_snapshot(tmp_path: Path) -> None:
    file, log = tmp_path / "gradwatch.db", tmp_path / "gradwatch.db-wal"
    engine = open_engine(f"sqlite:///{file}")
    prepare(engine)
    with contextlib.closing(sqlite3.connect(file)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM runs").fetchall()
        with writing(engine) as connection:
            connection.execute(sa.text("CREATE TABLE large (content BLOB)"))
            connection.execute(sa.text("INSERT INTO large VALUES (randomblob(40000000))"))
        shrink_log(engine)
        assert log.stat().st_size > 40_000_000
    with contextlib.closing(sqlite3.connect(file)) as reader:  # another one holds what is there now, as ever
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM runs").fetchall()
        shrink_log(engine)
    shrink_log(engine)
    assert log.stat().st_size == 0
    engine.dispose()
