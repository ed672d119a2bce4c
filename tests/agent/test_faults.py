"""Training goes on undisturbed whatever becomes of the server and of the disk."""

import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import spool as spool_module
from gradwatch.cli import main
from tests.processes import GradwatchServer


@pytest.fixture(autouse=True)
def spool_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path / "spool"


def _train(url: str, steps: int = 60, timeout_seconds: float = 1.0) -> tuple[gradwatch.Agent, list[float]]:
    """Train with the agent attached; return it, closed, and the seconds that its part of each step took."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.attach(model, optimizer, url=url, every=1)
    seconds = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        time.sleep(0.005)  # gives the sender its turns, as a real step does
    agent.close(timeout_seconds)
    return agent, seconds


@contextmanager
def _http(status: int, body: bytes, released: threading.Event | None = None) -> Iterator[str]:
    """A real server that always gives this answer; after the event, where there is one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if released is not None:
                released.wait()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Stay quiet."""

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                """The agent has given up waiting."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        if released is not None:
            released.set()
        server.shutdown()
        server.server_close()


@contextmanager
def _absent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


SERVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "absent": _absent,
    "hangs": lambda: _http(200, b"{}", threading.Event()),
    "fails": lambda: _http(500, b"Internal Server Error"),
    "garbage": lambda: _http(200, b"<html>Welcome to the airport</html>"),
}


@pytest.mark.parametrize("kind", SERVERS)
def test_training_goes_on_and_nothing_is_lost(kind: str, caplog: pytest.LogCaptureFixture, spool_folder: Path) -> None:
    with SERVERS[kind]() as url:
        _, seconds = _train(url)
    assert sorted(seconds)[-3] < 0.05, sorted(seconds)[-5:]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in warnings if "does not take what is sent" in text]) == 1, warnings
    assert len(warnings) <= 2, warnings
    assert len(list(spool_folder.glob("*.spool"))) == 1


def test_what_waits_is_delivered_by_flush(
    server: GradwatchServer, spool_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _absent() as url:
        agent, _ = _train(url, steps=30)
    assert main(["flush", "--url", server.url]) == 0
    assert "delivered" in capsys.readouterr().out
    run = server.get(f"/api/v1/runs/{agent.run_id}")
    assert (run["sample_count"], run["last_step"], run["state"]) == (30, 30, "finished")
    assert list(spool_folder.iterdir()) == []
    assert main(["flush"]) == 0


def test_the_next_agent_delivers_what_the_last_one_left(server: GradwatchServer) -> None:
    server.stop()
    left, _ = _train(server.url, steps=20)
    server.start()
    model = nn.Linear(2, 2)
    with gradwatch.attach(model, url=server.url):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            answer = server.http.get(f"/api/v1/runs/{left.run_id}")
            if answer.status_code == 200 and answer.json()["state"] == "finished":
                break
            time.sleep(0.05)
    assert server.get(f"/api/v1/runs/{left.run_id}")["sample_count"] == 20


def test_a_server_that_comes_back_gets_everything(server: GradwatchServer) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        for step in range(60):
            if step == 20:
                server.kill()
            if step == 40:
                server.start()
            model.zero_grad()
            model(torch.randn(3, 4)).mean().backward()
            optimizer.step()
            time.sleep(0.01)
        agent.close(timeout_seconds=30)
    series = server.get(f"/api/v1/runs/{agent.run_id}/series", statistic="grad_norm", parameter="weight")
    assert series["steps"] == list(range(1, 61))


def test_a_run_that_the_server_has_forgotten_is_registered_again(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    first.mkdir()
    second.mkdir()
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradwatchServer(first / "gradwatch.db") as server:
        agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
        model(torch.randn(3, 4)).mean().backward()
        optimizer.step()
        deadline = time.monotonic() + 20
        while not server.get("/api/v1/runs") and time.monotonic() < deadline:
            time.sleep(0.02)
        port = int(server.url.rpartition(":")[2])
    with GradwatchServer(second / "gradwatch.db", port=port) as server:
        optimizer.step()
        agent.close()
        assert server.get(f"/api/v1/runs/{agent.run_id}")["sample_count"] >= 1


def test_a_spool_folder_that_cannot_be_made_costs_nothing_but_the_disk(
    server: GradwatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path / "file" / "spool"))
    agent, seconds = _train(server.url, timeout_seconds=10.0)
    assert server.get(f"/api/v1/runs/{agent.run_id}")["sample_count"] == 60
    assert sorted(seconds)[-3] < 0.05
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "kept in memory" in warnings[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 KiB."""
    if os.geteuid() != 0 and not os.environ.get("CI"):
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_nothing_but_the_disk(
    server: GradwatchServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(small_disk))
    server.stop()
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        for _ in range(100):
            model.zero_grad()
            model(torch.randn(3, 2)).mean().backward()
            optimizer.step()
            time.sleep(0.01)
        server.start()
        agent.close(timeout_seconds=30)
    assert server.get(f"/api/v1/runs/{agent.run_id}")["sample_count"] == 100
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in warnings if "full" in text and "kept in memory" in text]) == 1, warnings


def test_a_spool_over_its_bound_drops_the_oldest_and_counts(
    tmp_path: Path, server: GradwatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "MOST_BYTES", 3_000)
    server.stop()
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        for _ in range(20):
            model.zero_grad()
            model(torch.randn(3, 4)).mean().backward()
            optimizer.step()
            time.sleep(0.1)
        server.start()
        agent.close(timeout_seconds=30)
    run = server.get(f"/api/v1/runs/{agent.run_id}")
    assert 0 < run["sample_count"] < 20
    assert run["dropped"]["samples"] == 20 - run["sample_count"]
    assert run["dropped"]["bytes"] > 0
    assert run["last_step"] == 20


def test_errors_of_the_agent_end_with_the_agent(
    server: GradwatchServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of the agent")

    monkeypatch.setattr("gradwatch.meter.Meter.measure", broken)
    agent, _ = _train(server.url, timeout_seconds=10.0)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "switched itself off after 3 errors" in warnings[0]
    assert "a fault of the agent" in warnings[0]
    run = server.get(f"/api/v1/runs/{agent.run_id}")
    assert (run["state"], run["dropped"]["errors"]) == ("finished", 3)
