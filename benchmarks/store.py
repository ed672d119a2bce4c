"""What storing and reading cost: ingest over HTTP by a fleet of runs, and a run of a million samples, on both engines.

``python -m benchmarks.store`` prints the bars and what was measured; ``--quick`` does a twentieth of the work.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import sqlalchemy as sa
from tests.postgres import postgres_database, postgres_server
from tests.processes import GradwatchServer, environment

from gradwatch import wire
from gradwatch_server.database import migrate, open_engine, writing
from gradwatch_server.ingest import Ingest
from gradwatch_server.settings import Configuration

STATISTICS = wire.STATISTICS[:1] + wire.STATISTICS[2:5] + wire.STATISTICS[5:6] + wire.STATISTICS[7:]
PARAMETERS = 500
RUNS = 50
SAMPLES_PER_BATCH = 16


@dataclass
class Load:
    """One client's share of a fleet: how long each acknowledgement took, and how many values were acknowledged."""

    seconds: list[float]
    values: int = 0


def parameters(count: int) -> list[wire.Parameter]:
    """Return the parameters of a deep network: weights and biases in turn."""
    return [
        wire.Parameter(f"layer{index // 2}.{'bias' if index % 2 else 'weight'}", [64] if index % 2 else [64, 64])
        for index in range(count)
    ]


def samples(first: int, count: int, width: int, names: tuple[wire.Statistic, ...]) -> list[wire.Sample]:
    """Return samples of a healthy run."""
    draws = np.random.default_rng(first).lognormal(-3, 0.1, (count, len(names), width)).astype(np.float32)
    draws[:, [name == "nonfinite_count" for name in names]] = 0.0
    return [
        wire.Sample(step=first + row, at=1.79e9 + row, statistics=dict(zip(names, draws[row], strict=True)))
        for row in range(count)
    ]


def send(url: str, runs: list[str], load: Load, until: float, pause_seconds: float) -> None:
    """Send batches for these runs in turn, prepared beforehand but for step and id, until the time is over."""
    draws = [sample.statistics for sample in samples(0, SAMPLES_PER_BATCH, PARAMETERS, STATISTICS)]
    number = 0
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        while time.perf_counter() < until:
            for run in runs:
                first = number * SAMPLES_PER_BATCH
                listed = [
                    wire.Sample(step=first + row, at=time.time(), statistics=drawn) for row, drawn in enumerate(draws)
                ]
                body = wire.encode(wire.Batch(id=f"b{number}", samples=listed))
                started = time.perf_counter()
                answer = client.post(
                    f"/api/v1/runs/{run}/samples", content=body, headers={"content-type": wire.MESSAGEPACK_TYPE}
                )
                answer.raise_for_status()
                load.seconds.append(time.perf_counter() - started)
                load.values += SAMPLES_PER_BATCH * PARAMETERS * len(STATISTICS)
                if pause_seconds:
                    threading.Event().wait(max(0.0, pause_seconds - load.seconds[-1]))
            number += 1


def ingest(url: str, seconds: float, values_per_second: float | None) -> tuple[float, float]:
    """Load a server with a fleet from another process's threads; return values/s and the p99 of acknowledgement."""
    arguments = [url, str(seconds), str(values_per_second or 0)]
    command = [sys.executable, "-m", "benchmarks.store", "--client", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    rate, p99 = done.stdout.split()
    return float(rate), float(p99)


def client(url: str, seconds: float, values_per_second: float) -> None:
    """Be the fleet: ten connections, each for five runs."""
    listed = wire.Registration(parameters=parameters(PARAMETERS))
    runs = []
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for _ in range(RUNS):
            answer = http.post(
                "/api/v1/runs", content=wire.encode(listed), headers={"content-type": wire.MESSAGEPACK_TYPE}
            )
            runs.append(answer.raise_for_status().json()["id"])
    threads, lanes = [], 10
    loads = [Load([]) for _ in range(lanes)]
    batch = SAMPLES_PER_BATCH * PARAMETERS * len(STATISTICS)
    pause = lanes * batch / values_per_second if values_per_second else 0.0
    started = time.perf_counter()
    for index, load in enumerate(loads):
        share = (url, runs[index::lanes], load, started + seconds, pause)
        threads.append(threading.Thread(target=send, args=share))
        threads[-1].start()
    for thread in threads:
        thread.join()
    rate = sum(load.values for load in loads) / (time.perf_counter() - started)
    print(rate, float(np.quantile([second for load in loads for second in load.seconds], 0.99)))


def fill(url: str, count: int, width: int) -> float:
    """Load one run through the real write path; return the cost of the last tenth of its samples over the first."""
    engine, run = open_engine(url), "million"
    writer = Ingest(Configuration(), "http://localhost")
    with writing(engine) as connection:
        writer.register(connection, run, wire.Registration(parameters=parameters(width)))
    spent = []
    for number in range(count // 1_000):
        batch = wire.Batch(id=f"b{number}", samples=samples(number * 1_000, 1_000, width, ("grad_norm", "weight_norm")))
        started = time.perf_counter()
        with writing(engine) as connection:
            writer.store(connection, run, batch)
        spent.append(time.perf_counter() - started)
    engine.dispose()
    tenth = max(1, len(spent) // 10)
    return float(np.mean(spent[-tenth:]) / np.mean(spent[:tenth]))


def latency(read: Callable[[int], object], times: int = 60) -> float:
    """Return the p95 of a read, in milliseconds."""
    spent = []
    for turn in range(times):
        started = time.perf_counter()
        read(turn)
        spent.append(time.perf_counter() - started)
    return float(np.quantile(spent, 0.95)) * 1e3


def zooms(count: int) -> list[tuple[int, int]]:
    """Return ranges of every width, from all samples down to a thousand of them."""
    draws = np.random.default_rng(7)
    widths = [int(width) for width in np.geomspace(1_000, count, 20)]
    return [(start, start + width) for width in widths for start in [int(draws.integers(0, count - width + 1))]]


def reads(server: GradwatchServer, count: int) -> Iterator[tuple[str, float, str]]:
    """Read the large run at every zoom; yield what, how long and the bar."""
    path, ranges = "/api/v1/runs/million", zooms(count)

    def get(what: str, turn: int, **query: str | int) -> None:
        first, last = ranges[turn % len(ranges)]
        asked: dict[str, str | int] = {"from_step": first, "to_step": last, **query}
        assert server.http.get(f"{path}/{what}", params=asked).status_code == 200

    yield "map 500 x 300 JSON, p95 ms", latency(lambda turn: get("map", turn, points=500)), "60"
    yield "map 500 x 300 packed, p95 ms", latency(lambda turn: get("tile", turn, points=500)), "60"
    series: dict[str, str | int] = {"statistic": "ratio", "parameter": "layer3.weight", "points": 1_000}
    yield "series 1,000 points, p95 ms", latency(lambda turn: get("series", turn, **series)), "60"
    yield "opening the run, p95 ms", latency(lambda _: [server.get(path), server.http.get(f"{path}/tile")], 20), "100"


@contextmanager
def database(engine: str, folder: Path) -> Iterator[str]:
    """Make an empty database of an engine."""
    if engine == "sqlite":
        yield f"sqlite:///{folder / 'store.db'}"
        return
    with postgres_server("-c shared_buffers=128MB") as server, postgres_database(server) as url:
        yield url


def size_bytes(url: str) -> int:
    """Return what the database takes on disk."""
    engine = open_engine(url)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            return int(connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar_one())
        pages = connection.execute(sa.text("PRAGMA page_count")).scalar_one()
        return int(pages * connection.execute(sa.text("PRAGMA page_size")).scalar_one())


def memory_bytes(process: int) -> int:
    """Return the most memory that a process has held."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(engine: str, seconds: float, count: int) -> Iterator[tuple[str, float, str]]:
    """Measure one engine; yield what, the figure and the bar."""
    with tempfile.TemporaryDirectory() as name, database(engine, Path(name)) as url:
        opened = open_engine(url)
        migrate(opened)
        opened.dispose()
        empty = size_bytes(url)
        with GradwatchServer(Path(name) / "server.db", url=url) as server:
            rate, p99 = ingest(server.url, seconds, None)
            yield "ingest, million values/s", rate / 1e6, "3" if engine == "sqlite" else "2"
            yield "acknowledgement at full load, p99 ms", p99 * 1e3, "-"
            stored = server.http.get("/metrics").text.partition("\ngradwatch_ingest_values_total ")[2].split()[0]
            size = (size_bytes(url) - empty) / float(stored)
            yield "bytes a value", size, "6.5" if engine == "sqlite" else "8"
            _, p99 = ingest(server.url, seconds, rate / 2)
            yield "acknowledgement at half load, p99 ms", p99 * 1e3, "250"
            fill_ratio = fill(url, count, 300)
            yield "cost of the last tenth to the first", fill_ratio, "1"
            yield from reads(server, count)
            yield "server memory, MB", memory_bytes(server.process.pid) / 1e6, "300"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work")
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], action="append", help="(default: both)")
    parser.add_argument("--client", nargs=3, metavar=("URL", "SECONDS", "RATE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        client(given.client[0], float(given.client[1]), float(given.client[2]))
        return
    seconds, count = (10.0, 50_000) if given.quick else (30.0, 1_000_000)
    for engine in given.engine or ["sqlite", "postgresql"]:
        for what, figure, bar in measure(engine, seconds, count):
            print(f"{engine:<11} {what:<40} {figure:10.2f}   bar {bar}", flush=True)


if __name__ == "__main__":
    main()
