"""Every route declares who may call it, and a body is not read before that is checked."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from gradwatch import wire
from gradwatch_server.api.authorisation import OPEN, AuthorisedRoute, declared_access, requires
from gradwatch_server.api.routes.page import PageFiles
from gradwatch_server.app import create_app
from gradwatch_server.settings import Settings
from tests.processes import PATIENCE_SECONDS, GradwatchServer, sample
from tests.server.test_tokens import token

OPEN_PATHS = ("/healthz", "/readyz", "/api/v1/session")


def _undeclared(app: FastAPI) -> list[str]:
    """Return the paths of the routes that declare no authorisation; the page's files are open to everybody."""
    found = []
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, Mount) and isinstance(getattr(route.app, "app", None), PageFiles):  # within compression
            continue
        if not isinstance(route, AuthorisedRoute) or declared_access(context.dependencies) is not route.access:
            found.append(str(context.path))
    return found


def _app() -> FastAPI:
    settings = Settings(database_url="sqlite://")
    return create_app(settings, sa.create_engine(settings.database_url))


def test_every_route_declares_who_may_call_it() -> None:
    app = _app()
    assert len(list(iter_route_contexts(app.routes))) > 35
    assert _undeclared(app) == []


def test_a_route_that_declares_nothing_is_found() -> None:
    app = _app()
    app.add_api_route("/forgotten", lambda: None)
    app.mount("/other", PlainTextResponse("anything"))
    plain = APIRouter(prefix="/plain")
    plain.add_api_route("/one", lambda: None, dependencies=[requires("read")])  # of a class that knows nothing of it
    app.include_router(plain)
    assert _undeclared(app) == ["/forgotten", "/other", "/plain/one"]


def test_a_route_that_declares_nothing_is_not_made() -> None:
    router = APIRouter(route_class=AuthorisedRoute)
    router.add_api_route("/declared", lambda: None, dependencies=[OPEN])
    with pytest.raises(TypeError, match="route /forgotten declares no authorisation"):
        router.add_api_route("/forgotten", lambda: None)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GradwatchServer, dict[str, str]]]:
    """A server that requires tokens, with a run of each of two projects, and a token of each kind."""
    database: Path = tmp_path_factory.mktemp("guarded") / "gradwatch.db"
    tokens = {scope: token(database, "create", "--scope", scope) for scope in ("ingest", "read", "admin")}
    tokens["mine"] = token(database, "create", "--scope", "admin", "--project", "mine")
    with GradwatchServer(database, "--webhook", "http://127.0.0.1:9/") as server:
        headers = {"authorization": f"Bearer {tokens['admin']}", "content-type": wire.MESSAGEPACK_TYPE}
        for project in ("mine", "other"):
            run = wire.Registration(id=f"run-{project}", project=project, parameters=[wire.Parameter("a", [1])])
            ill = wire.Batch(id="b", samples=[sample(1, float("nan"))])
            for path, document in (("/api/v1/runs", run), (f"/api/v1/runs/{run.id}/samples", ill)):
                answer = server.http.post(path, content=wire.encode(document), headers=headers)
                assert answer.is_success, answer.text
        yield server, tokens


@pytest.fixture(scope="module")
def operations(guarded: tuple[GradwatchServer, dict[str, str]]) -> dict[tuple[str, str], Any]:
    server, tokens = guarded
    described = server.http.get("/openapi.json", headers={"authorization": f"Bearer {tokens['mine']}"}).json()
    return {(method.upper(), path): one for path, all_ in described["paths"].items() for method, one in all_.items()}


def _expected_scope(method: str, path: str) -> str | None:
    if path in OPEN_PATHS:
        return None
    if method == "GET":
        return "ingest" if path == "/api/v1/resumable" else "read"
    return "ingest" if path in ("/api/v1/runs", "/api/v1/runs/{run_id}/samples") and method == "POST" else "admin"


def _status(server: GradwatchServer, method: str, path: str, shown: str | None, **query: str) -> int:
    headers = {} if shown is None else {"authorization": f"Bearer {shown}"}
    path = re.sub(r"\{\w+\}", "unknown", path)
    with server.http.stream(method, path, headers=headers, params=query) as answer:
        return answer.status_code


def test_each_operation_requires_the_scope_that_it_describes(
    guarded: tuple[GradwatchServer, dict[str, str]], operations: dict[tuple[str, str], Any]
) -> None:
    server, tokens = guarded
    assert len(operations) > 30
    for (method, path), operation in operations.items():
        scope = _expected_scope(method, path)
        if scope is None:
            assert operation["security"] == [], path
            assert method == "POST" or _status(server, method, path, None) < 300
            continue
        assert operation["security"] == [{"token": [scope]}, {"password": [scope]}, {}], path
        assert {"401", "403", "421"} <= operation["responses"].keys()
        assert _status(server, method, path, None) == 401, path
        for held in ("ingest", "read", "admin"):
            allowed = held in (scope, "admin")
            assert (_status(server, method, path, tokens[held]) not in (401, 403)) == allowed, (method, path, held)


ONE_OF_PROJECT = re.compile(r"/api/v1/(runs|alerts|deliveries)/\{\w+\}")
LISTS_OF_PROJECT = {("GET", f"/api/v1/{kind}") for kind in ("runs", "alerts", "stream", "resumable")}
IN_DOCUMENT = {("POST", "/api/v1/runs"), ("POST", "/api/v1/silences")}


def test_a_token_of_one_project_is_for_that_project_only(
    guarded: tuple[GradwatchServer, dict[str, str]], operations: dict[tuple[str, str], Any]
) -> None:
    server, tokens = guarded
    everything = {"authorization": f"Bearer {tokens['admin']}"}
    alerts = {alert["run"]: alert["id"] for alert in server.http.get("/api/v1/alerts", headers=everything).json()}
    sent = {one["alert"]: one["id"] for one in server.http.get("/api/v1/deliveries", headers=everything).json()}
    identities = {
        project: {"runs": run, "alerts": alerts[run], "deliveries": sent[alerts[run]]}
        for project in ("mine", "other")
        for run in [f"run-{project}"]
    }
    for method, path in operations:
        if path in OPEN_PATHS or (method, path) == ("DELETE", "/api/v1/runs/{id}"):
            continue
        if (method, path) in LISTS_OF_PROJECT:
            assert _status(server, method, path, tokens["mine"]) == 403, path
            assert _status(server, method, path, tokens["mine"], project="other") == 403, path
            assert _status(server, method, path, tokens["mine"], project="mine") == 200, path
        elif one := ONE_OF_PROJECT.match(path):
            for project, allowed in (("mine", True), ("other", False)):
                found = path.replace(one[0], f"/api/v1/{one[1]}/{identities[project][one[1]]}")
                assert (_status(server, method, found, tokens["mine"]) != 403) == allowed, (method, path, project)
        else:
            assert (_status(server, method, path, tokens["mine"]) != 403) == ((method, path) in IN_DOCUMENT), path


def test_a_document_that_names_another_project_is_refused(guarded: tuple[GradwatchServer, dict[str, str]]) -> None:
    server, tokens = guarded
    headers = {"authorization": f"Bearer {tokens['mine']}"}
    for project, status in (("mine", 201), ("other", 403), ("*", 403)):
        silence = {"project": project, "author": "kim", "ends_at": 4e9}
        assert server.http.post("/api/v1/silences", json=silence, headers=headers).status_code == status


def test_the_body_of_a_refused_request_is_not_read(
    guarded: tuple[GradwatchServer, dict[str, str]], operations: dict[tuple[str, str], Any]
) -> None:
    server, _ = guarded
    with_body = [key for key, operation in operations.items() if "requestBody" in operation]
    assert len(with_body) == 5
    for method, path in with_body:
        more = "" if _expected_scope(method, path) else "Origin: http://evil.example\r\n"
        head = f"{method} {re.sub(r'{.*?}', 'x', path)} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n{more}"
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), PATIENCE_SECONDS) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            answer = connection.recv(100)
        assert answer.startswith(b"HTTP/1.1 403 " if more else b"HTTP/1.1 401 "), (path, answer)


def test_what_is_left_of_a_deleted_run_is_of_no_project(tmp_path: Path) -> None:
    database = tmp_path / "gradwatch.db"
    admin = {"authorization": f"Bearer {token(database, 'create', '--scope', 'admin')}"}
    mine = {"authorization": f"Bearer {token(database, 'create', '--scope', 'admin', '--project', 'mine')}"}
    with GradwatchServer(database, "--webhook", "http://127.0.0.1:9/") as server:
        run = wire.Registration(id="run-secret", project="secret", parameters=[wire.Parameter("a", [1])])
        ill = wire.Batch(id="b", samples=[sample(1, float("nan"))])
        for path, document in (("/api/v1/runs", run), (f"/api/v1/runs/{run.id}/samples", ill)):
            headers = admin | {"content-type": wire.MESSAGEPACK_TYPE}
            assert server.http.post(path, content=wire.encode(document), headers=headers).is_success
        (delivery,) = server.http.get("/api/v1/deliveries", headers=admin).json()
        sent = f"/api/v1/deliveries/{delivery['id']}"
        asked = [("GET", f"/api/v1/alerts/{delivery['alert']}/deliveries"), ("GET", sent), ("POST", f"{sent}/replay")]
        assert [server.http.request(*one, headers=mine).status_code for one in asked] == [403] * 3
        assert server.http.delete(f"/api/v1/runs/{run.id}", headers=admin).status_code == 204
        for method, path in asked:
            hidden = server.http.request(method, path, headers=mine)
            assert (hidden.status_code, hidden.json()["title"].split()[0]) == (404, "Unknown"), path
            assert server.http.request(method, path, headers=admin).status_code == 200, path
