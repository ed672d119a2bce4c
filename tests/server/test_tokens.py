"""Tokens from the outside: who may send, read and administer, and where the server may listen."""

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.store.tokens import make_token, well_formed
from tests.processes import GradwatchServer, environment, sample


def token(database: Path, *arguments: str) -> str:
    """Run ``gradwatch token`` and return what it prints."""
    command = [sys.executable, "-m", "gradwatch", "token", "--database-url", f"sqlite:///{database}", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def status(server: GradwatchServer, method: str, path: str, shown: str | None, **options: str | bytes) -> int:
    headers = {"content-type": wire.MESSAGEPACK_TYPE}
    if shown is not None:
        headers["authorization"] = f"Bearer {shown}"
    answer = server.http.request(method, path, headers=headers, content=options.get("content"))
    if answer.status_code in (401, 403):
        assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code


def test_each_scope_allows_its_own_and_no_more(tmp_path: Path) -> None:
    database = tmp_path / "gradwatch.db"
    tokens = {scope: token(database, "create", "--scope", scope) for scope in ("ingest", "read", "admin")}
    with GradwatchServer(database) as server:
        register = wire.encode(wire.Registration(id="run1", parameters=[wire.Parameter("a", [1])]))
        batch = wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0)]))
        asked = {
            ("POST", "/api/v1/runs", register): "ingest",
            ("POST", "/api/v1/runs/run1/samples", batch): "ingest",
            ("GET", "/api/v1/runs/run1", b""): "read",
            ("GET", "/metrics", b""): "read",
        }
        for (method, path, content), scope in asked.items():
            assert status(server, method, path, None, content=content) == 401
            assert status(server, method, path, make_token(), content=content) == 401
            for held, shown in tokens.items():
                found = status(server, method, path, shown, content=content)
                assert found in ((200, 201) if held in (scope, "admin") else (403,)), (method, path, held)
        assert server.http.get("/metrics", auth=("any", tokens["read"])).status_code == 200
        assert server.http.get("/metrics").headers["www-authenticate"] == 'Bearer realm="gradwatch"'
        assert server.http.get("/").status_code == 200, "the page holds no data and asks for the token itself"
        assert server.http.get("/healthz").status_code == 200


def test_a_token_of_a_project_reaches_no_other(tmp_path: Path) -> None:
    database = tmp_path / "gradwatch.db"
    mine = token(database, "create", "--scope", "admin", "--project", "mine")
    everything = token(database, "create", "--scope", "admin")
    with GradwatchServer(database) as server:

        def register(run: str, project: str, shown: str) -> int:
            listed = wire.Registration(id=run, project=project, parameters=[wire.Parameter("a", [1])])
            return status(server, "POST", "/api/v1/runs", shown, content=wire.encode(listed))

        assert register("run1", "mine", mine) == 201
        assert register("run2", "other", mine) == 403
        assert register("run2", "other", everything) == 201
        assert status(server, "GET", "/api/v1/runs/run1", mine) == 200
        assert status(server, "GET", "/api/v1/runs/run2", mine) == 403
        assert status(server, "GET", "/api/v1/runs?project=mine", mine) == 200
        assert status(server, "GET", "/api/v1/runs?project=other", mine) == 403
        assert status(server, "GET", "/api/v1/runs", mine) == 403
        assert status(server, "GET", "/metrics", mine) == 403
        assert register("run2", "mine", mine) == 409


def test_a_revoked_and_an_expired_token_open_nothing(tmp_path: Path) -> None:
    database = tmp_path / "gradwatch.db"
    revoked, expired = (
        token(database, "create", "--scope", "read"),
        token(database, "create", "--scope", "read", "--days", "0"),
    )
    assert token(database, "revoke", token(database, "list").split()[0]).startswith("revoked")
    assert [line.split()[2] for line in token(database, "list").splitlines()] == ["revoked", "expired"]
    with GradwatchServer(database) as server:
        for shown in (revoked, expired):
            assert status(server, "GET", "/api/v1/runs", shown) == 401


@pytest.mark.parametrize("days", ["nan", "inf", "-1", "soon"])
def test_a_time_that_is_none_makes_no_token(tmp_path: Path, days: str) -> None:
    database = tmp_path / "gradwatch.db"
    token(database, "create", "--scope", "read")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        token(database, "create", "--scope", "read", "--days", days)
    assert "--days" in refused.value.stderr
    assert len(token(database, "list").splitlines()) == 1


def test_only_the_digest_is_kept(tmp_path: Path) -> None:
    shown = token(tmp_path / "gradwatch.db", "create", "--scope", "read")
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'gradwatch.db'}")
    with engine.connect() as connection:
        kept = str(connection.execute(sa.text("SELECT * FROM tokens")).all())
    engine.dispose()
    assert shown not in kept
    assert shown[4:20] not in kept


def test_a_mistyped_token_is_recognised() -> None:
    made = make_token()
    assert well_formed(made)
    assert not well_formed(made[:10] + ("0" if made[10] != "0" else "1") + made[11:])


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_only_with_a_token(tmp_path: Path, host: str) -> None:
    database = tmp_path / "gradwatch.db"
    command = [sys.executable, "-m", "gradwatch", "serve", "--host", host, "--port", "0"]
    command += ["--database-url", f"sqlite:///{database}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gradwatch token create --scope admin" in done.stderr


@pytest.mark.parametrize("host", ["evil.example:{port}", "127.0.0.1.evil.example", "[::1", "192.0.2.1", ""])
def test_a_name_that_another_site_has_led_here_reads_and_changes_nothing(server: GradwatchServer, host: str) -> None:
    run = server.register()
    host = host.format(port=server.url.rpartition(":")[2])
    for method, path in (("GET", f"/api/v1/runs/{run}"), ("DELETE", f"/api/v1/runs/{run}"), ("GET", "/metrics")):
        refused = server.http.request(method, path, headers={"host": host, "origin": f"http://{host}"})
        assert (refused.status_code, refused.headers["content-type"]) == (421, "application/problem+json")
        assert repr(host) in refused.json()["detail"]
        assert "public_url" in refused.json()["detail"]
    assert server.http.get("/readyz", headers={"host": host}).status_code == 200, "a probe may call it by any name"
    assert server.get(f"/api/v1/runs/{run}")["id"] == run


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8321"])
def test_the_machine_itself_is_called_by_any_of_its_names(server: GradwatchServer, host: str) -> None:
    assert server.http.get("/api/v1/runs", headers={"host": host}).status_code == 200


def test_with_a_token_a_server_is_called_by_any_name(tmp_path: Path) -> None:
    shown = token(tmp_path / "gradwatch.db", "create", "--scope", "read")
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        headers = {"host": "server:8321", "authorization": f"Bearer {shown}"}
        assert server.http.get("/metrics", headers=headers).status_code == 200
