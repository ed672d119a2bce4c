"""A server with tokens: the page asks once, keeps the token out of reach of scripts, and changes only what it may."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from gradwatch_server.store.database import open_engine, prepare, writing
from gradwatch_server.store.tokens import Scope, create, make_token, revoke
from tests.page import planted
from tests.page.conftest import open_run
from tests.processes import GradwatchServer


@dataclass
class Locked:
    """A server that asks for tokens, and one token of each kind; ``held`` is the admin's."""

    server: GradwatchServer
    tokens: dict[str, str]
    ids: dict[str, str]
    run: str

    def revoke(self, name: str) -> None:
        engine = open_engine(f"sqlite:///{self.server.database}")
        with writing(engine) as connection:
            assert revoke(connection, self.ids[name])
        engine.dispose()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    with _locked(tmp_path / "locked.db") as one:
        yield one


@contextmanager
def _locked(database: Path, *options: str) -> Iterator[Locked]:
    engine = open_engine(f"sqlite:///{database}")
    prepare(engine)
    wanted: dict[str, tuple[Scope, str | None]] = {
        "admin": ("admin", None),
        "read": ("read", None),
        "ingest": ("ingest", None),
        "mine": ("admin", "demo"),
    }
    with writing(engine) as connection:
        made = {name: create(connection, scope, project, None) for name, (scope, project) in wanted.items()}
    engine.dispose()
    tokens = {name: token for name, (_, token) in made.items()}
    with GradwatchServer(database, *options) as server:
        with httpx.Client(base_url=server.url, headers=bearer(tokens["admin"]), trust_env=False) as http:
            run, other = planted.Run("secret"), planted.Run("hidden", project="other")
            run_id = run.register(http)
            run.send(http, run_id, range(60))
            other.register(http)
        yield Locked(server, tokens, {name: token_id for name, (token_id, _) in made.items()}, run_id)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def log_in(page: Page, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()


def test_the_page_asks_once_and_leads_where_one_wanted_to_go(
    tolerant_page: Page, context: BrowserContext, locked: Locked
) -> None:
    page = tolerant_page
    page.goto(f"{locked.server.url}/runs/{locked.run}?step=7")
    expect(page.get_by_label("Token")).to_be_focused()
    expect(page.get_by_role("navigation")).to_be_hidden()
    log_in(page, make_token())
    expect(page.get_by_role("alert")).to_contain_text("mistyped, revoked or of another server")
    log_in(page, locked.tokens["ingest"])
    expect(page.get_by_role("alert")).to_contain_text("this takes one with scope 'read'")

    log_in(page, locked.tokens["read"])

    page.wait_for_selector("main[data-drawn]")
    assert "step=7" in page.url
    expect(page.locator("#connection")).to_have_text("Live")
    expect(page.locator("#session")).to_contain_text("read only")
    (cookie,) = context.cookies()
    port = locked.server.url.rpartition(":")[2]
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (f"gradwatch_token_{port}", True, "Strict")
    assert locked.tokens["read"] not in page.evaluate("document.cookie + JSON.stringify(localStorage) + location")
    page.reload()
    page.wait_for_selector("main[data-drawn]")
    second = context.new_page()
    second.goto(locked.server.url)
    expect(second.get_by_role("link", name="secret")).to_be_visible()


def test_logging_out_forgets_the_token(tolerant_page: Page, context: BrowserContext, locked: Locked) -> None:
    page = tolerant_page
    page.goto(locked.server.url)
    log_in(page, locked.tokens["admin"])
    expect(page.get_by_role("link", name="secret")).to_be_visible()

    page.get_by_role("button", name="Log out").click()

    expect(page.get_by_label("Token")).to_be_visible()
    assert context.cookies() == []
    page.go_back()
    expect(page.get_by_text("secret")).to_have_count(0)


def test_two_servers_on_one_host_leave_each_others_login_alone(
    tolerant_page: Page, context: BrowserContext, locked: Locked, tmp_path: Path
) -> None:
    """A browser sends a host's cookies to all of its ports."""
    page = tolerant_page
    with _locked(tmp_path / "second.db") as second:
        for one in (locked, second):
            page.goto(one.server.url)
            log_in(page, one.tokens["admin"])
            expect(page.get_by_role("link", name="secret")).to_be_visible()
        assert len(context.cookies()) == 2
        page.goto(locked.server.url)
        expect(page.get_by_role("link", name="secret")).to_be_visible()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Token")).to_be_visible()
        page.goto(second.server.url)
        expect(page.get_by_role("link", name="secret")).to_be_visible()


def test_a_cookie_is_named_by_where_people_reach_the_server(tmp_path: Path) -> None:
    """Behind a proxy the servers' own ports say nothing, and those that share the load share a login."""
    config = tmp_path / "gradwatch.toml"
    config.write_text('public_url = "https://gradwatch.example.org"\n')
    with _locked(tmp_path / "proxied.db", "--config", str(config)) as proxied:
        told = proxied.server.http.post("/api/v1/session", json={"token": proxied.tokens["read"]})
    assert told.headers["set-cookie"].startswith("gradwatch_token=")
    assert "secure" in told.headers["set-cookie"].lower()


def test_a_token_that_ends_while_the_page_is_open_is_asked_for_again(tolerant_page: Page, locked: Locked) -> None:
    page = tolerant_page
    page.goto(locked.server.url)
    log_in(page, locked.tokens["read"])
    expect(page.get_by_role("link", name="secret")).to_be_visible()

    locked.revoke("read")

    expect(page.get_by_label("Token")).to_be_visible(timeout=40_000)
    log_in(page, locked.tokens["admin"])
    expect(page.get_by_role("link", name="secret")).to_be_visible()


def test_a_token_of_one_project_shows_that_project(tolerant_page: Page, locked: Locked) -> None:
    page = tolerant_page
    page.goto(locked.server.url)
    log_in(page, locked.tokens["mine"])

    expect(page.get_by_role("link", name="secret")).to_be_visible()
    expect(page.get_by_text("hidden")).to_have_count(0)
    expect(page.locator("#connection")).to_have_text("Live")
    expect(page.locator("#session")).to_contain_text("admin, project demo")
    expect(page.get_by_role("link", name="Server")).to_be_hidden()
    page.get_by_role("link", name=re.compile("Alerts")).click()
    expect(page.get_by_text("Nothing is wrong")).to_be_visible()
    open_run(page, f"{locked.server.url}/runs/{locked.run}")


def test_without_tokens_nothing_is_asked(page: Page, server: GradwatchServer) -> None:
    page.goto(server.url)

    expect(page.get_by_text("No run has reported yet")).to_be_visible()
    expect(page.get_by_role("button", name="Log out")).to_have_count(0)
    assert server.get("/api/v1/session") == {"login": False, "scope": "admin", "project": None}


def test_the_cookie_reads_and_only_an_admins_changes(locked: Locked) -> None:
    http, url = locked.server.http, locked.server.url
    silence = {"author": "me", "ends_at": 4e9}
    assert http.get("/api/v1/session").json() == {"login": True, "scope": None, "project": None}
    for name, status in (("read", 403), ("admin", 201)):
        told = http.post("/api/v1/session", json={"token": locked.tokens[name]}, headers={"origin": url})
        assert told.json() == {"login": True, "scope": name, "project": None}
        set_cookie = told.headers["set-cookie"].lower()
        assert {"httponly", "samesite=strict", "path=/"} <= set(set_cookie.split("; "))
        assert "secure" not in set_cookie, "the test's server speaks http"
        assert http.get("/api/v1/runs").status_code == 200
        answer = http.post("/api/v1/silences", json=silence, headers={"origin": url})
        assert answer.status_code == status, answer.text
    for name, status in (("ingest", 403), ("admin", 401)):
        token = locked.tokens[name] + ("" if status == 403 else "0")
        answer = http.post("/api/v1/session", json={"token": token}, headers={"origin": url})
        assert answer.status_code == status
        assert "set-cookie" not in answer.headers
    assert http.delete("/api/v1/session", headers={"origin": url}).status_code == 204
    assert http.get("/api/v1/runs").status_code == 401


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://127.0.0.1:1"}, False),
        ({"origin": "http://127.0.0.1.evil.example"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({}, False),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"origin": "HERE"}, True),
    ],
)
def test_no_other_sites_page_changes_anything_with_the_cookie(
    locked: Locked, headers: dict[str, str], allowed: bool
) -> None:
    http, silence = locked.server.http, {"author": "me", "ends_at": 4e9}
    http.post("/api/v1/session", json={"token": locked.tokens["admin"]})
    given = {name: value.replace("HERE", locked.server.url) for name, value in headers.items()}

    answer = http.post("/api/v1/silences", json=silence, headers=given)

    assert answer.status_code == (201 if allowed else 403), answer.text
    assert http.get("/api/v1/silences").json() == ([answer.json()] if allowed else [])


def test_another_sites_page_changes_nothing_where_no_token_is_asked_for(server: GradwatchServer) -> None:
    silence = {"author": "me", "ends_at": 4e9}
    refused = server.http.post("/api/v1/silences", json=silence, headers={"origin": "https://evil.example"})
    assert refused.status_code == 403
    assert refused.headers["content-type"] == "application/problem+json"
    assert server.http.post("/api/v1/silences", json=silence).status_code == 201


def test_a_token_of_one_project_reaches_nothing_of_another(locked: Locked) -> None:
    http, mine = locked.server.http, bearer(locked.tokens["mine"])
    for path in ("/server", "/deliveries", "/receivers", "/silences", "/runs", "/alerts", "/stream", "/no-such-thing"):
        assert http.get(f"/api/v1{path}", headers=mine).status_code == 403, path
    assert http.get("/metrics?project=demo", headers=mine).status_code == 403
    assert http.get("/api/v1/server?project=demo", headers=mine).status_code == 403
    assert http.get("/api/v1/alerts?project=demo", headers=mine).status_code == 200
    silence = {"author": "me", "ends_at": 4e9}
    assert http.post("/api/v1/silences", json=silence, headers=mine).status_code == 403
    assert http.post("/api/v1/silences", json=silence | {"project": "demo"}, headers=mine).status_code == 201
    assert http.post("/api/v1/receivers/any/replay", headers=mine).status_code == 403
