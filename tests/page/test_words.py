"""What the page says where there is nothing to draw, and of which steps it says something."""

import re

import pytest
from playwright.sync_api import Page, expect

from gradwatch import wire
from tests.page.conftest import Filled, open_run
from tests.processes import GradwatchServer, sample


def test_a_run_without_samples_waits_for_the_first(page: Page, server: GradwatchServer) -> None:
    """Nothing is known of its parameters: they are not zero."""
    run = server.register(("a.weight", "b.weight"))
    open_run(page, f"{server.url}/runs/{run}")
    note, rows = page.locator(".map-note"), page.locator(".parameters tbody tr")

    expect(note).to_have_text("Waiting for the first sample")
    expect(rows).to_have_count(2)
    expect(page.locator(".parameters")).not_to_contain_text("zero")
    expect(page.locator(".profile")).to_contain_text("no sample")

    server.store(run, wire.Batch(id="1", samples=[sample(0, 0.0, 1.0)]))
    expect(note).to_be_hidden()
    expect(rows.first).to_contain_text("always exactly zero")


def test_a_statistic_that_was_not_measured_is_said_with_what_it_needs(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("sigmoid-20-layers"))
    expect(page.locator(".profile-fit")).to_contain_text("per layer")

    page.get_by_label("Statistic", exact=True).first.select_option("clipped_unit_share")

    expect(page.locator(".map-note")).to_have_text("Not measured in this run: it needs clip=")
    expect(page.locator(".profile-fit")).to_have_text("no sample")
    expect(page.locator(".parameters")).not_to_contain_text("zero")
    page.get_by_label("Statistic", exact=True).first.select_option("grad_norm")
    expect(page.locator(".map-note")).to_be_hidden()
    expect(page.locator(".profile-fit")).to_contain_text("per layer")


def test_a_run_that_ended_without_a_sample_waits_for_none(page: Page, server: GradwatchServer) -> None:
    run = server.register(("a.weight",))
    server.store(run, wire.Batch(id="1", end=wire.End(at=1.0, status="completed")))
    open_run(page, f"{server.url}/runs/{run}")

    expect(page.locator(".map-note")).to_have_text("This run ended without a sample")


def test_what_happened_in_a_bucket_of_samples_is_told_as_a_range(page: Page, server: GradwatchServer) -> None:
    run = server.register(("fine", "spiky", "bad"))
    spike, bad, end = 4_663, 7_997, 12_000
    for first in range(0, end, 1_000):
        samples = [
            sample(step, 1.0, 100.0 if step == spike else 1.0, float("nan") if step >= bad else 1.0)
            for step in range(first, first + 1_000)
        ]
        assert server.store(run, wire.Batch(id=str(first), samples=samples)).status_code == 200
    open_run(page, f"{server.url}/runs/{run}")
    rows = page.locator(".parameters tbody tr")

    def told(row: int, words: str) -> tuple[int, int]:
        text = rows.nth(row).inner_text()
        found = re.search(rf"{words} steps ([\d,]+) to ([\d,]+)", text)
        assert found, text
        first, last = (int(number.replace(",", "")) for number in found.groups())
        return first, last

    expect(rows.nth(1)).to_contain_text("spike")
    first, last = told(0, "not finite first in")
    assert first <= bad <= last < first + 100
    first, last = told(1, "spike .100 in")
    assert first <= spike <= last < first + 100

    page.goto(f"{server.url}/runs/{run}?from={spike - 20}&to={spike + 20}")
    expect(rows.nth(0)).to_contain_text(re.compile("spike .100 at step 4,663"))
    page.goto(f"{server.url}/runs/{run}?from={bad - 20}&to={bad + 20}")
    expect(rows.nth(0)).to_contain_text("not finite from step 7,997")


def test_the_charts_table_tells_the_steps_of_each_value(page: Page, server: GradwatchServer) -> None:
    run = server.register(("weight",))
    for first in range(0, 6_000, 1_000):
        samples = [sample(step, 1.0, loss=float(step)) for step in range(first, first + 1_000)]
        server.store(run, wire.Batch(id=str(first), samples=samples))
    open_run(page, f"{server.url}/runs/{run}")
    page.get_by_text("Charts as a table").click()

    row = page.locator(".values-table tbody tr").nth(3)
    expect(row).to_contain_text(re.compile(r"[\d,]+ to [\d,]+"))
    last, value = row.inner_text().split(" to ")[1].split()
    assert float(last.replace(",", "")) == pytest.approx(float(value), rel=0.01)


def test_the_readout_is_silent_while_the_crosshair_is_out_of_view(page: Page, filled: Filled) -> None:
    open_run(page, filled.run("resnet-digits", "?step=300&from=100&to=200&parameter=stem.weight"))
    expect(page.locator(".trace .chart-values b").first).to_be_visible()

    expect(page.locator(".readout")).to_have_text("")
    expect(page.locator(".profile-title")).to_have_text("Depth profile step 199")
    page.get_by_role("button", name="All steps").click()
    expect(page.locator(".readout")).to_contain_text("step 300")
