"""The pictures of docs/, of what the demonstration leaves behind: ``python -m tests.page.pictures``."""

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.page.conftest import ARGUMENTS, CHROMIUM
from tests.processes import ROOT, GradwatchServer, environment


def main() -> None:
    """Run the demonstration and take the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        demo = [sys.executable, "-m", "gradwatch", "demo", "--folder", folder]
        subprocess.run(demo, env=environment(), check=True)
        with GradwatchServer(Path(folder) / "gradwatch.db") as server:
            runs = {run["name"]: run["id"] for run in server.get("/api/v1/runs")}
            alerts = {alert["rule"]: alert["id"] for alert in server.get("/api/v1/alerts")}
            fading, broken, healthy = (runs[name] for name in ("20-sigmoid-layers", "nan-midway", "healthy"))
            take(
                server.url,
                {
                    "runs": "/",
                    "run": f"/runs/{fading}?step=120&parameter=0.weight",
                    "alert": f"/runs/{broken}?alert={alerts['nonfinite']}",
                    "compare": f"/?compare={healthy},{fading}",
                    "advice": f"/runs/{healthy}",
                },
            )


def take(url: str, views: dict[str, str]) -> None:
    """Save a picture of each view."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 960}, reduced_motion="reduce")
        for name, path in views.items():
            page.goto(url + path)
            page.wait_for_selector("table.runs tbody tr .spark" if path == "/" else "main[data-drawn]")
            page.wait_for_load_state("load")
            if name == "advice":
                page.locator(".advice").wait_for()
                page.locator("figure", has_text="Loss").scroll_into_view_if_needed()
                page.evaluate("document.querySelector('.strips').scrollIntoView()")
            page.wait_for_function("() => new Promise((done) => setTimeout(() => done(true), 1500))")
            page.screenshot(path=ROOT / "docs" / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
