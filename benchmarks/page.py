"""How fast a run's page opens and pans: ``python -m benchmarks.page [samples] [parameters] [database]``.

The run is written by the code that stores batches, with its roll-ups, 1,000 samples a transaction; only the diagnosis
is left out. With a database (an SQLite file), the run is kept there and used again.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from playwright.sync_api import Page, sync_playwright
from tests.page.conftest import ARGUMENTS, CHROMIUM
from tests.page.planted import residual_net
from tests.processes import GradwatchServer

from gradwatch import wire
from gradwatch_server.store import batch_store, schema
from gradwatch_server.store.database import open_engine, writing

SAMPLES, PARAMETERS = 1_000_000, 300
BATCH = 1_000
OPEN_SECONDS, FRAMES_A_SECOND = 1.5, 30.0
OPENINGS = 5

DRAWN = "() => document.querySelector('main').dataset.drawn && new Promise(requestAnimationFrame).then(() => true)"
PAN = """
async () => {
  const box = document.querySelector(".map .over");
  const { left, top, width, height } = box.getBoundingClientRect();
  const at = (type, x) => box.dispatchEvent(new PointerEvent(type, {
    pointerId: 1, clientX: x, clientY: top + height / 2, button: 0, bubbles: true }));
  box.setPointerCapture = () => undefined;
  for (let index = 0; index < 4; index++) document.querySelector("[aria-label='Zoom in']").click();
  await new Promise((done) => setTimeout(done, 1500));
  const frames = [];
  for (const way of [1, -1, -1, 1]) {
    at("pointerdown", left + width / 2);
    let before = await new Promise(requestAnimationFrame);
    for (let index = 0; index < 60; index++) {
      at("pointermove", left + width / 2 + way * 16 * index);
      const now = await new Promise(requestAnimationFrame);
      frames.push(now - before);
      before = now;
    }
    at("pointerup", left + width / 2);
  }
  return frames.sort((a, b) => a - b);
}
"""


def store(database: Path, run_id: str, samples: int, parameters: int) -> None:
    """Store the samples of a registered run: a spike and a NaN among them."""
    random = np.random.default_rng(0)
    depth = np.linspace(-1.5, 0.0, parameters)
    engine = open_engine(f"sqlite:///{database}")
    for first in range(0, samples, BATCH):
        steps = np.arange(first, min(samples, first + BATCH))
        walk = 0.4 * np.sin(steps[:, None] * (12.0 / samples) + 4 * depth)
        logs = -2.5 + depth + walk + 0.15 * random.standard_normal((len(steps), parameters))
        gradients = (10.0**logs).astype(np.float32)
        if samples // 3 in steps:
            gradients[samples // 3 - first, parameters // 2] = 1e3
        if samples // 2 in steps:
            gradients[samples // 2 - first, parameters // 3] = np.nan
        weights = np.ones(parameters, np.float32)
        losses = (2.0 * np.exp(-steps / samples * 3)).tolist()
        batch = wire.Batch(
            id=str(first),
            attempt=1,
            samples=[
                wire.Sample(step=step, at=float(step), statistics={"grad_norm": gradients[row], "weight_norm": weights})
                for row, step in enumerate(steps.tolist())
            ],
            trail={"loss": wire.Trail(steps=steps.tolist(), values=losses)},
        )
        with writing(engine) as connection:
            run = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id)).one()
            changes = batch_store.insert_batch(connection, run, batch, batch_store.scalars_by_step(batch))
            changes |= {"last_step": int(steps[-1]), "sample_count": run.sample_count + len(steps)}
            changes["scalars"] = {"loss": losses[-1]}
            connection.execute(sa.update(schema.runs).where(schema.runs.c.id == run_id).values(changes))
    engine.dispose()


def opened(page: Page, address: str) -> float:
    """Return the seconds from entering an address to a drawn map."""
    page.goto("about:blank")
    started = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_function(DRAWN, polling="raf")
    return time.perf_counter() - started


def answered(work: Callable[[], object]) -> float:
    """Return the median seconds of some requests."""
    taken = []
    for _ in range(9):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _rounded(seconds: list[float]) -> list[str]:
    return [f"{each:.2f}" for each in seconds]


def main(samples: int, parameters: int, database: Path) -> int:
    """Fill a server, open the run, pan through it and print what it took; 1 where it took too long."""
    name = f"{samples} samples x {parameters} parameters"
    with GradwatchServer(database) as server:
        known = [run for run in server.get("/api/v1/runs") if run["name"] == name and run["sample_count"] == samples]
        if known:
            run_id = known[0]["id"]
        else:
            listed = residual_net(blocks=parameters // 4 + 1)[:parameters]
            registration = wire.Registration(name=name, parameters=listed)
            run_id = server.post("/api/v1/runs", registration).json()["id"]
            started = time.perf_counter()
            store(database, run_id, samples, parameters)
            print(
                f"stored in {time.perf_counter() - started:.0f} s, {database.stat().st_size / 1e9:.2f} GB", flush=True
            )
        address = f"{server.url}/runs/{run_id}"
        first, again = [], []
        with sync_playwright() as playwright:
            for _ in range(OPENINGS):
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                first.append(opened(page, address))
                again.append(opened(page, address))
                if len(first) == OPENINGS:
                    frames = page.evaluate(PAN)
                browser.close()
        tile = answered(lambda: server.http.get(f"/api/v1/runs/{run_id}/tile?points=1000").raise_for_status())
    seconds, rate = statistics.median(first), 1000 * len(frames) / sum(frames)
    worst = 1000 / frames[int(len(frames) * 0.95)]
    print(f"{name}: the whole run's tile is answered in {1000 * tile:.0f} ms")
    print("in a fresh browser drawn after, s:", *_rounded(first), f"median {seconds:.2f} (at most {OPEN_SECONDS})")
    print("opened again in it, s:", *_rounded(again), f"median {statistics.median(again):.2f}")
    print(
        f"panning: {rate:.0f} frames a second, 95 % of frames at {worst:.0f} or more (at least {FRAMES_A_SECOND:.0f})"
    )
    return int(seconds > OPEN_SECONDS or rate < FRAMES_A_SECOND)


if __name__ == "__main__":
    given = sys.argv[1:]
    wanted = [int(argument) for argument in given[:2]] + [SAMPLES, PARAMETERS][len(given[:2]) :]
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(wanted[0], wanted[1], Path(given[2] if len(given) > 2 else f"{folder}/page.db")))
