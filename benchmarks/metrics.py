"""How long a scrape takes while 100 runs of 300 parameters are active.

``python -m benchmarks.metrics`` prints the time of each of ten scrapes of a real server, and the CPU time of one: on a
machine that is busy with other things the second is what a scrape costs.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.processes import GradwatchServer

from gradwatch import wire

RUNS, PARAMETERS, SAMPLES = 100, 300, 20
LIMIT_SECONDS = 0.5


def fill(server: GradwatchServer, runs: int = RUNS, parameters: int = PARAMETERS) -> None:
    """Register active runs and store samples of each."""
    random = np.random.default_rng(0)
    names = [f"blocks.{index // 6}.layer{index % 6}.weight" for index in range(parameters)]
    for run in range(runs):
        run_id = server.register(names, name=f"run {run}")
        samples = [_sample(step, random, parameters) for step in range(SAMPLES)]
        server.store(run_id, wire.Batch(id="1", samples=samples)).raise_for_status()


def _sample(step: int, random: np.random.Generator, parameters: int) -> wire.Sample:
    gradients = (10.0 ** random.normal(-2, 0.3, parameters)).astype(np.float32)
    statistics_ = dict.fromkeys(wire.STATISTICS, np.zeros(parameters, np.float32))
    known: dict[wire.Statistic, wire.Vector] = {
        "grad_norm": gradients,
        "clipped_grad_norm": gradients,
        "weight_norm": np.ones(parameters, np.float32),
    }
    return wire.Sample(step=step, at=time.time(), statistics=statistics_ | known, scalars={"loss": 1.0})


@dataclass(frozen=True)
class Cost:
    """What scrapes took."""

    wall_seconds: list[float]
    cpu_seconds: float
    """CPU time of the server for one scrape."""
    size_bytes: int


def scrape(server: GradwatchServer, scrapes: int = 10) -> Cost:
    """Return what each of some scrapes took."""
    wall, text = [], server.http.get("/metrics").text
    before = _cpu_seconds(text)
    for _ in range(scrapes):
        started = time.perf_counter()
        text = server.http.get("/metrics").raise_for_status().text
        wall.append(time.perf_counter() - started)
    return Cost(wall, (_cpu_seconds(text) - before) / scrapes, len(text))


def _cpu_seconds(text: str) -> float:
    (line,) = (line for line in text.splitlines() if line.startswith("process_cpu_seconds_total "))
    return float(line.split()[1])


def main() -> int:
    """Measure and print; 1 where a scrape takes more than it may."""
    with tempfile.TemporaryDirectory() as folder, GradwatchServer(Path(folder) / "gradwatch.db") as server:
        fill(server)
        cost = scrape(server)
    print("scrapes, s:", *(f"{seconds:.3f}" for seconds in cost.wall_seconds))
    median = statistics.median(cost.wall_seconds)
    print(f"{RUNS} active runs of {PARAMETERS} parameters, {cost.size_bytes / 1e6:.2f} MB:", end=" ")
    print(f"median {median:.3f} s, fastest {min(cost.wall_seconds):.3f} s, CPU {cost.cpu_seconds:.3f} s a scrape")
    return int(cost.cpu_seconds > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
