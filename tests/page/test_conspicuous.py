"""Which parameters are conspicuous: the page and ``/metrics`` keep to one rule."""

import re
from pathlib import Path

from playwright.sync_api import Page, expect

from gradwatch import wire
from tests.page.conftest import open_run
from tests.processes import GradwatchServer, sample

GRADIENTS = {
    "usual1": 0.1,
    "missing": wire.MISSING,
    "usual2": 0.11,
    "low": 1e-3,
    "usual3": 0.12,
    "zero": 0.0,
    "high": 1e3,
    "nan": float("nan"),
}
ORDER = ["nan", "zero", "high", "low", "usual1", "usual3", "usual2", "missing"]
"""Not finite, exactly zero, farthest from the median (0.11), missing."""


def _listed(page: Page) -> list[str]:
    return page.locator(".parameters tbody th").all_inner_texts()


def test_the_page_lists_the_parameters_of_one_sample_in_the_order_of_metrics(page: Page, tmp_path: Path) -> None:
    configuration, database = tmp_path / "gradwatch.toml", tmp_path / "gradwatch.db"
    with GradwatchServer(database) as server:
        run = server.register(list(GRADIENTS))
        server.store(run, wire.Batch(id="1", samples=[sample(1, *GRADIENTS.values())]))
        open_run(page, f"{server.url}/runs/{run}")
        expect(page.locator(".parameters tbody tr")).to_have_count(len(GRADIENTS))
        assert _listed(page) == ORDER
        expect(page.locator(".parameters tr", has_text="nan")).to_contain_text("not finite from step 1")
        expect(page.locator(".parameters tr", has_text="zero")).to_contain_text("always exactly zero")
        expect(page.locator(".parameters tr", has_text="high")).to_contain_text("10⁴ above the median")
        page.goto("about:blank")
    for most in (1, 2, 4, 5):
        configuration.write_text(f"[metrics]\nconspicuous_parameters = {most}\n")
        with GradwatchServer(database, "--config", str(configuration)) as server:
            told = server.http.get("/metrics").text
        assert set(re.findall(r'gradwatch_parameter_grad_norm\{.*parameter="(\w+)"', told)) == set(ORDER[:most])


def test_several_samples_show_what_one_cannot(page: Page, server: GradwatchServer) -> None:
    """A gradient that never came, a spike, zeros now and then: between the zeros and the distance from the median."""
    names = ["usual", "far", "sometimes", "spiky", "always_zero", "never", "nan"]
    run = server.register(names)
    samples = [
        sample(
            step,
            1.0,
            1e5,
            0.0 if step % 4 == 0 else 1.0,
            100.0 if step == 7 else 1.0,
            0.0,
            wire.MISSING,
            float("nan") if step > 30 else 1.0,
        )
        for step in range(40)
    ]
    server.store(run, wire.Batch(id="1", samples=samples))
    open_run(page, f"{server.url}/runs/{run}")
    expect(page.locator(".parameters tbody tr")).to_have_count(len(names))

    assert _listed(page) == ["nan", "never", "always_zero", "spiky", "sometimes", "far", "usual"]
    rows = page.locator(".parameters tbody tr")
    expect(rows.nth(1)).to_contain_text("never had a gradient")
    expect(rows.nth(3)).to_contain_text(re.compile("spike .100 at step 7"))
    expect(rows.nth(4)).to_contain_text("exactly zero in 25 % of the samples")
    expect(rows.nth(5)).to_contain_text("10⁵ above the median")
