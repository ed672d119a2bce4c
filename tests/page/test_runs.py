"""The list of runs, live."""

import re

from playwright.sync_api import Page, expect

from gradwatch import wire
from tests.page import planted
from tests.page.conftest import Filled, open_run
from tests.processes import GradwatchServer, sample

HOSTILE = "<img src=x onerror=alert(1)>"


def test_lists_runs_with_state_step_loss_and_worst_rule(page: Page, filled: Filled) -> None:
    page.goto(filled.url)

    rows = page.locator("table.runs tbody tr")
    expect(rows).to_have_count(4)
    sick = rows.filter(has_text="resnet-nan")
    expect(sick).to_contain_text("failed")
    expect(sick).to_contain_text("599")
    expect(sick).to_contain_text("NaN")
    expect(rows.filter(has_text="resnet-digits")).to_contain_text(re.compile("running|stalled"))
    expect(rows.filter(has_text="sigmoid-20-layers").locator(".chip")).to_have_text(
        re.compile("vanishing|stalled")  # where the tests take so long that the silent run counts as stalled too
    )


def test_search_and_filters_narrow_the_list_and_the_address(page: Page, filled: Filled) -> None:
    page.goto(filled.url)
    rows = page.locator("table.runs tbody tr")

    page.get_by_label("Search runs").fill("resnet")
    expect(rows).to_have_count(2)
    page.get_by_label("State").select_option("finished")
    expect(rows).to_have_count(1)
    page.wait_for_url(re.compile(r"q=resnet&state=finished"))
    page.reload()
    expect(rows).to_have_count(1)
    page.get_by_label("Search runs").fill("nothing like it")
    expect(page.get_by_text("No run matches.")).to_be_visible()


def test_a_name_that_is_markup_is_only_text(page: Page, filled: Filled) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    page.goto(filled.url)
    page.get_by_role("link", name=HOSTILE).click()
    page.wait_for_selector("main[data-drawn]")

    expect(page.locator("h1")).to_have_text(HOSTILE)
    expect(page.get_by_text("<b>other</b>")).to_be_visible()
    assert page.title().startswith(HOSTILE)
    assert page.locator("main img").count() == 0
    assert dialogs == []


def test_everything_that_an_agent_names_is_only_text(page: Page, server: GradwatchServer) -> None:
    run = server.register([HOSTILE, "b.weight"], name=HOSTILE, project=HOSTILE, attributes={HOSTILE: HOSTILE})
    samples = [sample(step, float("nan") if step > 5 else 1.0, 1.0, **{HOSTILE: 1.0}) for step in range(20)]
    event = wire.Event(step=6, at=1.0, kind="nonfinite_module", message=HOSTILE, parameter=HOSTILE)
    assert server.store(run, wire.Batch(id="1", samples=samples, events=[event])).status_code == 200
    alert = server.get("/api/v1/alerts", run=run)[0]["id"]
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    open_run(page, f"{server.url}/runs/{run}?alert={alert}")

    panel = page.get_by_role("article", name="Alert")
    panel.get_by_role("button", name=HOSTILE).click()
    expect(page.locator(".trace b")).to_contain_text([HOSTILE])
    expect(page.locator("figure", has_text=HOSTILE)).to_be_visible()
    page.get_by_text("Charts as a table").click()
    expect(page.locator(".values-table thead")).to_contain_text(HOSTILE)
    page.get_by_text("About this run").click()
    expect(page.locator(".about dd", has_text=HOSTILE)).to_be_visible()
    page.goto(f"{server.url}/alerts")
    expect(page.locator("li.alert")).to_contain_text(HOSTILE)
    page.goto(f"{server.url}/?compare={run}")
    expect(page.get_by_role("link", name=HOSTILE)).to_be_visible()

    assert page.locator("main img").count() == 0
    assert dialogs == []


def test_an_empty_server_says_how_to_begin(page: Page, server: GradwatchServer) -> None:
    page.goto(server.url)

    expect(page.get_by_text("No run has reported yet")).to_be_visible()
    expect(page.locator("pre")).to_contain_text(f'url="{server.url}"')


def test_new_runs_and_samples_appear_by_themselves(page: Page, server: GradwatchServer) -> None:
    page.goto(server.url)
    expect(page.get_by_text("Live")).to_be_visible()
    run = planted.Run("late-comer")
    run_id = run.register(server.http)
    expect(page.get_by_role("link", name="late-comer")).to_be_visible()
    open_run(page, f"{server.url}/runs/{run_id}")
    expect(page.get_by_text("Live")).to_be_visible()

    run.send(server.http, run_id, range(40))

    expect(page.locator(".facts")).to_contain_text("step 39")
    page.wait_for_function("() => document.querySelector('main').dataset.drawn?.endsWith(' 0 60')")


def test_a_lost_connection_says_so_and_recovers(tolerant_page: Page, server: GradwatchServer) -> None:
    run = planted.Run("interrupted")
    run_id = run.register(server.http)
    page = tolerant_page
    page.goto(server.url)
    expect(page.get_by_text("Live")).to_be_visible()
    expect(page.locator("table.runs tbody tr")).to_contain_text("interrupted")  # the page has all that it loads

    server.kill()
    expect(page.get_by_text("Connection lost, trying again")).to_be_visible()
    server.start()

    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    run.send(server.http, run_id, range(10))
    expect(page.locator("table.runs tbody tr")).to_contain_text("9")


def test_an_unknown_run_is_said_in_the_servers_words(tolerant_page: Page, filled: Filled) -> None:
    page = tolerant_page
    page.goto(f"{filled.url}/runs/unknown")

    expect(page.get_by_role("heading", name="Unknown run")).to_be_visible()
