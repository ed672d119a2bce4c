"""What the agent's tests share: a real server on a free port that decodes what it gets, and a strict agent."""

import gzip
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from gradwatch import wire
from gradwatch.monitor.guard import Guard
from tests.processes import PATIENCE_SECONDS, STOP_POLL_SECONDS

Answerer = Callable[["Server", str], tuple[int, dict[str, str], bytes] | None]

_REGISTER = "/api/v1/runs"


class Server:
    """Receives what agents send. ``answer`` may replace the answer: (status, headers, body)."""

    def __init__(self) -> None:
        self.registrations: list[wire.Registration] = []
        self.batches: list[wire.Batch] = []
        self.run_of: dict[str, str] = {}
        """The run of each batch, by its id."""
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answer: Answerer | None = None
        self.changed = threading.Condition()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.receive(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(STOP_POLL_SECONDS,), daemon=True)
        self._thread.start()

    def receive(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        if handler.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        with self.changed:
            self.requests.append((handler.path, dict(handler.headers)))
            status, headers, content = (self.answer and self.answer(self, handler.path)) or (200, {}, b"")
            if not content and 200 <= status < 300:
                if self._knows(handler.path):
                    content = self._keep(handler.path, body)
                else:
                    status, content = 404, json.dumps({"detail": f"{handler.path}: the run is not registered"}).encode()
            self.changed.notify_all()
        handler.send_response(status)
        for name, value in {"Content-Type": wire.JSON_TYPE, "Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def _knows(self, path: str) -> bool:
        """Return whether the real server would take the request: nothing of a run comes before its registration."""
        return path == _REGISTER or path.split("/")[4] in {registration.id for registration in self.registrations}

    def _keep(self, path: str, body: bytes) -> bytes:
        if path == _REGISTER:
            registration = wire.decode(body, wire.Registration)
            self.registrations.append(registration)
            return json.dumps({"id": registration.id, "url": "/"}).encode()
        batch = wire.decode(body, wire.Batch)
        self.run_of[batch.id] = path.split("/")[4]
        if batch.id not in {known.id for known in self.batches}:
            self.batches.append(batch)
        return b"{}"

    def wait(self, condition: Callable[[], bool], timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until ``condition`` holds; it is looked at after each request."""
        with self.changed:
            assert self.changed.wait_for(condition, timeout_seconds), f"waited in vain: {len(self.requests)} requests"

    @property
    def samples(self) -> list[wire.Sample]:
        return sorted((sample for batch in self.batches for sample in batch.samples), key=lambda sample: sample.step)

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.registrations[-1].parameters]

    def values(self, statistic: wire.Statistic, step: int = -1) -> dict[str, float]:
        """Return a statistic of a step by parameter name; of the last one by default."""
        sample = self.samples[-1] if step < 0 else next(sample for sample in self.samples if sample.step == step)
        return dict(zip(self.names, sample.statistics[statistic].tolist(), strict=True))

    def scalar(self, name: str, step: int = -1) -> float:
        sample = self.samples[-1] if step < 0 else next(sample for sample in self.samples if sample.step == step)
        return wire.deserialise(sample.scalars[name])

    def trail(self, name: str) -> dict[int, float]:
        return {
            step: wire.deserialise(value)
            for batch in self.batches
            if name in batch.trail
            for step, value in zip(batch.trail[name].steps, batch.trail[name].values, strict=True)
        }

    @property
    def events(self) -> list[wire.Event]:
        return [event for batch in self.batches for event in batch.events]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class OwnErrors(logging.Handler):
    """Collects the errors that agents swallowed: a test that does not clear them fails."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[str] = []
        self.warnings = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings += record.levelno >= logging.WARNING
        if record.exc_info:
            self.seen.append(logging.Formatter().formatException(record.exc_info))


@pytest.fixture(autouse=True)
def own_errors() -> Iterator[OwnErrors]:
    log = logging.getLogger("gradwatch")
    handler = OwnErrors()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    yield handler
    log.removeHandler(handler)
    assert not handler.seen, "\n".join(handler.seen)


@pytest.fixture(autouse=True)
def _surroundings(own_errors: OwnErrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path / "spool"))
    for name in ("URL", "TOKEN", "TOKEN_FILE", "PROJECT", "RUN", "EVERY"):
        monkeypatch.delenv(f"GRADWATCH_{name}", raising=False)
    monkeypatch.setattr(Guard, "raises_own_errors", True)
    torch.manual_seed(0)
    yield
    from gradwatch.session import running_sessions

    for session in running_sessions():
        session.close(time.monotonic() + 0.1, "completed")
    for thread in threading.enumerate():
        if thread.name.startswith("gradwatch-"):
            thread.join(PATIENCE_SECONDS)  # what it says belongs to this test


@pytest.fixture
def errors_are_counted(own_errors: OwnErrors, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The agent swallows and counts its own errors, as it does for users, where tests otherwise have it raise them.

    A test that uses this looks at the count in the batches itself.
    """
    monkeypatch.setattr(Guard, "raises_own_errors", False)
    yield
    own_errors.seen.clear()
