"""How fast a run's page opens and pans: ``python -m benchmarks.page [samples] [parameters]``."""

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from tests.page import planted
from tests.page.conftest import ARGUMENTS, CHROMIUM
from tests.processes import GradwatchServer

from gradwatch import wire

PAN = """
async () => {
  const box = document.querySelector(".map .over");
  const { left, top, width, height } = box.getBoundingClientRect();
  const at = (type, x) => box.dispatchEvent(new PointerEvent(type, {
    pointerId: 1, clientX: x, clientY: top + height / 2, button: 0, bubbles: true }));
  box.setPointerCapture = () => undefined;
  for (let index = 0; index < 3; index++) document.querySelector("[aria-label='Zoom in']").click();
  await new Promise((done) => setTimeout(done, 1500));
  const middle = left + width / 2;
  at("pointerdown", middle);
  const frames = [];
  let before = performance.now();
  for (let index = 0; index < 120; index++) {
    at("pointermove", middle + 200 * Math.sin(index / 10));
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - before);
    before = now;
  }
  at("pointerup", middle);
  return frames.sort((a, b) => a - b);
}
"""


def main(samples: int, parameters: int) -> None:
    """Fill a server, open the run, pan for 120 frames and print what it took."""
    run = planted.Run("large", parameters=planted.residual_net(blocks=(parameters - 4) // 4), planted=True)
    names = [parameter.name for parameter in run.parameters]
    with tempfile.TemporaryDirectory() as folder, GradwatchServer(Path(folder) / "large.db") as server:
        run_id = run.register(server.http)
        for first in range(0, samples, 250):
            steps = range(first, min(samples, first + 250))
            batch = wire.Batch(id=str(first), attempt=1, samples=[run.sample(step, names) for step in steps])
            assert server.store(run_id, batch).status_code == 200
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(server.url)
            page.wait_for_selector("table.runs tbody tr")
            started = time.perf_counter()
            page.goto(f"{server.url}/runs/{run_id}")
            page.wait_for_selector("main[data-drawn]", state="attached")
            opened = time.perf_counter() - started
            frames = page.evaluate(PAN)
            browser.close()
    print(f"{samples} samples x {len(names)} parameters: drawn {opened:.2f} s after the address was entered")
    middle, worst = frames[len(frames) // 2], frames[int(len(frames) * 0.95)]
    print(f"panning: median frame {middle:.1f} ms ({1000 / middle:.0f} a second), 95th percentile {worst:.1f} ms")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*(int(argument) for argument in given + ["2000", "300"][len(given) :]))
