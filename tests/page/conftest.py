"""A real Chromium on a real server."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.page import planted
from tests.processes import PATIENCE_SECONDS, GradwatchServer

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]

expect.set_options(timeout=PATIENCE_SECONDS * 1_000)


@dataclass
class Filled:
    """A server with the planted runs; nothing may change them."""

    url: str
    runs: dict[str, str]
    server: GradwatchServer

    def run(self, name: str, query: str = "") -> str:
        """Return the address of a run's page."""
        return f"{self.url}/runs/{self.runs[name]}{query}"


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    with GradwatchServer(tmp_path_factory.mktemp("filled") / "gradwatch.db") as server:
        yield Filled(server.url, planted.fill(server.url), server)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    opened.set_default_timeout(PATIENCE_SECONDS * 1_000)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page on which nothing may go wrong: an error on its console fails the test."""
    opened = context.new_page()
    said = watch(opened)
    yield opened
    assert said == []


@pytest.fixture
def tolerant_page(context: BrowserContext) -> Iterator[Page]:
    """A page whose requests may fail, which Chromium reports on the console; nothing else may be reported there."""
    opened = context.new_page()
    said = watch(opened)
    yield opened
    assert [line for line in said if not line.startswith("Failed to load resource")] == []


def watch(page: Page) -> list[str]:
    """Collect what a page complains about."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    return said


def open_run(page: Page, url: str) -> None:
    """Open a run's page and wait until its map is drawn."""
    page.goto(url)
    page.wait_for_selector("main[data-drawn]")
    page.evaluate("""async () => {
        for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame)
    }""")  # what came with the data is painted
