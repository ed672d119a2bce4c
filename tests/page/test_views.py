"""Alerts, comparison, the server's own view; on every screen, for everyone."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from gradwatch import wire
from tests.page import planted
from tests.page.conftest import Filled, open_run, watch
from tests.processes import GradwatchServer, WebhookReceiver, sample

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "server" / "gradwatch_server" / "page"
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
ROUTES = PAGE / "js" / "routes.js"
MOST_BYTES = 300_000


def alert_id(server: GradwatchServer, run: str, rule: str) -> str:
    """Return the newest alert of a rule of a run."""
    found: str = server.get("/api/v1/alerts", run=run, rule=rule)[0]["id"]
    return found


def test_alert_leads_to_what_where_why_and_whom_it_was_told(page: Page, tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "told.db", "--webhook", receiver.url) as server,
    ):
        run = planted.Run("told", planted=True, seed=3)
        run_id = run.register(server.http)
        run.send(server.http, run_id, range(460))
        receiver.wait(1)
        page.goto(server.url)
        page.get_by_role("link", name="Alerts").click()
        entry = page.locator("li.alert.firing", has_text="nonfinite")
        expect(entry).to_contain_text("since step 420")

        entry.get_by_role("link").click()

        panel = page.get_by_role("article", name="Alert")
        expect(panel).to_contain_text("Likely cause")
        expect(panel).to_contain_text("What to do")
        expect(panel).to_contain_text(planted.NAN_PARAMETER)
        expect(panel).to_contain_text("delivered")
        expect(panel).to_contain_text("HTTP 204")
        page.wait_for_url(re.compile(r"/runs/\w+\?alert=\w+"))
        panel.get_by_role("button", name="Look at these steps").click()
        expect(page.locator(".range")).to_contain_text("steps 3")
        panel.get_by_role("button", name=planted.NAN_PARAMETER).click()
        expect(page.locator(".trace")).to_contain_text(planted.NAN_PARAMETER)
        panel.get_by_role("button", name="Close the alert").click()
        expect(panel).to_be_hidden()


def test_what_keeps_the_agent_from_measuring_is_told(page: Page, tmp_path: Path) -> None:
    with GradwatchServer(tmp_path / "kept.db") as server:
        run = server.register(["first.weight", "second.weight"])
        page.goto(f"{server.url}/runs/{run}")
        expect(page.get_by_text("No alert in this run.")).to_be_visible()
        expect(page.get_by_text("From the agent")).to_have_count(0)
        text = "after 200 backward passes no torch.optim.Optimizer has stepped a watched parameter"
        told = [
            wire.Event(step=1, at=1_790_000_000.0, kind="skipped_step", message="the loss scaler skipped this step"),
            wire.Event(step=0, at=1_790_000_001.0, kind="not_stepped", message=text),
        ]
        server.store(run, wire.Batch(id="b", events=told))
        expect(page.get_by_role("region", name="From the agent")).to_contain_text(f"not_stepped, step 0{text}")
        expect(page.get_by_text("the loss scaler skipped")).to_have_count(0)
        expect(page.get_by_text("never had a gradient")).to_have_count(0)


def test_up_to_four_runs_are_compared(page: Page, filled: Filled) -> None:
    page.goto(filled.url)
    boxes = page.get_by_role("checkbox")
    expect(boxes).to_have_count(4)
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()
    page.get_by_label("Compare resnet-digits").check()
    page.get_by_label("Compare sigmoid-20-layers").check()

    page.get_by_role("button", name="Compare", exact=True).click()

    page.wait_for_selector("main[data-drawn='2']")
    expect(page.get_by_role("heading", name="2 runs")).to_be_visible()
    expect(page.locator(".sides .map")).to_have_count(2)
    expect(page.locator("figure", has_text="Loss")).to_contain_text("sigmoid-20-layers")
    page.go_back()
    expect(page.locator("table.runs")).to_be_visible()


def test_a_fifth_run_is_not_compared(page: Page, server: GradwatchServer) -> None:
    names = ("one", "two", "three", "four", "fifth")
    for name in names:
        server.register(name=name)
    page.goto(server.url)
    for name in names[:4]:
        page.get_by_label(f"Compare {name}").check()
    expect(page.get_by_label("Compare fifth")).to_be_disabled()
    page.get_by_label("Search runs").fill("fifth")
    expect(page.get_by_role("checkbox")).to_have_count(1)
    expect(page.get_by_role("checkbox")).to_be_disabled()
    page.get_by_label("Search runs").fill("")
    expect(page.get_by_label("Compare one")).to_be_checked()

    page.get_by_role("button", name="Compare", exact=True).click()

    expect(page.get_by_role("heading", name="4 runs")).to_be_visible()
    expect(page.locator(".sides .map")).to_have_count(4)


def test_compared_curves_go_down_to_single_steps_and_the_view_is_an_address(
    page: Page, server: GradwatchServer
) -> None:
    runs = [server.register(["weight"], name=name) for name in ("up", "down")]
    for run, sign in zip(runs, (1.0, -1.0), strict=True):
        for first in range(0, 4_000, 1_000):
            steps = range(first, first + 1_000)
            samples = [sample(step, 1.0, global_grad_norm=100.0 + sign * (step % 10)) for step in steps]
            assert server.store(run, wire.Batch(id=str(first), samples=samples)).status_code == 200
    settled(page, f"{server.url}/?compare={','.join(runs)}&from=2000&to=2010&statistic=grad_norm")
    expect(page.locator(".range")).to_have_text("steps 2,000 to 2,009")
    norm = page.locator("figure", has_text="Global gradient norm")
    expect(norm.locator(".chart-values b")).to_have_count(2)
    box = norm.locator(".chart-area").bounding_box()
    assert box is not None

    page.mouse.move(box["x"] + 150 + 5.5 / 10 * (box["width"] - 160), box["y"] + 40)
    expect(norm.locator(".chart-values")).to_have_text("up 105down 95")
    page.mouse.wheel(400, 0)

    expect(page.locator(".range")).to_have_text("steps 2,005 to 2,014")
    page.wait_for_url(re.compile(r"\?compare=.*from=2005&to=2015&"))
    page.get_by_label("Of each cell").select_option("min")
    page.wait_for_url(re.compile("cell=min"))


def test_server_view_tells_its_health_and_that_of_its_receivers(page: Page, tmp_path: Path) -> None:
    with (
        WebhookReceiver([500]) as receiver,
        GradwatchServer(tmp_path / "health.db", "--webhook", receiver.url) as server,
    ):
        run = planted.Run("sick", planted=True)
        run_id = run.register(server.http)
        run.send(server.http, run_id, range(440))
        receiver.wait(1)

        page.goto(f"{server.url}/server")

        expect(page.locator(".numbers")).to_contain_text("ready")
        expect(page.locator(".numbers")).to_contain_text("440")
        row = page.get_by_role("row", name=re.compile("webhook"))
        expect(row).to_contain_text("127.0.0.1")
        expect(row).to_contain_text(re.compile("500"), timeout=20_000)


def test_what_agents_dropped_is_said(page: Page, server: GradwatchServer) -> None:
    run = planted.Run("lossy")
    run_id = run.register(server.http)
    run.send(server.http, run_id, range(5))
    lossy = planted.dropped_batch(samples=17)
    assert server.store(run_id, lossy).status_code == 200

    open_run(page, f"{server.url}/runs/{run_id}")
    expect(page.locator(".facts").first).to_contain_text("dropped: 17 samples")
    page.goto(f"{server.url}/server")
    expect(page.locator(".numbers")).to_contain_text("17 samples")


VIEWS = {
    "runs": "/",
    "run": "/runs/{run}?step=390&parameter=head.weight",
    "alert": "/runs/{run}?alert={alert}",
    "alerts": "/alerts",
    "compare": "/?compare={run},{other}",
    "server": "/server",
}


def address(filled: Filled, view: str) -> str:
    run = filled.runs["resnet-nan"]
    path = VIEWS[view].format(
        run=run, other=filled.runs["resnet-digits"], alert=alert_id(filled.server, run, "nonfinite")
    )
    return filled.url + path


def settled(page: Page, url: str) -> None:
    """Open an address and wait until nothing is asked for any more (a stream stays open)."""
    page.goto(url)
    page.wait_for_function(
        "() => document.querySelector('main h1') && document.querySelector('#connection').dataset.state === 'live'"
    )
    if "/runs/" in url or "compare" in url:
        page.wait_for_selector("main[data-drawn]")
        page.wait_for_selector(".chart-values b")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, filled: Filled, view: str, scheme: Any) -> None:
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"
    )
    try:
        page = context.new_page()
        said = watch(page)
        settled(page, address(filled, view))
        page.add_script_tag(path=AXE)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        serious = [
            (each["id"], [node["target"] for node in each["nodes"]][:5])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert said == []
    finally:
        context.close()


@pytest.mark.parametrize("view", VIEWS)
def test_fits_a_small_screen(browser: Browser, filled: Filled, view: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    try:
        page = context.new_page()
        settled(page, address(filled, view))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    finally:
        context.close()


def test_every_view_is_reached_by_keyboard(page: Page, filled: Filled) -> None:
    page.goto(filled.url)
    expect(page.locator("table.runs")).to_be_visible()

    page.evaluate("document.querySelector('table.runs').dataset.same = 'yes'")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page).to_have_url(filled.url + "/#main")
    page.evaluate("new Promise(requestAnimationFrame)")
    expect(page.locator("table.runs[data-same]")).to_be_visible()  # it was not drawn anew
    page.get_by_role("link", name="resnet-digits").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("main[data-drawn]")
    expect(page.locator("main")).to_be_focused()


def test_the_focus_is_seen_wherever_it_goes(page: Page, filled: Filled) -> None:
    settled(page, address(filled, "alert"))
    page.locator(".brand").focus()
    visited = []
    for _ in range(50):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const it = document.activeElement;
              return [it.getAttribute("aria-label") || it.textContent || it.tagName, getComputedStyle(it).outline];
            }"""
        )
        visited.append(name)
        assert "solid" in outline, name
        assert " 0px" not in outline, name
    whole = "\n".join(visited)
    for kind in ("Alerts", "Close the alert", "Statistic", "Zoom in", "Layer by step map", "Threshold", "head.weight"):
        assert kind in whole, kind


def test_weighs_less_than_300_kb_and_comes_from_this_server_alone(page: Page, filled: Filled) -> None:
    loaded: dict[str, int] = {}

    def weigh(response: Any) -> None:
        if "/api/" not in response.url:
            loaded[response.url] = len(response.body())

    page.on("response", weigh)
    settled(page, address(filled, "run"))

    assert all(url.startswith(filled.url) for url in loaded)
    assert len(loaded) > 20
    assert sum(loaded.values()) < MOST_BYTES


def test_the_policy_allows_nothing_inline(filled: Filled) -> None:
    answer = filled.server.http.get("/")
    policy = answer.headers["content-security-policy"]

    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=", answer.text)


def test_every_shared_module_is_asked_for_at_once() -> None:
    """Imports would be followed level by level, each a way to the server and back; pages load beside the session."""
    named = re.findall(r'<link rel="modulepreload" href="/page/js/(.+\.js)">', (PAGE / "index.html").read_text())
    files = {file.relative_to(PAGE / "js").as_posix() for file in (PAGE / "js").rglob("*.js")}
    loaded_by_routes = {f"pages/{name}" for name in re.findall(r'import\("./pages/(.+?)"\)', ROUTES.read_text())}
    assert named == sorted(files - loaded_by_routes - {"main.js", "data/stream/worker.js"})


def test_the_server_answers_at_the_address_of_every_page(filled: Filled) -> None:
    paths = set(re.findall(r'\bpath: "(.+?)"', ROUTES.read_text()))
    assert len(paths) > 3
    for path in paths:
        answer = filled.server.http.get(re.sub(r"\{\w+\}", "name", path))
        assert answer.status_code == 200, path
        assert answer.text == (PAGE / "index.html").read_text(), path
    assert filled.server.http.get("/no-such-page").status_code == 404


def test_files_are_asked_for_again_after_an_upgrade_and_data_is_kept_nowhere(filled: Filled) -> None:
    http = filled.server.http
    for path in ("/", "/server", "/page/js/main.js"):
        assert http.get(path).headers["cache-control"] == "no-cache", path
    etag = http.get("/page/js/main.js").headers["etag"]
    assert http.get("/page/js/main.js", headers={"if-none-match": etag}).status_code == 304
    for path in ("/api/v1/runs", "/api/v1/session", "/metrics"):
        assert http.get(path).headers["cache-control"] == "no-store", path


def test_vendored_files_are_the_ones_their_notice_names() -> None:
    folder = PAGE / "vendor" / "uplot"
    notice = (folder / "NOTICE.md").read_text()
    named = dict(re.findall(r"`([\w.]+)` sha256 `(\w{64})`", notice))

    files = ("uPlot.iife.min.js", "uPlot.min.css")
    assert named == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    locked = json.loads((ROOT / "package-lock.json").read_text())["packages"]["node_modules/uplot"]
    assert locked["integrity"] in notice
    assert locked["version"] in notice
    assert "MIT" in (folder / "LICENSE").read_text()


def test_colours_follow_the_system_between_light_and_dark(page: Page, filled: Filled) -> None:
    page.emulate_media(color_scheme="light")
    settled(page, address(filled, "run"))
    ink = "getComputedStyle(document.body).color"
    light = (page.evaluate(ink), page.locator(".map .base").screenshot())

    page.emulate_media(color_scheme="dark")

    page.wait_for_function("() => getComputedStyle(document.body).color === 'rgb(231, 234, 240)'")
    expect(page.locator(".map .base")).to_be_visible()
    assert (page.evaluate(ink), page.locator(".map .base").screenshot()) != light


def test_reduced_motion_leaves_nothing_moving(page: Page, filled: Filled) -> None:
    settled(page, address(filled, "run"))

    assert page.evaluate("document.getAnimations().length") == 0
