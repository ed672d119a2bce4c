"""The page in surroundings that are not its own: limits of browsers, languages, paper, long names, long lists."""

import re

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.page import planted, seen
from tests.page.conftest import Filled, open_run
from tests.processes import GradwatchServer

LIMITED_HISTORY = """
    const replace = history.replaceState;
    let left = 100;
    history.replaceState = function (...all) {
        if (left-- <= 0) throw new DOMException("too often", "SecurityError");
        return replace.apply(this, all);
    };
"""
"""WebKit: a change of the address more than 100 times in 10 seconds is an error."""


def test_a_hundred_keys_change_the_address_a_few_times(page: Page, filled: Filled) -> None:
    page.add_init_script(LIMITED_HISTORY)
    open_run(page, filled.run("resnet-digits", "?step=100"))
    page.locator(".map .over").focus()

    for _ in range(130):
        page.keyboard.press("ArrowRight")

    expect(page.locator(".readout")).to_contain_text("step 230")
    expect(page.locator(".profile-title")).to_contain_text("step 230")
    page.wait_for_function("() => new URLSearchParams(location.search).get('step') === '230'")


def test_an_address_that_may_not_change_breaks_nothing(page: Page, filled: Filled) -> None:
    page.add_init_script(LIMITED_HISTORY.replace("100", "0"))
    open_run(page, filled.run("resnet-digits", "?step=100"))
    page.locator(".map .over").focus()

    page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="Zoom in").click()

    expect(page.locator(".readout")).to_contain_text("step 101")
    expect(page.locator(".range")).to_contain_text("steps")


def test_an_error_of_one_part_does_not_stop_the_others(context: BrowserContext, filled: Filled) -> None:
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(error.message))
    page.goto(filled.url)

    told = page.evaluate(
        """async () => {
            const { Viewport } = await import("/page/js/data/viewport.js");
            const viewport = new Viewport({ from: 0, to: 10, end: 10, step: null });
            const told = [];
            viewport.subscribe(() => { throw new Error("broken part"); });
            viewport.subscribe(({ step }) => told.push(step));
            viewport.set({ step: 4 });
            return told;
        }"""
    )

    assert told == [4]
    assert errors == ["broken part"]


def test_charts_are_drawn_under_a_language_that_is_none(page: Page, filled: Filled) -> None:
    page.add_init_script("Object.defineProperty(Navigator.prototype, 'language', { get: () => 'C@posix' })")
    open_run(page, filled.run("resnet-digits"))

    expect(page.locator("figure", has_text="Loss").locator("canvas")).to_be_visible()


def test_a_library_that_did_not_come_is_said_in_words(context: BrowserContext, filled: Filled) -> None:
    page = context.new_page()
    page.route("**/uPlot.iife.min.js", lambda route: route.abort())
    open_run(page, filled.run("resnet-digits"))

    figures = page.locator(".strips figure", has_text="Not drawn: the library for charts was not loaded")
    expect(figures).to_have_count(4)
    expect(page.locator(".parameters tbody tr").first).to_be_visible()


def test_a_chart_that_did_not_come_is_said_in_words(tolerant_page: Page, filled: Filled) -> None:
    page = tolerant_page
    page.route(re.compile("series.statistic=loss"), lambda route: route.abort())
    open_run(page, filled.run("resnet-digits"))

    expect(page.locator("figure", has_text="Loss")).to_contain_text("Not loaded: the server cannot be reached")
    expect(page.locator("figure", has_text="Learning rate").locator("canvas")).to_be_visible()


@pytest.mark.parametrize("width", [360, 1024])
def test_a_long_name_widens_nothing(page: Page, server: GradwatchServer, width: int) -> None:
    long = "a_very_long_name" * 16
    run = planted.Run(long + "_first", project=long + "_one", planted=True)
    run_id = run.register(server.http)
    run.send(server.http, run_id, range(planted.NAN_STEP, planted.NAN_STEP + 4))
    planted.Run("short", project=long + "_two").register(server.http)
    page.set_viewport_size({"width": width, "height": 800})

    for path in ("/", "/alerts", f"/runs/{run_id}", f"/?compare={run_id}"):
        page.goto(server.url + path)
        expect(page.get_by_text("_first").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    page.goto(server.url)
    options = page.get_by_label("Project").locator("option")
    expect(options).to_have_count(3)
    texts = [text[-5:] for text in options.all_inner_texts()[1:]]
    assert [text[-4:] for text in texts] == ["_one", "_two"], "names differ at their ends"
    box = page.get_by_label("Project").bounding_box()
    assert box is not None
    assert box["width"] <= 340


def test_back_returns_to_the_place_in_a_long_list(page: Page, server: GradwatchServer) -> None:
    for number in range(120):
        server.register(("weight",), name=f"run {number}")
    page.goto(server.url)
    link = page.get_by_role("link", name="run 7", exact=True)
    link.scroll_into_view_if_needed()
    before = page.evaluate("scrollY")
    assert before > 1_000

    link.click()
    expect(page.locator("h1")).to_have_text("run 7")
    page.wait_for_function("scrollY === 0")
    page.go_back()

    expect(page.locator("table.runs")).to_be_visible()
    page.wait_for_function("(before) => Math.abs(scrollY - before) < 2", arg=before)


def test_sparklines_follow_the_theme(page: Page, filled: Filled) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(filled.url)
    spark = page.locator("tr", has_text="resnet-digits").locator("canvas")
    expect(spark).to_be_visible()
    drawn = """(before) => {
        const row = [...document.querySelectorAll("tr")].find((each) => each.innerText.includes("resnet-digits"));
        const canvas = row.querySelector("canvas"), blank = document.createElement("canvas");
        [blank.width, blank.height] = [canvas.width, canvas.height];
        const picture = canvas.toDataURL();
        return picture !== blank.toDataURL() && picture !== before && picture;
    }"""
    light = page.wait_for_function(drawn, arg="").json_value()
    assert seen.near(seen.decode(spark.screenshot()), "#17697a", most=40).any()

    page.emulate_media(color_scheme="dark")

    page.wait_for_function(drawn, arg=light)
    assert seen.near(seen.decode(spark.screenshot()), "#6ec9d8", most=40).any()


def test_paper_is_white_and_lays_nothing_over_anything(page: Page, filled: Filled) -> None:
    page.emulate_media(color_scheme="dark")
    open_run(page, filled.run("resnet-digits"))
    expect(page.locator(".advice")).to_contain_text("Recommended")
    page.emulate_media(color_scheme="dark", media="print")

    ink = page.evaluate("getComputedStyle(document.body).color")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ink, paper) == ("rgb(27, 33, 48)", "rgb(255, 255, 255)")
    advice, table = page.locator(".advice").bounding_box(), page.locator(".parameters").bounding_box()
    assert advice is not None
    assert table is not None
    assert advice["y"] + advice["height"] <= table["y"]
    labels = page.locator(".map .base").bounding_box()
    assert labels is not None
    gutter = seen.pixels(page, seen.Plot(labels["x"], labels["y"] + 18, 140, 100))
    assert seen.near(gutter, "#566073", most=60).any(), "the map's names are dark on paper"


def test_forced_colours_keep_what_colours_mean(page: Page, filled: Filled) -> None:
    page.emulate_media(forced_colors="active")
    open_run(page, filled.run("resnet-nan", "?step=300"))

    swatch = page.locator(".swatch.nan")
    assert swatch.evaluate("(it) => getComputedStyle(it).backgroundColor") == "rgb(179, 0, 0)"
    hair = page.locator(".hair:visible").first
    expect(hair).to_be_visible()
    background = hair.evaluate("(it) => getComputedStyle(it).backgroundColor")
    assert background == page.evaluate("getComputedStyle(document.body).color")


def test_half_the_zoom_still_draws_each_sample(context: BrowserContext, filled: Filled) -> None:
    browser = context.browser
    assert browser is not None
    small = browser.new_context(viewport={"width": 1280, "height": 900}, device_scale_factor=0.5)
    try:
        page = small.new_page()
        open_run(page, filled.run("resnet-digits"))
        assert page.evaluate("devicePixelRatio") == 0.5
        with page.expect_response(re.compile("/tile")) as answered:
            page.get_by_label("Statistic", exact=True).first.select_option("grad_norm")
        assert int(re.findall(r"points=(\d+)", answered.value.url)[0]) > 900
    finally:
        small.close()
