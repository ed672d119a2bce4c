"""A real Prometheus, Alertmanager and VictoriaMetrics, started by the tests themselves on free ports."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx

from tests.processes import PATIENCE_SECONDS, free_port


def until(found: Callable[[], Any], what: str) -> Any:
    """Ask until there is an answer, and return it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (answer := found()):
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_SECONDS:.0f} s"
        time.sleep(0.1)
    return answer


class Program:
    """A server of its own process in a folder of its own; a context manager."""

    health = "/-/ready"

    def __init__(self, folder: Path, port: int, command: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._command, self._folder = command, folder

    def __enter__(self) -> Self:
        with (self._folder / "log").open("wb") as log:
            self.process = subprocess.Popen(self._command, cwd=self._folder, stdout=log, stderr=log)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS, trust_env=False)
        until(self._ready, f"answer of {self._command[0]}, see {self._folder / 'log'}")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.http.close()

    def _ready(self) -> bool:
        assert self.process.poll() is None, (self._folder / "log").read_text()
        try:
            return self.http.get(self.health).status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what a PromQL expression yields now."""
        answer = self.http.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found


class Prometheus(Program):
    """Prometheus with a configuration file of ours, and the receiver of remote writes."""

    def __init__(self, folder: Path, configuration: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yml").write_text(configuration)
        port = free_port()
        options = [
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--web.enable-remote-write-receiver",
        ]
        super().__init__(folder, port, ["prometheus", *options])


class VictoriaMetrics(Program):
    """VictoriaMetrics, told to answer with the newest samples at once."""

    health = "/health"

    def __init__(self, folder: Path) -> None:
        port = free_port()
        options = ["-storageDataPath=data", f"-httpListenAddr=127.0.0.1:{port}", "-search.latencyOffset=0s"]
        super().__init__(folder, port, ["victoria-metrics", *options])


class Alertmanager(Program):
    """Alertmanager with a configuration file of ours."""

    def __init__(self, folder: Path, configuration: Path) -> None:
        port = free_port()
        options = [
            f"--config.file={configuration}",
            "--storage.path=data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ]
        super().__init__(folder, port, ["prometheus-alertmanager", *options])


def scraping(target: str, more: str = "") -> str:
    """Return a configuration that scrapes an address every second."""
    host = target.removeprefix("http://")
    return (
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"scrape_configs: [{{job_name: gradwatch, static_configs: [{{targets: ['{host}']}}]}}]\n{more}"
    )
