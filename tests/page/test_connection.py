"""The page and its server: many windows, a connection that dies without a word, a server that is busy."""

import re
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, Route, expect

from gradwatch import wire
from tests.page.conftest import Filled, open_run
from tests.page.relay import Relay
from tests.processes import GradwatchServer, sample

WINDOWS = 8
"""More than the six connections that a browser opens to a server."""
LIVE = re.compile(r"^Live$")


def test_any_number_of_windows_share_one_stream(context: BrowserContext, server: GradwatchServer) -> None:
    run = server.register(("weight",), name="shared")
    with Relay(server.url) as relay:
        windows = [context.new_page() for _ in range(WINDOWS)]
        for window in windows:
            window.goto(relay.url)
            expect(window.locator("#connection")).to_have_text(LIVE)
            expect(window.get_by_role("link", name="shared")).to_be_visible()
        server.store(run, wire.Batch(id="1", samples=[sample(step, 1.0) for step in range(43)]))
        for window in windows:
            expect(window.locator("table.runs tbody tr")).to_contain_text("42")
        assert relay.open_streams == 1
        for window in windows[:-1]:
            window.close()
        server.store(run, wire.Batch(id="2", samples=[sample(77, 1.0)]))
        expect(windows[-1].locator("table.runs tbody tr")).to_contain_text("77")


def test_a_browser_without_shared_workers_has_a_stream_all_the_same(page: Page, server: GradwatchServer) -> None:
    page.add_init_script("delete window.SharedWorker")
    page.goto(server.url)
    expect(page.locator("#connection")).to_have_text(LIVE)

    server.register(("weight",), name="late")

    expect(page.get_by_role("link", name="late")).to_be_visible()


def test_a_connection_that_falls_silent_is_told_and_replaced(tolerant_page: Page, tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[connections]\nstream_beat_seconds = 1\n")
    page = tolerant_page
    with (
        GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server,
        Relay(server.url) as relay,
    ):
        run = server.register(("weight",), name="behind a VPN")
        page.goto(relay.url)
        expect(page.locator("#connection")).to_have_text(LIVE)
        expect(page.get_by_role("link", name="behind a VPN")).to_be_visible()
        page.evaluate(
            """() => {
                window.told = [];
                const bar = document.querySelector(".bar");
                new MutationObserver(() => told.push(bar.innerText)).observe(bar, {subtree: true, childList: true});
            }"""
        )
        asked = relay.streams_asked

        relay.silence()

        page.wait_for_function("() => told.some((text) => /Connection lost.*shown as of/s.test(text))")
        expect(page.locator("#connection")).to_have_text(LIVE)
        expect(page.locator("#age")).to_be_hidden()
        assert relay.streams_asked > asked
        server.store(run, wire.Batch(id="1", samples=[sample(42, 1.0)]))
        expect(page.locator("table.runs tbody tr")).to_contain_text("42")


def test_a_request_without_an_answer_ends_in_words(tolerant_page: Page, filled: Filled) -> None:
    """The map's tile never comes; everything else does, and so does the tile once it is asked for again."""
    page = tolerant_page
    kept: list[Route] = []
    page.clock.install()
    page.route("**/tile?*", lambda route: kept.append(route), times=1)
    with page.expect_request("**/tile?*"):
        page.goto(filled.run("resnet-digits"))

    page.clock.run_for(31_000)

    expect(page.locator(".map-note")).to_have_text("Not loaded, trying again: the server gave no answer within 30 s")
    page.clock.run_for(4_000)
    page.clock.resume()
    expect(page.locator(".map-note")).to_be_hidden()
    page.wait_for_selector("main[data-drawn]")


def test_a_busy_server_is_waited_for_in_words(tolerant_page: Page, filled: Filled) -> None:
    page = tolerant_page
    refusals = 2

    def refuse(route: Route) -> None:
        problem = '{"title": "Too many reads", "detail": "2 reads run already (limits.reads_at_once): ask again later"}'
        route.fulfill(status=429, headers={"retry-after": "1"}, content_type="application/problem+json", body=problem)

    page.goto(filled.url)
    expect(page.locator("#connection")).to_have_text(LIVE)
    page.route("**/tile?*", refuse, times=refusals)
    page.get_by_role("link", name="resnet-digits").click()

    expect(page.locator("#connection")).to_have_text("The server is busy, waiting for it")
    page.wait_for_selector("main[data-drawn]")
    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("main")).not_to_contain_text("Too many reads")


def test_what_cannot_be_loaded_again_is_told(tolerant_page: Page, server: GradwatchServer) -> None:
    page = tolerant_page
    run = server.register(("weight",))
    server.store(run, wire.Batch(id="1", samples=[sample(1, 1.0)]))
    open_run(page, f"{server.url}/runs/{run}")
    expect(page.locator("#connection")).to_have_text(LIVE)
    page.route(f"**/api/v1/runs/{run}", lambda route: route.abort())

    server.store(run, wire.Batch(id="2", samples=[sample(2, 1.0)]))

    expect(page.locator("#connection")).to_have_text("Not loaded: the server cannot be reached")
    expect(page.locator("#age")).to_have_text(re.compile("shown as of"))
    page.unroute_all()
    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator(".facts").first).to_contain_text("step 2")
