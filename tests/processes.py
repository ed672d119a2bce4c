"""Real servers and receivers, started by the tests themselves on free ports."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import numpy as np
import pytest

from gradwatch import wire

Result = TypeVar("Result")
ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 60.0
"""How long an event is waited for that comes within a second on a machine that does nothing else."""
LEAVE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
"""The last lines of a rank's program whose agents are closed.

While the interpreter ends, a thread of torch's process group may still let go of the last collective's tensors, which
now and then ends the process with "terminate called".
"""
STOP_POLL_SECONDS = 0.02
"""How often a server in a thread looks whether it is to stop; Python's default makes each test wait half a second."""


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment without its gradwatch settings, with this tree importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRADWATCH_")}
    paths = [str(ROOT / "agent"), str(ROOT / "server"), kept.get("PYTHONPATH", "")]
    kept["OMP_NUM_THREADS"] = "1"  # tests run side by side: several threads each would wait for one another
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | changes


def run_apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in a thread of its own: the browser's event loop may hold this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def wait_for(log: Path, line: str) -> None:
    """Wait until a log holds a line."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while line not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        threading.Event().wait(0.05)


def free_port() -> int:
    """Return a port that nobody has now, of those that no system hands out by itself in the meantime."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """Mount a disk of this size, which takes root's rights."""
    with tempfile.TemporaryDirectory(prefix="gradwatch-disk-", dir="/tmp") as name:
        options = f"size={megabytes}m,mode=777"
        mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "gradwatch", name], check=False)
        if mounting.returncode and "CI" not in os.environ:
            pytest.skip("only root mounts a small disk")
        assert not mounting.returncode, "mounting a small disk takes root's rights"
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


class GradwatchServer:
    """``gradwatch serve`` in a process of its own; a context manager."""

    def __init__(self, database: Path, *options: str, port: int = 0, url: str | None = None) -> None:
        """Keep its log beside ``database``, an SQLite file; where ``url`` is given, the data is there instead."""
        self.database = database
        self._command = [sys.executable, "-m", "gradwatch", "serve", "--port", str(port or free_port())]
        self._command += ["--database-url", url or f"sqlite:///{database}", *options]
        self.log = database.with_suffix(".log")
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes requests."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, env=environment(), cwd=self.database.parent
            )
        assert self.process.stdout is not None
        announced = self.process.stdout.readline().decode()
        assert announced.startswith("gradwatch serves on "), self.log.read_text()
        self.url = announced.split()[3]
        self._command[self._command.index("--port") + 1] = self.url.rpartition(":")[2]
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS, trust_env=False)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._ready():
            assert time.monotonic() < deadline, self.log.read_text()
            threading.Event().wait(0.05)

    def _ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/readyz").status_code == 200
        return False

    def kill(self) -> None:
        """End it with SIGKILL: nothing can be tidied up."""
        self.process.send_signal(signal.SIGKILL)
        self.ended()

    def stop(self) -> int:
        """End it with SIGTERM; return its exit code."""
        self.process.terminate()
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; return its exit code."""
        code = self.process.wait(2 * PATIENCE_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.http.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def register(self, names: Sequence[str] = ("first.weight", "first.bias"), **fields: Any) -> str:
        """Register a run of plain parameters and return its id."""
        parameters = [wire.Parameter(name, [4, 4], units=4) for name in names]
        answer = self.post("/api/v1/runs", wire.Registration(parameters=parameters, **fields))
        assert answer.status_code in (200, 201), answer.text
        run_id: str = answer.json()["id"]
        return run_id

    def post(self, path: str, document: wire.Registration | wire.Batch) -> httpx.Response:
        """Send a document as MessagePack."""
        return self.http.post(path, content=wire.encode(document), headers={"content-type": wire.MESSAGEPACK_TYPE})

    def store(self, run_id: str, batch: wire.Batch) -> httpx.Response:
        """Send a batch."""
        return self.post(f"/api/v1/runs/{run_id}/samples", batch)

    def get(self, path: str, **query: Any) -> Any:
        """Read a JSON document; anything but 200 is a failure."""
        answer = self.http.get(path, params=query)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        return answer.json()


def sample(step: int, *grad_norms: float, weight_norm: float = 1.0, **scalars: wire.Number) -> wire.Sample:
    """Return a sample with these gradient norms."""
    gradients = np.array(grad_norms, np.float32)
    return wire.Sample(
        step=step,
        at=1_790_000_000.0 + step,
        statistics={"grad_norm": gradients, "weight_norm": np.full_like(gradients, weight_norm)},
        scalars=scalars,
    )


@dataclass
class WebhookReceiver:
    """A real HTTP receiver; answers with ``statuses`` in turn, the last of them for ever, and with ``headers``.

    Where ``tls`` is given, it speaks HTTPS.
    """

    statuses: list[int] = field(default_factory=lambda: [204])
    headers: dict[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        receiver = self
        self._arrived = threading.Condition()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                with receiver._arrived:
                    receiver.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
                    status = receiver.statuses[min(len(receiver.requests), len(receiver.statuses)) - 1]
                    receiver._arrived.notify_all()
                self.send_response(status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Stay quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self._server.server_port}/hook"

    def wait(self, count: int, seconds: float = PATIENCE_SECONDS) -> list[tuple[dict[str, str], bytes]]:
        """Wait until that many requests have arrived and return them."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.requests) >= count, seconds), self.requests
            return list(self.requests)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
