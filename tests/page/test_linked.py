"""Everything on a run's page hangs on one crosshair, one parameter and one range of steps."""

import re

import numpy as np
from playwright.sync_api import Page, expect

from gradwatch import wire
from tests.page import planted, seen
from tests.page.conftest import Filled, open_run
from tests.processes import GradwatchServer, sample

NAMES = [parameter.name for parameter in planted.residual_net()]


def test_profile_follows_the_crosshair_and_shows_the_attenuation(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("sigmoid-20-layers"))
    profile = page.locator(".profile")
    expect(profile).to_contain_text("step 599")

    plot = seen.plot(page)
    page.mouse.move(plot.x(250.5, 0, 600), plot.top + 40)

    expect(profile).to_contain_text("step 250")
    text = page.locator(".profile-fit").inner_text()
    factor = float(re.findall(r"[^\d]([\d.]+) per layer", text)[0])
    layers = sum(len(parameter.shape) > 1 for parameter in planted.residual_net())
    assert 0.4 < factor < 0.7, "5.5 decades over 19 weight matrices are a factor of about 0.52"
    assert layers == 19


def test_strips_show_the_value_at_the_crosshair(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-nan", f"?step={planted.SPIKE_STEP}"))

    norm = page.locator("figure", has_text="Global gradient norm")
    expect(norm).to_contain_text(re.compile(r"before clipping 1\d\d"))
    expect(norm).to_contain_text("after 0.3")
    expect(page.locator("figure", has_text="Loss")).to_contain_text(re.compile(r"1\.\d"))
    expect(page.locator("figure", has_text="Learning rate")).to_be_visible()
    expect(page.locator("figure", has_text="Agent overhead")).to_be_visible()
    hairs = page.locator(".hair:visible")
    expect(hairs).to_have_count(5)
    map_x = seen.plot(page).x(planted.SPIKE_STEP + 0.5, 0, 600)
    for index in range(5):
        box = hairs.nth(index).bounding_box()
        assert box is not None
        assert abs(box["x"] - map_x) < 2


def test_the_limit_of_clipping_is_a_line_on_the_norm_that_it_limits(page: Page, filled: Filled) -> None:
    """Dashed, in red, at its own height; where it changes it steps, and where there was none there is none."""
    page.emulate_media(color_scheme="light")
    open_run(page, filled.run("resnet-digits"))
    norm = page.locator("figure", has_text="Global gradient norm")
    values = norm.locator(".chart-values")
    expect(values).to_contain_text("limit none")
    norm.scroll_into_view_if_needed()
    box = norm.locator(".chart-area").bounding_box()
    assert box is not None
    plot = seen.plot(page)

    def heights(first: int, past: int) -> set[int]:
        """Return the heights at which red is seen over some steps, in pixels."""
        left, right = plot.x(first, 0, 600), plot.x(past, 0, 600)
        drawn = seen.pixels(page, seen.Plot(left, box["y"], right - left, box["height"]))
        return set(np.flatnonzero(seen.near(drawn, "#b3123a", most=60).any(axis=1)).tolist())

    before, after = heights(20, 240), heights(260, 490)
    assert before
    assert after
    assert max(after) < min(before), "0.6 lies above 0.3"
    assert heights(505, 600) == set()
    for step, limit in ((249, "0.3"), (250, "0.6"), (499, "0.6"), (500, "none")):
        page.mouse.move(plot.x(step + 0.5, 0, 600), box["y"] + 40)
        expect(values).to_contain_text(f"limit {limit}")
    page.get_by_text("Charts as a table").click()
    head = page.locator(".values-table thead")
    expect(head).to_contain_text("global_grad_norm_limit")


def test_a_run_that_does_not_clip_has_no_limit(page: Page, server: GradwatchServer) -> None:
    run = server.register(("a.weight", "b.weight"))
    samples = [sample(step, 1.0, 2.0, global_grad_norm=2.2) for step in range(8)]
    server.store(run, wire.Batch(id="1", samples=samples))
    open_run(page, f"{server.url}/runs/{run}")

    values = page.locator("figure", has_text="Global gradient norm").locator(".chart-values")
    expect(values).to_have_text("2.2")


def test_choosing_a_parameter_shows_its_series_before_and_after_clipping(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-nan", "?statistic=grad_norm"))
    expect(page.get_by_text("Choose a parameter on the map")).to_be_visible()
    plot = seen.plot(page)

    page.mouse.click(plot.x(planted.SPIKE_STEP + 0.5, 0, 600), plot.y(NAMES.index(planted.SPIKE_PARAMETER), len(NAMES)))

    trace = page.locator(".trace")
    expect(trace).to_contain_text(planted.SPIKE_PARAMETER)
    expect(trace).to_contain_text("before clipping")
    expect(trace).to_contain_text(re.compile(r"after [\d.]+"))
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("Choose a parameter on the map")).to_be_visible()


def _all_strips(page: Page) -> None:
    """Wait for the last of the strips: none of them moves any more."""
    expect(page.locator("figure", has_text="Agent overhead").locator(".chart-values b")).to_be_visible()


def test_dragging_a_strip_pans_the_map_and_every_other_strip(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-digits", "?from=200&to=300"))
    _all_strips(page)
    area = page.locator("figure", has_text="Loss").locator(".chart-area")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + 40
    width = seen.plot(page).width

    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - width / 2, y, steps=5)
    page.mouse.up()

    expect(page.locator(".range")).to_have_text(re.compile(r"steps 2(49|50|51) to 3(49|50|51)"))
    page.wait_for_function("() => new URLSearchParams(location.search).get('from') >= 248")


def test_the_wheel_over_a_strip_zooms_the_map_around_that_step(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-digits"))
    _all_strips(page)
    area = page.locator("figure", has_text="Loss").locator(".chart-area")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    page.mouse.move(seen.plot(page).x(300, 0, 600), box["y"] + 40)

    page.mouse.wheel(0, 100)
    expect(page.locator(".range")).to_have_text("whole run")  # the page was meant
    page.keyboard.down("Control")
    for _ in range(4):
        page.mouse.wheel(0, -100)
    page.keyboard.up("Control")

    page.wait_for_url(re.compile(r"from=\d+&to=\d+"))
    first, last = map(int, re.findall(r"\d+", page.locator(".range").inner_text()))
    assert abs((first + last) / 2 - 300) < 8
    assert last - first < 200


def test_keys_move_the_crosshair_choose_parameters_and_pan(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-digits", "?from=100&to=200&step=150"))
    page.locator(".map .over").focus()

    page.keyboard.press("ArrowRight")
    expect(page.locator(".readout")).to_contain_text("step 151")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".trace")).to_contain_text("stem.weight")
    page.keyboard.press("PageDown")
    expect(page.locator(".range")).to_have_text("steps 150 to 249")
    page.keyboard.press("Escape")
    expect(page.get_by_text("Choose a parameter on the map")).to_be_visible()


def test_parameters_are_listed_with_the_most_conspicuous_first(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-nan", "?to=280"))

    rows = page.locator(".parameters tbody tr")
    expect(rows.nth(0)).to_contain_text(planted.SPIKE_PARAMETER)
    expect(rows.nth(0)).to_contain_text(re.compile(r"spike .[\d,]+ at step 137"))
    expect(rows.nth(1)).to_contain_text(planted.ZERO_PARAMETER)
    expect(rows).to_have_count(12)
    page.get_by_role("button", name="Show all 36").click()
    expect(rows).to_have_count(36)
    rows.nth(0).get_by_role("button").click()
    expect(page.locator(".trace")).to_contain_text(planted.SPIKE_PARAMETER)


def test_charts_are_there_as_a_table(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-nan", "?from=415&to=425"))

    page.get_by_text("Charts as a table").click()

    table = page.locator(".values-table table")
    expect(table.locator("tbody tr")).to_have_count(10)
    expect(table.locator("tbody tr").nth(5)).to_contain_text("420")
    expect(table.locator("tbody tr").nth(5)).to_contain_text("NaN")


def test_threshold_advice_follows_the_slider(page: Page, filled: Filled) -> None:
    run = filled.runs["resnet-digits"]
    told = filled.server.get(f"/api/v1/runs/{run}/clip-advice", points=500)
    open_run(page, filled.run("resnet-digits"))
    slider = page.get_by_label("Threshold", exact=True)
    rates = page.locator("figure", has_text="Share of units clipped")
    advice = page.locator(".advice")
    expect(slider).to_have_value(str(told["thresholds"].index(told["recommended"])))
    expect(advice).to_contain_text(f"Recommended: {told['recommended']}. {told['reason']}")

    for index, threshold in enumerate(told["thresholds"]):
        slider.fill(str(index))
        share = told["shares"][index]
        words = "under 1 %" if 0 < share < 0.01 else f"{share:.0%}".replace("%", " %")
        expect(slider).to_have_attribute("aria-valuetext", f"{threshold} clips {words} of the units")
        expect(rates).to_contain_text(f"at {threshold}")
    slider.fill("0")
    page.locator(".map .over").scroll_into_view_if_needed()
    plot = seen.plot(page)
    page.mouse.move(plot.x(told["steps"][250] + 0.5, 0, 600), plot.top + 40)
    expect(rates.locator(".chart-values b")).to_have_text(f"{told['rates'][250][0]:.3g}")


def test_the_threshold_in_force_is_drawn_beside_the_chosen_one(page: Page, server: GradwatchServer) -> None:
    run = planted.Run("clipped", seed=9, attributes={"agc_clip": "0.03"})
    run_id = run.register(server.http)
    run.send(server.http, run_id, range(30))
    open_run(page, f"{server.url}/runs/{run_id}")

    expect(page.locator(".advice")).to_contain_text("In force: 0.03.")
    expect(page.locator("figure", has_text="Share of units clipped")).to_contain_text("in force, 0.03")


def test_a_run_without_histograms_has_no_advice(page: Page, server: GradwatchServer) -> None:
    run = server.register(("a.weight", "b.weight"))
    server.store(run, wire.Batch(id="1", samples=[sample(step, 1.0, 2.0) for step in range(8)]))
    open_run(page, f"{server.url}/runs/{run}")
    expect(page.locator(".parameters tbody tr")).to_have_count(2)

    expect(page.locator(".advice")).to_be_hidden()
    expect(page.locator("figure", has_text="Share of units clipped")).to_be_hidden()


def test_the_map_grows_while_the_run_goes_on(page: Page, server: GradwatchServer) -> None:
    run = planted.Run("growing", seed=9)
    run_id = run.register(server.http)
    run.send(server.http, run_id, range(50))
    open_run(page, f"{server.url}/runs/{run_id}")
    expect(page.get_by_text("Live", exact=True)).to_be_visible()

    run.send(server.http, run_id, range(50, 100))

    page.wait_for_function("() => document.querySelector('main').dataset.drawn.endsWith(' 0 150')")
    expect(page.locator(".facts").first).to_contain_text("step 99")
    drawn = seen.pixels(page, seen.plot(page))
    assert not seen.near(drawn[:, -30:], "#f0f3f7", most=4).any(), "the new half is drawn"


def test_the_limit_of_a_rule_is_drawn_where_it_belongs(page: Page, filled: Filled) -> None:
    (alert,) = filled.server.get(
        "/api/v1/alerts", run=filled.runs["sigmoid-20-layers"], rule="vanishing", state="firing"
    )
    (limit,) = (each["limit"] for each in alert["parameters"] if each["name"] == "stem.weight")
    elements = 32 * 3 * 3 * 3

    open_run(page, filled.run("sigmoid-20-layers", "?parameter=stem.weight&statistic=grad_norm"))

    told = page.locator(".trace .limit")
    expect(told).to_contain_text("limit of vanishing: ")
    shown = float(told.inner_text().rpartition(" ")[2])
    assert abs(shown / (limit * elements**0.5) - 1) < 0.05, "per element there, of the whole norm here"
    page.get_by_label("Statistic").select_option("ratio")
    expect(told).to_have_text("")


def test_one_parameter_is_one_parameter(page: Page, server: GradwatchServer) -> None:
    run = server.register(("only.weight",))
    page.goto(f"{server.url}/runs/{run}")

    expect(page.locator(".facts").first).to_contain_text("1 parameterseen")


def test_an_unknown_parameter_in_the_address_is_said(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-digits", "?parameter=nope"))

    expect(page.locator(".trace")).to_contain_text("This run has no parameter of this name.")


def test_series_of_several_parameters_stand_side_by_side(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-digits", "?parameter=stem.weight"))
    trace = page.locator(".trace")
    trace.get_by_role("button", name="Keep beside").click()
    page.get_by_role("button", name="head.weight", exact=True).click()

    expect(trace.locator(".chart-values")).to_contain_text(re.compile(r"head\.weight.+stem\.weight"))
    page.wait_for_url(re.compile("parameter=head.weight.*kept=stem.weight"))
    page.reload()
    expect(trace.locator(".chart-values")).to_contain_text(re.compile(r"head\.weight.+stem\.weight"))
    trace.get_by_role("button", name="Remove stem.weight").click()
    expect(trace.locator(".chart-values")).not_to_contain_text("stem.weight")
