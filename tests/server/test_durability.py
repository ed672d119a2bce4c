"""kill -9: everything acknowledged is there, once."""

import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from gradwatch import wire
from tests.postgres import postgres_database
from tests.processes import GradwatchServer, environment, sample


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


def test_every_acknowledged_sample_survives_kill_9_once(tmp_path: Path, database_url: str) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=database_url) as server:
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
    if database_url.startswith("sqlite"):
        with sqlite3.connect(database_url.removeprefix("sqlite:///")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.close()


def test_two_servers_share_one_postgresql(tmp_path: Path, postgres: str) -> None:
    """Each takes half of every run's batches, some of them twice."""
    with postgres_database(postgres) as url:
        refused = subprocess.run(
            [sys.executable, "-m", "gradwatch", "serve", "--port", "0", "--database-url", url],
            env=environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == 1
        assert "gradwatch migrate --database-url" in refused.stderr
        command = [sys.executable, "-m", "gradwatch", "migrate", "--database-url", url]
        subprocess.run(command, env=environment(), cwd=tmp_path, check=True)
        with GradwatchServer(tmp_path / "a.db", url=url) as one, GradwatchServer(tmp_path / "b.db", url=url) as other:
            runs = [one.register(["a"]) for _ in range(3)]

            def send(server: GradwatchServer, order: list[str]) -> None:
                for step in range(1, 61):
                    for run in order:
                        batch = wire.Batch(id=f"b{step}", samples=[sample(step, float(step))])
                        assert server.store(run, batch).status_code == 200

            with ThreadPoolExecutor() as threads:
                for done in [threads.submit(send, one, runs), threads.submit(send, other, runs[::-1])]:
                    done.result()
            for run in runs:
                series = other.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a")
                assert series["last"] == [float(step) for step in range(1, 61)]
                assert one.get(f"/api/v1/runs/{run}")["sample_count"] == 60


def test_sigterm_answers_what_was_taken_and_exits_cleanly(server: GradwatchServer) -> None:
    run = server.register(["a"])
    assert server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0)])).status_code == 200
    assert server.stop() == 0
    server.start()
    assert server.get(f"/api/v1/runs/{run}")["sample_count"] == 1
