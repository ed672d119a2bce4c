"""kill -9: everything acknowledged is there, once."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import httpx

from gradwatch import wire
from tests.postgres import migrated_database, postgres_database, small_tablespace, started_server
from tests.processes import GradwatchServer, environment, sample, small_disk


class Agent:
    """Sends batches of one run, each until it is acknowledged, across the server's deaths; as an agent would."""

    def __init__(self, server: GradwatchServer, run: str, stop: threading.Event) -> None:
        self._server, self._stop = server, stop
        self.run = run
        self.acknowledged: set[int] = set()
        self.refused: list[httpx.Response] = []
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the last batch is done."""
        self._thread.join()

    def _send(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            steps = [2 * number, 2 * number + 1]
            batch = wire.Batch(id=f"b{number}", samples=[sample(step, float(step), loss=1.0) for step in steps])
            while not self._stop.is_set():
                try:
                    answer = self._server.store(self.run, batch)
                except (httpx.TransportError, RuntimeError):
                    self._stop.wait(0.005)
                    continue
                if answer.status_code == 200:
                    self.acknowledged.update(steps)
                    break
                self.refused.append(answer)
                self._stop.wait(0.02)


def _check(server: GradwatchServer, agents: list[Agent]) -> None:
    """Compare what was acknowledged with what is there; a batch whose answer was lost may be there as well."""
    for agent in agents:
        acknowledged = set(agent.acknowledged)
        series = server.get(f"/api/v1/runs/{agent.run}/series", statistic="grad_norm", parameter="a", points=10_000)
        assert series["steps"] == series["last_steps"]
        assert len(series["steps"]) == len(set(series["steps"]))
        assert acknowledged <= set(series["steps"])
        assert series["last"] == [float(step) for step in series["steps"]]
        assert server.get(f"/api/v1/runs/{agent.run}")["sample_count"] == len(series["steps"])


class Phoenix(GradwatchServer):
    """A server that is back at once: forked from a process that has imported everything already."""

    FORKS = """
import os, sys
from gradwatch_server.serve import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        os._exit(main(line.split()))
    print("child", child, flush=True)
    os.waitpid(child, 0)
"""

    def start(self) -> None:
        """Start another one in the place of the last."""
        if not hasattr(self, "process"):
            command = [sys.executable, "-c", self.FORKS]
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(),
                    cwd=self.database.parent,
                )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(self._command[4:]).encode() + b"\n")
        self.process.stdin.flush()
        told = [self.process.stdout.readline().decode() for _ in range(2)]
        self.child = next(int(line.split()[1]) for line in told if line.startswith("child"))
        self.url = next(line.split()[3] for line in told if line.startswith("gradwatch serves on "))
        self._command[self._command.index("--port") + 1] = self.url.rpartition(":")[2]
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def kill(self) -> None:
        """End it with SIGKILL: nothing can be tidied up."""
        os.kill(self.child, signal.SIGKILL)
        self.http.close()

    def stop(self) -> int:
        """End it with SIGTERM, and the process that it came from."""
        os.kill(self.child, signal.SIGTERM)
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.ended()


def test_every_acknowledged_sample_survives_50_times_kill_9_once(tmp_path: Path, database_url: str) -> None:
    """At random moments under load; each time the server comes back and the agents go on."""
    moments = random.Random(50)
    with Phoenix(tmp_path / "gradwatch.db", url=database_url) as server:
        stop = threading.Event()
        agents = [Agent(server, server.register(["a"]), stop) for _ in range(4)]
        for _ in range(50):
            goal = sum(len(agent.acknowledged) for agent in agents) + moments.randrange(1, 30)
            while sum(len(agent.acknowledged) for agent in agents) < goal:
                stop.wait(0.001)
            stop.wait(moments.uniform(0.0, 0.01))
            server.kill()
            server.start()
        stop.set()
        for agent in agents:
            agent.join()
        assert sum(len(agent.acknowledged) for agent in agents) > 500
        _check(server, agents)
    if database_url.startswith("sqlite"):
        _check_integrity(Path(database_url.removeprefix("sqlite:///")))


def _check_integrity(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_disk_refuses_clearly_and_nothing_is_lost_when_it_has_room_again(tmp_path: Path) -> None:
    """The database's file may not grow beyond what the kernel allows, until it may."""
    database = tmp_path / "gradwatch.db"
    with GradwatchServer(database) as server:
        stop = threading.Event()
        agents = [Agent(server, server.register(["a"]), stop) for _ in range(2)]
        before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        room = max(part.stat().st_size for part in tmp_path.glob("gradwatch.db*")) + 100_000
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (room, before[1]))
        again = partial(resource.prlimit, server.process.pid, resource.RLIMIT_FSIZE, before)
        _has_room_again(server, agents, stop, again)
    _check_integrity(database)


def _has_room_again(
    server: GradwatchServer, agents: list[Agent], stop: threading.Event, make_room: Callable[[], object]
) -> None:
    """Check what a full disk is told as, make room, and see that everything goes on."""
    while not all(len(agent.refused) > 5 for agent in agents):
        stop.wait(0.01)
    assert server.http.get("/healthz").status_code == 200
    for answer in [answer for agent in agents for answer in agent.refused]:
        assert answer.status_code in (503, 507)
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) >= 1
        assert "nothing was stored" in answer.json()["detail"]
    _check(server, agents)
    make_room()
    stored = [len(agent.acknowledged) for agent in agents]
    while not all(len(agent.acknowledged) > count + 20 for agent, count in zip(agents, stored, strict=True)):
        stop.wait(0.01)
    stop.set()
    for agent in agents:
        agent.join()
    _check(server, agents)


def test_a_full_disk_of_postgresql_refuses_clearly_and_nothing_is_lost(tmp_path: Path) -> None:
    """The disk that holds the tables fills up; the one that holds the log of transactions does not."""
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(64))
        postgres = stack.enter_context(started_server())
        space = stack.enter_context(small_tablespace(postgres, disk))
        url = stack.enter_context(migrated_database(postgres, space))
        server = stack.enter_context(GradwatchServer(tmp_path / "server.db", url=url))
        stop = threading.Event()
        agents = [Agent(server, server.register(["a"]), stop) for _ in range(2)]
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4_096))
        _has_room_again(server, agents, stop, filler.unlink)
        assert 507 in {answer.status_code for agent in agents for answer in agent.refused}


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
