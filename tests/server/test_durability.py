"""kill -9: everything acknowledged is there, once."""

import sqlite3
import threading
from pathlib import Path

import httpx

from gradwatch import wire
from tests.processes import GradwatchServer, sample


def _send(server: GradwatchServer, run: str, acknowledged: set[int], stop: threading.Event) -> None:
    """Send one sample a batch, each until it is acknowledged, as an agent would; across the server's deaths."""
    step = 0
    while not stop.is_set():
        step += 1
        batch = wire.Batch(id=f"b{step}", samples=[sample(step, float(step))])
        while not stop.is_set():
            try:
                if server.store(run, batch).status_code == 200:
                    acknowledged.add(step)
                    break
            except (httpx.TransportError, RuntimeError):
                stop.wait(0.01)


def test_every_acknowledged_sample_survives_kill_9_once(tmp_path: Path) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        runs = [server.register(["a"]) for _ in range(4)]
        acknowledged: dict[str, set[int]] = {run: set() for run in runs}
        stop = threading.Event()
        senders = [
            threading.Thread(target=_send, args=(server, run, acknowledged[run], stop), daemon=True) for run in runs
        ]
        for sender in senders:
            sender.start()
        for kills in range(1, 6):
            goal = 40 * kills
            while min(map(len, acknowledged.values())) < goal:
                stop.wait(0.005)
            server.kill()
            server.start()
        stop.set()
        for sender in senders:
            sender.join()
        for run in runs:
            series = server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a", points=10_000)
            assert len(series["steps"]) == len(set(series["steps"]))
            assert acknowledged[run] <= set(series["steps"])
            assert server.get(f"/api/v1/runs/{run}")["sample_count"] == len(series["steps"])
    with sqlite3.connect(server.database) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_sigterm_answers_what_was_taken_and_exits_cleanly(server: GradwatchServer) -> None:
    run = server.register(["a"])
    assert server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0)])).status_code == 200
    assert server.stop() == 0
    server.start()
    assert server.get(f"/api/v1/runs/{run}")["sample_count"] == 1
