"""What everybody gets to see without a token: no host, no password, no error without its headers."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from gradwatch_server.store.database import open_engine, writing
from gradwatch_server.store.tokens import create
from tests.postgres import migrated_database
from tests.processes import PATIENCE_SECONDS, GradwatchServer, environment, wait_for

SECURITY_HEADERS = {"content-security-policy", "x-content-type-options", "referrer-policy", "cache-control"}
GOT = ("/healthz", "/readyz", "/metrics", "/", "/runs/any", "/api/v1/runs", "/openapi.json", "/page/js/main.js")


def until(answer: Callable[[], httpx.Response], status: int) -> httpx.Response:
    """Ask until this status is answered; return that response."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (given := answer()).status_code != status:
        assert time.monotonic() < deadline, given.text
        threading.Event().wait(0.1)
    return given


def test_where_the_database_is_nobody_hears_without_a_token(postgres: str, tmp_path: Path) -> None:
    with migrated_database(postgres) as url:
        engine = open_engine(url)
        with writing(engine) as connection:
            _, token = create(connection, "read", None, None)
        engine.dispose()
        with GradwatchServer(tmp_path / "server.db", url=url) as server:
            address = sa.make_url(postgres)
            admin = sa.create_engine(address.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
            with admin.connect() as connection:
                name = sa.make_url(url).database
                connection.execute(sa.text(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false"))
                ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                connection.execute(sa.text(ended), {"name": name})
            admin.dispose()
            told = [until(partial(server.http.get, path), 503) for path in ("/api/v1/runs", "/readyz")]
            login = until(lambda: server.http.post("/api/v1/session", json={"token": token}), 503)
            for answer in (*told, login):
                assert answer.json()["title"] == "Database out of reach"
                for secret in (str(address.host), str(address.port), str(name), str(address.username)):
                    assert secret not in answer.text


def _command(*arguments: str) -> str:
    command = [sys.executable, "-m", "gradwatch", *arguments]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 1
    return ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://gw:hunter2@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=gw&password=hunter2",
        "postgresql://gw@127.0.0.1:1/x?sslpassword=hunter2",
        "postgresql://gw:hunter2@127.0.0.1:1/x?hunter2=1",
        "postgresql:/gw:hunter2@127.0.0.1:1/x",
        "postgresql://gw:hunter2@127.0.0.1:port/x",
        "postgresql://gw:hunter2@[::1/x",
        "postgres//gw:hunter2@h/x",
        "mysql://gw:hunter2@h/x",
    ],
)
def test_no_command_prints_a_password_of_the_databases_address(address: str) -> None:
    said = _command("token", "list", "--database-url", address)
    assert "hunter2" not in said
    assert "Traceback" not in said
    assert "database" in said


def test_head_is_answered_where_get_is(server: GradwatchServer) -> None:
    for path in GOT:
        got, head = server.http.get(path), server.http.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        for name in ("content-type", *SECURITY_HEADERS):
            assert head.headers.get(name) == got.headers.get(name), (path, name)
    assert server.http.head("/api/v1/stream").status_code == 200, "a stream ends with its headers"
    refused = server.http.head("/api/v1/runs/any/samples")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert server.http.put("/healthz").headers["allow"] == "GET, HEAD"
    assert 'method="HEAD",route="/healthz",status="200"' in server.http.get("/metrics").text


@pytest.mark.parametrize("path", ["/healthz/", "/page", "/api/v1/runs/"])
def test_no_path_leads_to_the_host_that_a_request_names(server: GradwatchServer, path: str) -> None:
    answer = server.http.get(path, headers={"host": "evil.example"}, follow_redirects=False)
    assert "location" not in answer.headers
    assert answer.status_code in (404, 421)


def test_no_authorization_is_an_error_of_the_server(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'gradwatch.db'}")
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        with writing(engine) as connection:
            create(connection, "read", None, None)
        until(lambda: server.http.get("/api/v1/runs"), 401)
        wrong = [b"Basic \xe9\xe9", b"Basic", b"Basic AAAA=A", b"Basic " + b"A" * 30_000, b"Bearer \xe9", b"\xff"]
        for given in wrong:
            assert server.http.get("/api/v1/runs", headers={b"authorization": given}).status_code == 401, given
        assert server.http.get("/api/v1/runs", headers={b"cookie": b"gradwatch_token=\xe9"}).status_code == 401
        assert "Traceback" not in server.log.read_text()
    engine.dispose()


def test_an_error_of_the_server_has_the_security_headers_and_is_counted(server: GradwatchServer) -> None:
    run = server.register()
    with sqlite3.connect(server.database) as connection:
        connection.execute("UPDATE runs SET attributes = '{' WHERE id = ?", [run])
    connection.close()
    failed = server.http.get(f"/api/v1/runs/{run}")
    assert (failed.status_code, json.loads(failed.content)["title"]) == (500, "Internal error")
    assert failed.headers["content-type"] == "application/problem+json"
    assert failed.headers.keys() >= SECURITY_HEADERS
    wait_for(server.log, "Traceback")
    with sqlite3.connect(server.database) as connection:
        connection.execute("DELETE FROM runs")
    connection.close()
    counted = 'gradwatch_http_request_duration_seconds_count{method="GET",route="/api/v1/runs/{id}",status="500"} 1.0'
    assert counted in server.http.get("/metrics").text
