"""The layer x step map, as it is seen."""

import re

import numpy as np
from playwright.sync_api import Page, expect

from gradwatch import wire
from tests.page import planted, seen
from tests.page.conftest import Filled, open_run
from tests.processes import GradwatchServer, sample

NAMES = [parameter.name for parameter in planted.residual_net()]
NAN, INFINITE, ZERO, BRIGHTEST = "#b30000", "#ff66ff", "#000000", "#fde725"
STEPS = 600


def cell(page: Page, parameter: str, steps: range, view: range = range(STEPS)) -> seen.Pixels:
    """Return the pixels of one parameter over some steps."""
    plot = seen.plot(page)
    left, right = plot.x(steps.start, view.start, view.stop), plot.x(steps.stop, view.start, view.stop)
    row = NAMES.index(parameter)
    height = plot.height / len(NAMES)
    area = seen.Plot(left - 0.5, plot.y(row, len(NAMES)) - height / 4, max(2.0, right - left + 1), height / 2)
    return seen.pixels(page, area)


def test_widest_view_shows_the_spike_the_nan_the_infinity_and_the_zero(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-nan"))

    spike = range(planted.SPIKE_STEP, planted.SPIKE_STEP + 1)
    infinite = range(planted.INFINITE_STEP, planted.INFINITE_STEP + 1)
    assert seen.near(cell(page, planted.SPIKE_PARAMETER, spike), BRIGHTEST).any()
    assert seen.near(cell(page, planted.INFINITE_PARAMETER, infinite), INFINITE).any()
    assert seen.near(cell(page, planted.NAN_PARAMETER, range(planted.NAN_STEP + 2, STEPS - 2)), NAN).all()
    assert seen.near(cell(page, planted.ZERO_PARAMETER, range(202, 348)), ZERO).all()


def test_healthy_run_has_none_of_the_colours_of_trouble(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-digits"))

    drawn = seen.pixels(page, seen.plot(page))
    for colour in (NAN, INFINITE, ZERO):
        assert not seen.near(drawn, colour, most=6).any()


def test_a_missing_gradient_is_neither_zero_nor_nan(page: Page, filled: Filled) -> None:
    view = range(8)
    open_run(page, filled.run("resnet-nan", "?from=0&to=8"))

    drawn = cell(page, planted.MISSING_PARAMETER, range(1, 4), view)
    grey = np.ptp(drawn[:, 6:-6].astype(np.int16), axis=2) < 20
    assert grey.all()
    assert not seen.near(drawn, ZERO).any()
    measured = cell(page, planted.MISSING_PARAMETER, range(4, 5), view)
    assert (np.ptp(measured[:, 6:-6].astype(np.int16), axis=2) > 40).all()


def test_zooms_to_one_step_and_back(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-nan", f"?step={planted.SPIKE_STEP}"))
    page.locator(".map .over").focus()
    for _ in range(9):
        page.keyboard.press("+")
    expect(page.locator(".range")).to_have_text(re.compile(r"step"))
    page.wait_for_function(
        "() => new URLSearchParams(location.search).get('to') - new URLSearchParams(location.search).get('from') <= 2"
    )
    expect(page.locator(".readout")).to_contain_text("step 137")

    page.keyboard.press("0")

    expect(page.locator(".range")).to_have_text("whole run")
    page.wait_for_function("() => !new URLSearchParams(location.search).has('from')")


def test_crosshair_says_what_is_under_it(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-nan", "?from=130&to=145"))
    plot = seen.plot(page)
    row = NAMES.index(planted.SPIKE_PARAMETER)

    page.mouse.move(plot.x(planted.SPIKE_STEP + 0.5, 130, 145), plot.y(row, len(NAMES)))

    expect(page.locator(".readout")).to_contain_text("step 137")
    expect(page.locator(".readout")).to_contain_text(planted.SPIKE_PARAMETER)
    page.mouse.click(plot.x(planted.SPIKE_STEP + 0.5, 130, 145), plot.y(row, len(NAMES)))
    page.wait_for_url(re.compile(r"step=137&parameter=blocks\.3\.conv2\.weight|parameter=.*step=137"))


def test_every_view_is_an_address(page: Page, filled: Filled) -> None:
    query = "?from=100&to=200&step=137&parameter=blocks.3.conv2.weight&statistic=grad_norm&cell=min"
    open_run(page, filled.run("resnet-nan", query))

    expect(page.locator(".range")).to_have_text("steps 100 to 199")
    expect(page.get_by_label("Statistic", exact=True).first).to_have_value("grad_norm")
    expect(page.get_by_label("Of each cell")).to_have_value("min")
    expect(page.locator(".readout")).to_contain_text("step 137")
    assert page.url.endswith(query)


def test_alerts_are_marked_on_the_step_axis_and_their_evidence_on_the_map(page: Page, filled: Filled) -> None:
    page.emulate_media(color_scheme="light")
    run = filled.runs["resnet-nan"]
    alert = filled.server.get("/api/v1/alerts", run=run, rule="nonfinite")[0]
    assert alert["first_step"] == planted.NAN_STEP
    open_run(page, filled.run("resnet-nan"))
    expect(page.locator("aside li.alert")).to_have_count(2)
    plot = seen.plot(page)

    def marked(first: float, past: float) -> bool:
        left, right = plot.x(first, 0, STEPS), plot.x(past, 0, STEPS)
        lane = seen.Plot(left, plot.top - 18, right - left, 16)
        return bool(seen.near(seen.pixels(page, lane), "#b3123a").any(axis=0).all())

    def outlined() -> bool:
        top, bottom = (plot.y(NAMES.index(name), len(NAMES)) for name in ("blocks.5.conv1.weight", "head.weight"))
        edge = seen.Plot(plot.x(planted.NAN_STEP, 0, STEPS) - 2, top, 4, bottom - top)
        return bool(seen.near(seen.pixels(page, edge), "#1b2130", most=40).any(axis=1).all())

    assert marked(planted.NAN_STEP + 1, STEPS - 1)
    assert not marked(0, planted.INFINITE_STEP - 10)
    assert not marked(planted.INFINITE_STEP + 20, planted.NAN_STEP - 10)
    assert not outlined()
    page.locator("aside li.alert", has_text="steps 420 to").get_by_role("link").click()
    expect(page.get_by_role("article", name="Alert")).to_be_visible()
    expect(page.get_by_role("article", name="Alert")).to_contain_text("Nobody was notified")
    page.locator(".under").scroll_into_view_if_needed()
    plot = seen.plot(page)
    assert outlined()


def test_names_are_grouped_by_module_as_deep_as_there_is_room(page: Page, filled: Filled) -> None:
    of_block = ("norm.weight", "norm.bias", "conv.weight")
    names = ["stem.weight", *(f"blocks.{block}.{name}" for block in range(2) for name in of_block)]
    page.goto(filled.url)

    def told(call: str) -> list[list[object]]:
        found: list[list[object]] = page.evaluate(
            f"(names) => import('/page/js/charts/map/labels.js').then((its) => its.{call})", names
        )
        return found

    groups = "groups(names, {}).map(({{first, past, text}}) => [first, past, text])"
    assert told(groups.format(14)) == [[row, row + 1, name] for row, name in enumerate(names)]
    assert told(groups.format(4)) == [[0, 1, "stem.weight"], [1, 4, "blocks.0"], [4, 7, "blocks.1"]]
    assert told(groups.format(2)) == [[0, 1, "stem.weight"], [1, 7, "blocks"]]
    modules = "modules(names).map(({first, past}) => [first, past])"
    assert told(modules) == [[1, 3], [4, 6]]
    names[:] = ["a.weight", "a.bias", "scale", "shift", "b.weight"]
    assert told(modules) == [[0, 2]], "parameters without a module belong to none together"


def test_the_labels_are_drawn_with_a_bracket_around_each_module(page: Page, filled: Filled) -> None:
    """Between the names and the cells a line runs beside the rows of one module, and none beside a row of its own."""
    page.emulate_media(color_scheme="light")
    open_run(page, filled.run("resnet-digits"))
    plot = seen.plot(page)
    height = plot.height / len(NAMES)

    def beside(name: str, rows: int) -> bool:
        area = seen.Plot(plot.left - 6, plot.top + NAMES.index(name) * height, 4, rows * height)
        return bool(seen.near(seen.pixels(page, area)[4:-4], "#9aa0ab", most=20).any(axis=1).all())

    assert beside("blocks.2.norm.weight", 2)
    assert not beside("blocks.2.conv1.weight", 1)


def test_nothing_is_lost_where_samples_and_parameters_share_pixels(page: Page, server: GradwatchServer) -> None:
    run = planted.Run("crowded", parameters=planted.residual_net(blocks=300), planted=True)
    names = [parameter.name for parameter in run.parameters]
    run_id = run.register(server.http)
    run.send(server.http, run_id, range(planted.SPIKE_STEP - 30, planted.NAN_STEP + 2, 1))
    open_run(page, f"{server.url}/runs/{run_id}")

    plot = seen.plot(page)
    drawn = seen.pixels(page, plot)
    assert len(names) > 2 * plot.height

    def around(name: str, step: int, past: int = planted.NAN_STEP + 2) -> seen.Pixels:
        x, y = int(step / past * plot.width), int((names.index(name) + 0.5) / len(names) * plot.height)
        return drawn[max(0, y - 3) : y + 4, max(0, x - 4) : x + 6]

    assert seen.near(around(planted.SPIKE_PARAMETER, planted.SPIKE_STEP), BRIGHTEST).any()
    assert seen.near(around(planted.INFINITE_PARAMETER, planted.INFINITE_STEP), INFINITE).any()
    assert seen.near(around(planted.NAN_PARAMETER, planted.NAN_STEP), NAN).any()


def test_a_single_bad_sample_of_thousands_is_seen(page: Page, server: GradwatchServer) -> None:
    run = planted.Run("long", planted=True)
    run_id = run.register(server.http)
    run.send(server.http, run_id, range(planted.NAN_STEP + 1))
    calm = planted.Run("long", seed=5)
    calm.send(server.http, run_id, range(planted.NAN_STEP + 1, 4_000))
    open_run(page, f"{server.url}/runs/{run_id}")

    assert seen.plot(page).width < 1_000
    whole = range(4_000)
    spike, nan = planted.SPIKE_STEP, planted.NAN_STEP
    assert seen.near(cell(page, planted.SPIKE_PARAMETER, range(spike - 4, spike + 5), whole), BRIGHTEST).any()
    assert seen.near(cell(page, planted.NAN_PARAMETER, range(nan - 4, nan + 5), whole), NAN).any()


def test_a_network_of_5000_parameters_is_drawn_in_bounded_pieces(page: Page, server: GradwatchServer) -> None:
    run = server.register([f"layers.{index // 6}.linear{index % 6}.weight" for index in range(5_000)])
    spike = np.ones(5_000)
    spike[4_000] = 1e6
    for first in range(0, 600, 100):
        samples = [sample(step, *(spike if step == 333 else np.ones(5_000))) for step in range(first, first + 100)]
        assert server.store(run, wire.Batch(id=str(first), samples=samples)).status_code == 200
    with page.expect_response(re.compile("/tile")) as answered:
        open_run(page, f"{server.url}/runs/{run}")

    assert len(answered.value.body()) < 14 * 2_000_000 + 500_000
    expect(page.locator(".parameters tbody tr").first).to_contain_text("1,000,000 in steps 332 to 333")


def test_steps_that_were_not_sampled_show_the_sample_before_them(page: Page, server: GradwatchServer) -> None:
    """A NaN at step 100, the next sample 100 steps later: the colour goes on, hatched; white would look like a loss."""
    page.emulate_media(color_scheme="light")
    run = server.register(("weight",))
    sampled = [*range(0, 101, 10), *range(200, 301, 10)]
    samples = [sample(step, float("nan") if step == 100 else 1.0, interval_steps=10.0) for step in sampled]
    server.store(run, wire.Batch(id="1", samples=samples))
    open_run(page, f"{server.url}/runs/{run}")
    plot = seen.plot(page)

    def share_of_nan(first: int, past: int) -> float:
        left, right = plot.x(first, 0, 301), plot.x(past, 0, 301)
        drawn = seen.pixels(page, seen.Plot(left, plot.top + 10, right - left, plot.height - 20))
        return float(seen.near(drawn, NAN).mean())

    assert share_of_nan(102, 108) == 1
    assert 0.3 < share_of_nan(120, 190) < 0.9
    assert share_of_nan(0, 98) == share_of_nan(202, 300) == 0
    expect(page.locator(".legend")).to_contain_text("not sampled")
    expect(page.locator(".facts").first).to_contain_text("samples every 10th step")


def test_a_run_with_one_sample_draws_a_column_and_dots(page: Page, server: GradwatchServer) -> None:
    page.emulate_media(color_scheme="light")
    run = server.register(("weight",))
    trail = {"loss": wire.Trail(steps=[90_000], values=[1.0])}
    samples = [sample(50_000, float("nan"), global_grad_norm=2.0)]
    server.store(run, wire.Batch(id="1", samples=samples, trail=trail))
    open_run(page, f"{server.url}/runs/{run}?parameter=weight&statistic=weight_norm")
    end = server.get(f"/api/v1/runs/{run}")["last_step"] + 1
    plot = seen.plot(page)

    around = plot.x(50_000, 0, end)
    column = seen.pixels(page, seen.Plot(around - 8, plot.top + 10, 16, 40))
    drawn = ~seen.near(column, "#f0f3f7", most=4)
    assert 4 <= drawn.all(axis=0).sum() <= 6
    for figure in (page.locator(".trace"), page.locator("figure", has_text="Global gradient norm")):
        expect(figure.locator(".chart-values b").first).to_be_visible()
        area = figure.locator(".chart-area")
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        assert box is not None
        dot = seen.pixels(page, seen.Plot(around - 8, box["y"] + 2, 16, box["height"] - 4))
        assert seen.near(dot, "#17697a", most=40).sum() >= 8


def test_a_single_bad_cell_among_many_is_large_enough_to_see(page: Page, server: GradwatchServer) -> None:
    names = [f"layers.{index}.weight" for index in range(2_000)]
    run = server.register(names)
    bad, row = 333, 1_234
    fine = np.ones(len(names))
    broken = fine.copy()
    broken[row] = np.nan
    for first in range(0, 2_000, 200):
        steps = range(first, first + 200)
        samples = [sample(step, *(broken if step == bad else fine)) for step in steps]
        assert server.store(run, wire.Batch(id=str(first), samples=samples)).status_code == 200
    open_run(page, f"{server.url}/runs/{run}")
    plot = seen.plot(page)

    red = seen.near(seen.pixels(page, plot), NAN)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    assert 4 <= len(rows) <= 6
    assert 4 <= len(columns) <= 6
    assert abs(columns.mean() - (plot.x(bad, 0, 2_000) - plot.left)) < 5
    assert abs(rows.mean() - (plot.y(row, len(names)) - plot.top)) < 5
