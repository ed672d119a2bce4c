"""What storing and reading cost: ingest over HTTP by a fleet of runs, and a run of a million samples, on both engines.

``python -m benchmarks.store`` prints the bars and what was measured; ``--quick`` does a twentieth of the work.
"""

import argparse
import http.client
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode

import httpx
import numpy as np
import sqlalchemy as sa
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from tests.postgres import postgres_database, postgres_server
from tests.processes import GradwatchServer, environment
from tests.prometheus.programs import Program, Prometheus, VictoriaMetrics

from gradwatch import wire
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store.database import migrate, open_engine, writing
from gradwatch_server.telemetry import remote_write_protocol

STATISTICS = wire.STATISTICS[:1] + wire.STATISTICS[2:5] + wire.STATISTICS[5:6] + wire.STATISTICS[7:]
PARAMETERS = 500
RUNS = 50
SAMPLES_PER_BATCH = 16


ENGINES = ("sqlite", "postgresql")
Names = tuple[wire.Statistic, ...]
Figures = Iterator[tuple[str, float, str]]
"""What was measured, the figure, and the bar that it is held against."""


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


def samples(first: int, count: int, width: int, names: Names) -> list[wire.Sample]:
    """Return samples of a healthy run."""
    draws = np.random.default_rng(first).lognormal(-3, 0.1, (count, len(names), width)).astype(np.float32)
    draws[:, [name == "nonfinite_count" for name in names]] = 0.0
    return [
        wire.Sample(step=first + row, at=1.79e9 + row, statistics=dict(zip(names, draws[row], strict=True)))
        for row in range(count)
    ]


class Target(Protocol):
    """What the fleet writes to."""

    fleet: int
    """Runs that report."""
    connections: int
    """Connections of the fleet, which share its runs."""
    values: int
    """Values of a batch."""

    def runs(self, count: int) -> list[str]:
        """Make runs known; return their ids."""

    def request(self, run: str, number: int) -> tuple[str, bytes, Mapping[str, str]]:
        """Return path, body and headers of a run's batch."""


class Ours:
    """gradwatch: batches as an agent sends them, prepared beforehand but for step and id."""

    fleet, connections = RUNS, 10

    def __init__(
        self, url: str, width: int = PARAMETERS, count: int = SAMPLES_PER_BATCH, names: Names = STATISTICS
    ) -> None:
        self._url, self._width = url, width
        self._draws = [sample.statistics for sample in samples(0, count, width, names)]
        self.values = count * width * len(names)

    def runs(self, count: int) -> list[str]:
        """Register them."""
        body = wire.encode(wire.Registration(parameters=parameters(self._width)))
        headers = {"content-type": wire.MESSAGEPACK_TYPE}
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as http:
            answers = [http.post("/api/v1/runs", content=body, headers=headers) for _ in range(count)]
        return [answer.raise_for_status().json()["id"] for answer in answers]

    def request(self, run: str, number: int) -> tuple[str, bytes, Mapping[str, str]]:
        """Return the next samples."""
        first = number * len(self._draws)
        listed = [
            wire.Sample(step=first + row, at=time.time(), statistics=drawn) for row, drawn in enumerate(self._draws)
        ]
        body = wire.encode(wire.Batch(id=f"b{number}", samples=listed))
        return f"/api/v1/runs/{run}/samples", body, {"content-type": wire.MESSAGEPACK_TYPE}


class SmallBatches(Ours):
    """gradwatch: what a large fleet sends, one sample a batch, each run over a connection of its own."""

    fleet, connections = 200, 200

    def __init__(self, url: str) -> None:
        super().__init__(url, 300, 1, ("grad_norm", "weight_norm"))


class RemoteWrite:
    """Prometheus remote write: a series for each run, parameter and statistic; prepared but for run and times."""

    fleet, connections, values = RUNS, 10, SAMPLES_PER_BATCH * PARAMETERS * len(STATISTICS)
    _RUN = "r" * 16
    _START = 1_500_000_000_000

    def __init__(self, _url: str) -> None:
        drawn = samples(0, SAMPLES_PER_BATCH, PARAMETERS, STATISTICS)
        names = [parameter.name for parameter in parameters(PARAMETERS)]
        self._content = b"".join(
            remote_write_protocol._field(1, remote_write_protocol._series(self._series(drawn, name, statistic, place)))
            for place, name in enumerate(names)
            for statistic in STATISTICS
        )
        self._begin = int(time.time() * 1_000) - 1_800_000

    def _series(
        self, drawn: list[wire.Sample], name: str, statistic: wire.Statistic, place: int
    ) -> remote_write_protocol.Series:
        labels = (("__name__", statistic), ("parameter", name), ("run", self._RUN))
        values = [float(sample.statistics[statistic][place]) for sample in drawn]
        return remote_write_protocol.Series(labels, [(self._START + row, value) for row, value in enumerate(values)])

    def runs(self, count: int) -> list[str]:
        """Return names: nothing has to be registered."""
        return [secrets.token_hex(8) for _ in range(count)]

    def request(self, run: str, number: int) -> tuple[str, bytes, Mapping[str, str]]:
        """Return the next samples, 10 ms apart."""
        content = self._content.replace(self._RUN.encode(), run.encode())
        for row in range(SAMPLES_PER_BATCH):
            at = self._begin + 10 * (number * SAMPLES_PER_BATCH + row)
            content = content.replace(
                remote_write_protocol._varint(self._START + row), remote_write_protocol._varint(at)
            )
        return "/api/v1/write", remote_write_protocol._compress(content), remote_write_protocol.HEADERS


TARGETS: dict[str, Callable[[str], Target]] = {
    "gradwatch": Ours,
    "gradwatch-small": SmallBatches,
    "remote-write": RemoteWrite,
}


def send(address: str, target: Target, runs: list[str], load: Load, until: float, pause_seconds: float) -> None:
    """Send batches for these runs in turn until the time is over; runs of a fleet do not send in step."""
    number = 0
    connection = http.client.HTTPConnection(address, timeout=60)
    threading.Event().wait(pause_seconds * float(np.random.default_rng().random()))
    while time.perf_counter() < until:
        for run in runs:
            path, body, headers = target.request(run, number)
            started = time.perf_counter()
            connection.request("POST", path, body, dict(headers))
            answer = connection.getresponse()
            told = answer.read()
            assert answer.status in (200, 204), told
            load.seconds.append(time.perf_counter() - started)
            load.values += target.values
            if pause_seconds:
                threading.Event().wait(max(0.0, pause_seconds - load.seconds[-1]))
            if time.perf_counter() >= until:
                break
        number += 1
    connection.close()


def ingest(kind: str, url: str, seconds: float, values_per_second: float | None) -> tuple[float, float]:
    """Load a server with a fleet from another process's threads; return values/s and the p99 of acknowledgement."""
    arguments = [kind, url, str(seconds), str(values_per_second or 0)]
    command = [sys.executable, "-m", "benchmarks.store", "--client", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    rate, p99 = done.stdout.split()
    return float(rate), float(p99)


def client(kind: str, url: str, seconds: float, values_per_second: float) -> None:
    """Be the fleet."""
    target = TARGETS[kind](url)
    runs = target.runs(target.fleet)
    threads, lanes = [], target.connections
    loads = [Load([]) for _ in range(lanes)]
    pause = lanes * target.values / values_per_second if values_per_second else 0.0
    started = time.perf_counter()
    for index, load in enumerate(loads):
        share = (url.removeprefix("http://"), target, runs[index::lanes], load, started + seconds, pause)
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


def reads(server: GradwatchServer, count: int) -> Figures:
    """Read the large run at every zoom; yield what, how long and the bar.

    As the fleet writes: by ``http.client``, since httpx takes twice as long for 5 MB as the server.
    """
    path, ranges = "/api/v1/runs/million", zooms(count)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)

    def fetch(address: str) -> int:
        connection.request("GET", address)
        answer = connection.getresponse()
        told = answer.read()
        assert answer.status == 200, told
        return len(told)

    def get(what: str, turn: int, **query: str | int) -> None:
        first, last = ranges[turn % len(ranges)]
        fetch(f"{path}/{what}?" + urlencode({"from_step": first, "to_step": last, **query}))

    yield "map 500 x 300 JSON, p95 ms", latency(lambda turn: get("map", turn, points=500)), "60"
    yield "map 500 x 300 packed, p95 ms", latency(lambda turn: get("tile", turn, points=500)), "60"
    series: dict[str, str | int] = {"statistic": "ratio", "parameter": "layer3.weight", "points": 1_000}
    yield "series 1,000 points, p95 ms", latency(lambda turn: get("series", turn, **series)), "60"
    yield "opening the run, p95 ms", latency(lambda _: list(map(fetch, (path, f"{path}/tile"))), 20), "100"
    connection.close()


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
    """Return the most memory that a process has held, and those that it started and that still run."""
    status = Path(f"/proc/{process}/status").read_text()
    children = [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in _children(task)]
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 + sum(map(memory_bytes, children))


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def measure(engine: str, seconds: float, count: int) -> Figures:
    """Measure one engine; yield what, the figure and the bar."""
    with tempfile.TemporaryDirectory() as name, database(engine, Path(name)) as url:
        opened = open_engine(url)
        migrate(opened)
        opened.dispose()
        empty = size_bytes(url)
        with GradwatchServer(Path(name) / "server.db", url=url) as server:
            rate, p99 = ingest("gradwatch", server.url, seconds, None)
            yield "ingest, million values/s", rate / 1e6, "3" if engine == "sqlite" else "2"
            yield "acknowledgement at full load, p99 ms", p99 * 1e3, ""
            stored = server.http.get("/metrics").text.partition("\ngradwatch_ingest_values_total ")[2].split()[0]
            size = (size_bytes(url) - empty) / float(stored)
            yield "bytes a value", size, "6.5" if engine == "sqlite" else "8"
            _, p99 = ingest("gradwatch", server.url, seconds, rate / 2)
            yield "acknowledgement at half load, p99 ms", p99 * 1e3, "250"
            rate, _ = ingest("gradwatch-small", server.url, seconds, None)
            yield "batches of one sample of 300 parameters, 1/s", rate / 600, ""
            fill_ratio = fill(url, count, 300)
            yield "cost of the last tenth to the first", fill_ratio, "1"
            yield from reads(server, count)
            yield "server memory, MB", memory_bytes(server.process.pid) / 1e6, "300"


_MLFLOW_BATCH = 1_000
"""Metrics that MLflow takes at once, at most."""
PEERS: dict[str, Callable[[Path], Program]] = {"Prometheus": Prometheus, "VictoriaMetrics": VictoriaMetrics}
"""What a user would pick; neither has the data synced to disk when it answers."""
STORES = [*ENGINES, *PEERS, "MLflow"]


def measure_peer(name: str, seconds: float) -> Figures:
    """Measure what the same fleet gets from another store, which answers before the data is synced to disk."""
    with tempfile.TemporaryDirectory() as folder, PEERS[name](Path(folder) / "store") as program:
        rate, p99 = ingest("remote-write", program.url, seconds, None)
        yield "ingest, million values/s", rate / 1e6, ""
        yield "acknowledgement at full load, p99 ms", p99 * 1e3, ""


def measure_mlflow(seconds: float) -> Figures:
    """Measure what MLflow's own SQLite store takes from one process, without HTTP: the most that its server could."""
    with tempfile.TemporaryDirectory() as folder:
        client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        run = client.create_run(client.create_experiment("fleet")).info.run_id
        names = [f"{name}.{parameter.name}" for name in STATISTICS for parameter in parameters(PARAMETERS)]
        spent: list[float] = []
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            at, step = int(time.time() * 1e3), len(spent)
            for begin in range(0, len(names), _MLFLOW_BATCH):
                batch = [Metric(name, 0.1, at, step) for name in names[begin : begin + _MLFLOW_BATCH]]
                sent = time.perf_counter()
                client.log_batch(run, metrics=batch)
                spent.append(time.perf_counter() - sent)
        rate = len(spent) * _MLFLOW_BATCH / (time.perf_counter() - started)
        yield "ingest, million values/s", rate / 1e6, ""
        yield "acknowledgement at full load, p99 ms", float(np.quantile(spent, 0.99)) * 1e3, ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work")
    parser.add_argument("--samples", type=int, help="length of the long run (default: 1,000,000; --quick: 50,000)")
    parser.add_argument("--seconds", type=float, help="time of each load (default: 30; --quick: 10)")
    parser.add_argument("--store", choices=STORES, action="append", help="measure this one (default: all)")
    parser.add_argument("--client", nargs=4, metavar=("KIND", "URL", "SECONDS", "RATE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        kind, url, *numbers = given.client
        client(kind, url, *map(float, numbers))
        return
    count = given.samples or (50_000 if given.quick else 1_000_000)
    seconds = given.seconds or (10.0 if given.quick else 30.0)
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for store in given.store or STORES:
        if store in ENGINES:
            figures = measure(store, seconds, count)
        else:
            figures = measure_mlflow(seconds) if store == "MLflow" else measure_peer(store, seconds)
        for what, figure, bar in figures:
            print(f"{store}: {what} {figure:.3g}", file=sys.stderr, flush=True)
            found.setdefault(what, {})[store] = figure, bar
    print_table(found, given.store or STORES)


def print_table(found: Mapping[str, Mapping[str, tuple[float, str]]], stores: Sequence[str]) -> None:
    """Print the figures side by side, each with its bar."""
    print(f"{'':<40}" + "".join(f"{store:>20}" for store in stores))
    for what, row in found.items():
        cells = [row.get(store) for store in stores]
        told = ("-" if cell is None else f"{cell[0]:.3g}" + (f" (bar {cell[1]})" if cell[1] else "") for cell in cells)
        print(f"{what:<40}" + "".join(f"{text:>20}" for text in told))


if __name__ == "__main__":
    main()
