"""Loading what the page shows: over a slow link, again after a failure, and not where it would be in vain."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from gradwatch import wire
from tests.page.relay import PIECE_BYTES, Relay
from tests.processes import PATIENCE_SECONDS, GradwatchServer, sample

PARAMETERS, STEPS = 40, 100
RUNS = 12
HEADER_BYTES = 1_000
"""More than the headers of a response."""
HOUR_MS = 3_600_000
COUNT_TILE_BYTES = """
    window.tileBytes = 0;
    const send = window.fetch;
    window.fetch = async (url, options) => {
        const response = await send(url, options);
        if (!String(url).includes("/tile?")) return response;
        const count = new TransformStream({
            transform(piece, controller) {
                window.tileBytes += piece.byteLength;
                controller.enqueue(piece);
            },
        });
        return new Response(response.body.pipeThrough(count), response);
    };
"""
HIDE = """() => {
    Object.defineProperty(document, "hidden", {value: true, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""
SHOW = """() => {
    delete document.hidden;
    document.dispatchEvent(new Event("visibilitychange"));
}"""


class Failing:
    """Requests of a page that fail with a status, and whose failures are numbered in words."""

    def __init__(self, page: Page, path: str, status: int) -> None:
        """Let requests for ``path`` fail."""
        self._page, self._path, self._status = page, path, status
        self.asked = 0
        page.route(path, self._fail)

    def _fail(self, route: Route) -> None:
        self.asked += 1
        problem = f'{{"title": "No", "detail": "failure {self.asked}"}}'
        route.fulfill(status=self._status, content_type="application/problem+json", body=problem)

    def end(self) -> None:
        """Let the requests reach the server again."""
        self._page.unroute(self._path, self._fail)


@pytest.fixture(scope="module")
def quiet_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradwatchServer]:
    """A server whose event stream is not missed while a test moves the page's clock."""
    folder = tmp_path_factory.mktemp("quiet")
    config = folder / "gradwatch.toml"
    config.write_text("[connections]\nstream_beat_seconds = 3_600\n")
    with GradwatchServer(folder / "gradwatch.db", "--config", str(config)) as server:
        yield server


@pytest.fixture(scope="module")
def runs(quiet_server: GradwatchServer) -> Iterator[str]:
    """Runs whose tiles are several pieces long, which were last heard so long ago that no stream tells of them."""
    names = [f"layer{index}.weight" for index in range(PARAMETERS)]
    registered = [quiet_server.register(names, name="loaded") for _ in range(RUNS)]
    for run in registered:
        store(quiet_server, run, 0, STEPS)
    with closing(sqlite3.connect(quiet_server.database, timeout=PATIENCE_SECONDS)) as database, database:
        database.execute("UPDATE runs SET last_seen_at = last_seen_at - 60")
    return iter(registered)


@pytest.fixture
def run(runs: Iterator[str]) -> str:
    """A run of this test alone."""
    return next(runs)


def store(server: GradwatchServer, run: str, first: int, end: int) -> None:
    samples = [sample(step, *[1.0] * PARAMETERS) for step in range(first, end)]
    assert server.store(run, wire.Batch(id=str(first), samples=samples)).status_code == 200


def stop_clock(page: Page) -> None:
    """Let the page's time pass only where a test says so."""
    page.clock.install(time=0)
    page.clock.pause_at(1_000)


def connection(page: Page) -> Locator:
    return page.locator("#connection")


def expect_open(page: Page) -> None:
    """Wait until a run's page has loaded all that it asks for at first, and hears of changes."""
    expect(page.locator("aside .alerts")).to_have_text("No alert in this run.")
    expect(connection(page)).to_have_text("Live")


def fail_tile(page: Page, server: GradwatchServer, run: str, status: int) -> tuple[Failing, Locator]:
    """Open a run's page whose tile fails; return its requests and where it says so."""
    failing = Failing(page, "**/tile?*", status)
    page.goto(f"{server.url}/runs/{run}")
    expect_open(page)
    return failing, page.locator(".map-note")


def fail_reload(page: Page, server: GradwatchServer, run: str, status: int) -> tuple[Failing, Locator]:
    """Open a run's page that fails to load new samples; return its requests and where it says so."""
    page.goto(f"{server.url}/runs/{run}")
    page.wait_for_selector("main[data-drawn]")
    expect_open(page)
    failing = Failing(page, f"**/api/v1/runs/{run}", status)
    store(server, run, STEPS, STEPS + 1)
    return failing, connection(page)


Fail = Callable[[Page, GradwatchServer, str, int], tuple[Failing, Locator]]
EACH = pytest.mark.parametrize("fail", [fail_tile, fail_reload])


def send_piece(page: Page, relay: Relay, number: int) -> None:
    """Send the next piece of a tile and wait until the page has read some of it."""
    relay.send_piece()
    page.wait_for_function("least => tileBytes >= least", arg=number * PIECE_BYTES - HEADER_BYTES)


def test_a_map_that_takes_longer_than_the_deadline_is_loaded_over_a_slow_link(
    page: Page, quiet_server: GradwatchServer, run: str
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/tile?" in request.url else None)
    page.add_init_script(COUNT_TILE_BYTES)
    stop_clock(page)
    with Relay(quiet_server.url) as relay:
        relay.slow()
        page.goto(f"{relay.url}/runs/{run}")
        for number in range(1, 6):
            send_piece(page, relay, number)
            page.clock.run_for(20_000)

        relay.hurry()

        page.wait_for_selector("main[data-drawn]")
        expect(page.locator(".map-note")).to_be_hidden()
        assert len(asked) == 1


def test_a_link_that_falls_silent_within_a_map_is_given_up(page: Page, quiet_server: GradwatchServer, run: str) -> None:
    page.add_init_script(COUNT_TILE_BYTES)
    stop_clock(page)
    with Relay(quiet_server.url) as relay:
        relay.slow()
        page.goto(f"{relay.url}/runs/{run}")
        send_piece(page, relay, 1)

        page.clock.run_for(30_000)

        note = page.locator(".map-note")
        expect(note).to_have_text("Not loaded, trying again: the server gave no answer within 30 s")
        relay.hurry()
        page.clock.run_for(3_000)
        page.wait_for_selector("main[data-drawn]")
        expect(note).to_be_hidden()


@EACH
def test_attempts_become_rarer(tolerant_page: Page, quiet_server: GradwatchServer, run: str, fail: Fail) -> None:
    page = tolerant_page
    stop_clock(page)
    failing, words = fail(page, quiet_server, run, 503)
    for failures, seconds in enumerate((3, 6, 12, 24, 48, 60, 60), start=1):
        expect(words).to_contain_text(f"failure {failures}")

        page.clock.run_for(seconds * 1_000 - 1)
        assert failing.asked == failures
        page.clock.run_for(1)
    expect(words).to_contain_text("failure 8")


def test_new_samples_do_not_shorten_the_pause(tolerant_page: Page, quiet_server: GradwatchServer, run: str) -> None:
    page = tolerant_page
    stop_clock(page)
    failing, words = fail_tile(page, quiet_server, run, 503)
    expect(words).to_contain_text("failure 1")
    store(quiet_server, run, STEPS, STEPS + 1)
    expect(page.locator(".facts").first).to_contain_text(f"step {STEPS}")

    page.clock.run_for(2_999)
    assert failing.asked == 1
    page.clock.run_for(1)

    expect(words).to_contain_text("failure 2")


@EACH
def test_a_final_answer_is_not_asked_for_again(
    tolerant_page: Page, quiet_server: GradwatchServer, run: str, fail: Fail
) -> None:
    """A run that is gone stays gone: only a change of it is a reason to ask."""
    page = tolerant_page
    stop_clock(page)
    failing, words = fail(page, quiet_server, run, 404)
    expect(words).to_have_text("Not loaded: failure 1")

    page.clock.run_for(HOUR_MS)

    assert failing.asked == 1
    failing.end()
    store(quiet_server, run, STEPS + 1, STEPS + 2)
    page.wait_for_selector("main[data-drawn]")
    expect(page.locator(".facts").first).to_contain_text(f"step {STEPS + 1}")
    expect(connection(page)).to_have_text("Live")


@EACH
def test_a_hidden_page_waits_until_it_is_seen(
    tolerant_page: Page, quiet_server: GradwatchServer, run: str, fail: Fail
) -> None:
    page = tolerant_page
    stop_clock(page)
    failing, words = fail(page, quiet_server, run, 503)
    expect(words).to_contain_text("failure 1")
    page.evaluate(HIDE)

    page.clock.run_for(HOUR_MS)

    assert failing.asked == 1
    failing.end()
    page.evaluate(SHOW)
    page.wait_for_selector("main[data-drawn]")
    expect(page.locator(".map-note")).to_be_hidden()
    expect(connection(page)).to_have_text("Live")


def test_a_list_that_was_left_tells_no_failure(tolerant_page: Page, quiet_server: GradwatchServer, run: str) -> None:
    page = tolerant_page
    held: list[Route] = []
    page.goto(quiet_server.url)
    link = page.locator(f'a[href="/runs/{run}"]').first
    expect(link).to_be_visible()
    expect(connection(page)).to_have_text("Live")
    page.evaluate("""() => {
        window.told = [];
        const status = document.querySelector("#connection");
        new MutationObserver(() => told.push(status.textContent)).observe(status, {childList: true});
    }""")
    page.route("**/api/v1/runs", lambda route: held.append(route))
    with page.expect_request("**/api/v1/runs"):
        store(quiet_server, run, STEPS, STEPS + 1)
    link.click()
    page.wait_for_selector("main[data-drawn]")

    with page.expect_event("requestfailed"):
        held[0].abort()

    page.evaluate("() => new Promise((resolve) => setTimeout(resolve))")
    assert [text for text in page.evaluate("told") if "Not loaded" in text] == []
