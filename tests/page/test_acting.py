"""What can be done on the page: acknowledge, silence, send again; and by whom."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from playwright.sync_api import Page, expect

from gradwatch_server.store import schema
from gradwatch_server.store.database import open_engine, writing
from gradwatch_server.store.tokens import create
from tests.page import planted
from tests.processes import GradwatchServer, WebhookReceiver
from tests.server.hook import fill, settled


@dataclass
class Sick:
    """A server with one run whose head is NaN, and the receiver that is told of it."""

    server: GradwatchServer
    receiver: WebhookReceiver
    run: str
    alert: str

    @property
    def address(self) -> str:
        return f"{self.server.url}/runs/{self.run}?alert={self.alert}"


@pytest.fixture
def sick(tmp_path: Path) -> Iterator[Sick]:
    with (
        WebhookReceiver([400]) as receiver,
        GradwatchServer(tmp_path / "sick.db", "--webhook", receiver.url) as server,
    ):
        run = planted.Run("sick", planted=True, seed=3)
        run_id = run.register(server.http)
        run.send(server.http, run_id, range(395, 440))
        receiver.wait(1)
        settled(server)
        alert = server.get("/api/v1/alerts", run=run_id, rule="nonfinite")[0]["id"]
        yield Sick(server, receiver, run_id, alert)


def test_an_alert_is_acknowledged_by_name(page: Page, sick: Sick) -> None:
    page.goto(sick.address)
    panel = page.get_by_role("article", name="Alert")
    panel.get_by_role("button", name="Acknowledge", exact=True).click()
    assert sick.server.get(f"/api/v1/alerts/{sick.alert}")["acknowledged_by"] is None, "a name is needed"
    panel.get_by_label("Your name").fill("Ada")
    panel.get_by_role("button", name="Acknowledge", exact=True).click()

    expect(panel).to_contain_text("acknowledged by Ada")
    expect(panel.get_by_role("button", name="Acknowledge", exact=True)).to_be_hidden()
    assert sick.server.get(f"/api/v1/alerts/{sick.alert}")["acknowledged_by"] == "Ada"
    page.reload()
    expect(page.locator("aside li.alert", has_text="nonfinite")).to_contain_text("acknowledged by Ada")
    expect(panel.get_by_label("Your name")).to_have_value("Ada")
    panel.get_by_role("button", name="Withdraw the acknowledgement").click()
    expect(panel.get_by_role("button", name="Acknowledge", exact=True)).to_be_visible()
    assert sick.server.get(f"/api/v1/alerts/{sick.alert}")["acknowledged_by"] is None


def test_an_alert_is_silenced_until_a_time_and_told_again(page: Page, sick: Sick) -> None:
    page.goto(sick.address)
    panel = page.get_by_role("article", name="Alert")
    panel.get_by_label("Your name").fill("Ada")
    panel.get_by_text("Silence …").click()
    panel.get_by_label("What").select_option("this rule in every run of the project")
    panel.get_by_label("For").select_option("8 hours")
    panel.get_by_label("Comment").fill("new <b>data</b>")

    panel.get_by_role("button", name="Silence", exact=True).click()

    expect(panel).to_contain_text(re.compile(r"silenced\s*by Ada until 2\d{3}-"))
    expect(panel).to_contain_text("“new <b>data</b>”")
    (silence,) = sick.server.get("/api/v1/silences")
    assert (silence["author"], silence["project"], silence["run"], silence["rule"]) == ("Ada", "demo", "*", "nonfinite")
    assert abs(silence["ends_at"] - time.time() - 8 * 3600) < 90
    page.get_by_role("link", name=re.compile("^Alerts")).click()
    held = page.locator("section", has_text="Silences")
    expect(held).to_contain_text("project demo, rule nonfinite")
    held.get_by_role("button", name="End the silence").click()
    expect(held).to_be_hidden()
    assert sick.server.get("/api/v1/silences") == []


def test_every_attempt_is_shown_and_a_delivery_is_sent_again(page: Page, sick: Sick) -> None:
    page.goto(sick.address)
    delivery = page.locator(".deliveries li", has_text="firing to webhook").first
    expect(delivery).to_contain_text("given up")
    delivery.get_by_text(re.compile("1 attempt · ")).click()
    expect(delivery.locator("ol li")).to_have_text(re.compile(r"^2\d{3}-.*400.*, \d+ ms$"))
    sick.receiver.statuses = [204]

    delivery.get_by_role("button", name="Send again").click()

    expect(delivery).to_contain_text("delivered")
    expect(delivery).to_contain_text("2 attempts · HTTP 204")
    first, second = sick.receiver.wait(2)[0], sick.receiver.requests[-1]
    assert first[0]["webhook-id"] == second[0]["webhook-id"]


def test_what_was_given_up_is_sent_again_from_the_server_view(page: Page, sick: Sick) -> None:
    page.goto(f"{sick.server.url}/server")
    row = page.get_by_role("row", name=re.compile("webhook"))
    expect(row.locator(".chip.critical")).to_be_visible()
    sick.receiver.statuses = [204]

    row.get_by_role("button", name="Send again").click()

    sick.receiver.wait(2)
    expect(row.locator(".chip.critical")).to_have_count(0)


def test_without_admin_scope_nothing_can_be_changed(tolerant_page: Page, sick: Sick) -> None:
    page = tolerant_page
    engine = open_engine(f"sqlite:///{sick.server.database}")
    with writing(engine) as connection:
        _, token = create(connection, "read", None, None)
    engine.dispose()
    while not sick.server.get("/api/v1/session")["login"]:  # the server remembers for two seconds that none is needed
        time.sleep(0.1)
    page.goto(sick.address)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()

    panel = page.get_by_role("article", name="Alert")
    expect(panel).to_contain_text("given up")
    expect(page.locator("#session")).to_contain_text("read only")
    expect(panel.get_by_label("Your name")).to_be_hidden()
    expect(page.get_by_role("button", name=re.compile("Acknowledge|Silence|Send again"))).to_have_count(0)
    page.goto(f"{sick.server.url}/server")
    expect(page.get_by_role("row", name=re.compile("webhook"))).to_be_visible()
    expect(page.get_by_role("button", name="Send again")).to_have_count(0)


def test_a_long_list_of_alerts_comes_in_pieces_and_those_that_fire_come_first(
    page: Page, server: GradwatchServer
) -> None:
    run = server.register(["a.weight"])
    url = f"sqlite:///{server.database}"
    fill(url, run, ["nobody"] * 230)
    engine = open_engine(url)
    with writing(engine) as connection:
        oldest = sa.select(sa.func.min(schema.alerts.c.id)).scalar_subquery()
        over = {"state": "resolved", "first_at": 2.0, "resolved_at": 3.0, "resolved_step": 2}
        connection.execute(sa.update(schema.alerts).where(schema.alerts.c.id != oldest).values(over))
    engine.dispose()
    page.goto(f"{server.url}/alerts")
    entries = page.locator("li.alert")
    expect(entries).to_have_count(101)
    expect(entries.first).to_contain_text("firing")

    page.get_by_role("button", name="Older alerts").click()
    expect(entries).to_have_count(201)
    page.get_by_role("button", name="Older alerts").click()

    expect(entries).to_have_count(230)
    expect(page.get_by_role("button", name="Older alerts")).to_be_hidden()
