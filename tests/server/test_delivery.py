"""Deliveries that survive everything: kill -9 at each point, receivers that are down, slow, gone or busy."""

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gradwatch import wire
from gradwatch_server.answer import Answer
from gradwatch_server.circuit import Circuit
from tests.processes import GradwatchServer, WebhookReceiver, sample

NAN = float("nan")
KILLS = 30


@dataclass
class Hook:
    """A receiver that runs ``before`` each answer; it remembers (webhook-id, alert, state) of every request."""

    seen: list[tuple[str, str, str]] = field(default_factory=list)
    before: Callable[[], None] = lambda: None
    port: int = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen; on the port that it had before."""
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                hook.seen.append((self.headers["webhook-id"], body["data"]["id"], body["data"]["state"]))
                hook.before()
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Stay quiet."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """The other side has been killed: that is the test."""

        server = Server(("127.0.0.1", self.port), Handler)
        self.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()

    def wait(self, count: int, seconds: float = 60) -> None:
        """Wait until so many different deliveries have arrived."""
        deadline = time.monotonic() + seconds
        while len({entry[0] for entry in self.seen}) < count:
            assert time.monotonic() < deadline, f"{len(self.seen)} requests, {count} deliveries expected"
            threading.Event().wait(0.02)


@contextmanager
def full(port: int) -> Iterator[int]:
    """Hold a port whose backlog is full: connections to it hang before anything can be sent."""
    with socket.create_server(("127.0.0.1", port), backlog=0) as listening, closing(socket.socket()) as filling:
        filling.connect(listening.getsockname())
        yield listening.getsockname()[1]


def configuration(pace: str, **urls: str) -> str:
    """Return a configuration with these webhooks."""
    receivers = (
        f'[[receivers]]\nname = "{name}"\ntype = "webhook"\nurl = "{url}"\nallow_networks = ["127.0.0.0/8"]\n'
        for name, url in urls.items()
    )
    return f"[delivery]\n{pace}\n" + "".join(receivers)


def test_kill_9_before_while_and_after_sending_loses_no_transition(tmp_path: Path) -> None:
    """Each kill hits three receivers at three points: connecting, asked but not answered, answered but not recorded."""
    connecting, asked, answered = Hook(), Hook(), Hook()
    with full(0) as port:
        connecting.port = port
    database = tmp_path / "gradwatch.db"
    with asked.open(), answered.open():
        urls = {
            name: f"http://127.0.0.1:{hook.port}/hook"
            for name, hook in (("connecting", connecting), ("asked", asked), ("answered", answered))
        }
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("lease_seconds = 1.5\ntimeout_seconds = 1.4\nretry_seconds = [0.1]", **urls))
        with GradwatchServer(database, "--config", str(config)) as server:
            run = server.register(["a"])
            for kill in range(KILLS):
                _kill_midway(server, run, kill, connecting, asked, answered)
                with connecting.open():
                    server.start()
                    for hook in (connecting, asked, answered):
                        hook.wait(kill + 1)
                    _settled(server)
    for hook in (connecting, asked, answered):
        _all_in_order(hook)
    assert len(asked.seen) > KILLS


def _kill_midway(server: GradwatchServer, run: str, kill: int, connecting: Hook, asked: Hook, answered: Hook) -> None:
    reached = [threading.Event(), threading.Event()]
    released = threading.Event()
    with full(connecting.port), closing(sqlite3.connect(server.database, check_same_thread=False)) as lock:
        lock.isolation_level = None

        def hang() -> None:
            reached[0].set()
            released.wait(30)

        def lock_and_answer() -> None:
            if not reached[1].is_set():
                lock.execute("BEGIN IMMEDIATE")
                reached[1].set()

        asked.before, answered.before = hang, lock_and_answer
        first = 1_000 * kill + 1
        ill = [sample(first, NAN)]
        well = [sample(step, 1.0) for step in range(first, first + 20)]
        server.store(run, wire.Batch(id=f"b{kill}", samples=well if kill % 2 else ill))
        for event in reached:
            assert event.wait(30), server.log.read_text()[-3000:]
        server.kill()
        released.set()
        asked.before = answered.before = lambda: None


def _settled(server: GradwatchServer) -> None:
    deadline = time.monotonic() + 60
    while server.get("/api/v1/deliveries", state="due"):
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def _all_in_order(hook: Hook) -> None:
    """Every transition arrived; what arrived twice has the same id; firing and resolved alternate."""
    first_seen = list(dict.fromkeys(hook.seen))
    assert len(first_seen) == len({entry[0] for entry in hook.seen}) == KILLS
    assert [state for _, _, state in first_seen] == ["firing", "resolved"] * (KILLS // 2)
    for index in range(0, KILLS, 2):
        assert first_seen[index][1] == first_seen[index + 1][1]


def test_10000_due_alerts_with_one_receiver_down_and_one_slow_do_not_delay_the_healthy_one(tmp_path: Path) -> None:
    healthy, slow = Hook(), Hook(before=_dawdle)
    with healthy.open(), slow.open(), full(0) as down:
        config, database = tmp_path / "gradwatch.toml", tmp_path / "gradwatch.db"
        addresses = {
            "slow": f"http://127.0.0.1:{slow.port}",
            "down": f"http://127.0.0.1:{down}",
            "healthy": f"http://127.0.0.1:{healthy.port}",
        }
        config.write_text(configuration("", **addresses))
        with GradwatchServer(database) as server:
            run = server.register(["a"])
            assert server.stop() == 0
        _fill(database, run, list(addresses), 10_000)
        with GradwatchServer(database, "--config", str(config)) as server:
            _measure(server, healthy)


def _dawdle() -> None:
    threading.Event().wait(3)


def _measure(server: GradwatchServer, healthy: Hook) -> None:
    """A fresh alert arrives at the healthy receiver though thousands wait for the others."""
    sick = server.register(["a"])
    started = time.monotonic()
    server.store(sick, wire.Batch(id="b", samples=[sample(1, NAN)]))
    healthy.wait(1)
    delay = time.monotonic() - started
    print(f"healthy receiver told after {delay:.3f} s")
    assert delay < 5
    assert len(server.get("/api/v1/deliveries", state="due", limit=10_000)) > 9_000


def _fill(database: Path, run: str, receivers: list[str], count: int) -> None:
    """Write due deliveries for the receivers that are down and slow, each of an alert of its own."""
    with closing(sqlite3.connect(database)) as connection, connection:
        numbers = range(count)
        connection.executemany(
            "INSERT INTO alerts (id, run, rule, severity, state, held, clear, hold_samples, clear_samples, first_step,"
            " first_at, parameters, parameters_left_out, evidence, summary, cause, remedy)"
            " VALUES (?, ?, 'dead', 'warning', 'firing', 1, 0, 1, 1, 1, 0, '[]', 0, '{}', '', '', '')",
            [(f"a{number}", run) for number in numbers],
        )
        connection.executemany(
            "INSERT INTO transitions (id, alert, number, state, severity, step, at, payload)"
            ' VALUES (?, ?, 1, \'firing\', \'warning\', 1, 0, \'{"data": {"id": "x", "state": "firing"}}\')',
            [(f"t{number}", f"a{number}") for number in numbers],
        )
        connection.executemany(
            'INSERT INTO deliveries (id, "transition", alert, number, receiver, state, attempts, due_at, leased_until,'
            " created_at) VALUES (?, ?, ?, 1, ?, 'due', 0, 0, 0, 0)",
            [(f"d{number}", f"t{number}", f"a{number}", receivers[number % 2]) for number in numbers],
        )


def test_busy_is_asked_again_when_it_says_and_gone_is_left_alone(tmp_path: Path) -> None:
    with (
        WebhookReceiver(statuses=[410]) as gone,
        WebhookReceiver(statuses=[400]) as wrong,
        WebhookReceiver(statuses=[302, 204]) as moved,
    ):
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("retry_seconds = [0.2]", gone=gone.url, wrong=wrong.url, moved=moved.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            for count, name in enumerate(("one", "two"), 1):
                run = server.register(["a"], name=name)
                server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
                wrong.wait(count)
                gone.wait(1)
                moved.wait(count + 1)
            _settled(server)
            assert len(gone.requests) == 1
            assert len(wrong.requests) == 2
            ids = [headers["webhook-id"] for headers, _ in moved.requests]
            assert ids[0] == ids[1] != ids[2]
            assert len(server.get("/api/v1/deliveries", state="dead")) == 4
            states = {entry["name"]: entry["disabled"] for entry in server.get("/api/v1/receivers")}
            assert states == {"gone": "it answered 410 Gone", "wrong": None, "moved": None}
            _bring_back(server, gone)


def _bring_back(server: GradwatchServer, gone: WebhookReceiver) -> None:
    """Enable the receiver and send again what was given up: with the ids it had."""
    dead = {entry["id"] for entry in server.get("/api/v1/deliveries", receiver="gone", state="dead")}
    assert len(dead) == 2
    gone.statuses = [204]
    assert server.http.post("/api/v1/receivers/gone/enable").status_code == 204
    assert server.http.post("/api/v1/receivers/gone/replay").json() == {"deliveries": 2}
    assert {headers["webhook-id"] for headers, _ in gone.wait(3)[1:]} <= dead
    gone.wait(3)
    _settled(server)
    shown = server.get(f"/api/v1/deliveries/{gone.requests[0][0]['webhook-id']}")
    assert (shown["state"], [entry["status"] for entry in shown["log"]]) == ("delivered", [410, 204])
    assert shown["payload"]["type"] == "alert.firing"


def test_a_circuit_opens_probes_and_closes() -> None:
    circuit, failed = Circuit(opens_after=2, open_seconds=10), Answer(500)
    circuit.note(failed, 0)
    assert circuit.room(0, 32) == 32
    circuit.note(failed, 0)
    assert (circuit.room(9, 32), circuit.room(10, 32)) == (0, 1)
    circuit.note(failed, 10)
    assert (circuit.room(29, 32), circuit.room(30, 32)) == (0, 1)
    circuit.note(Answer(204), 30)
    assert circuit.room(30, 32) == 32
    circuit.note(Answer(429, retry_after_seconds=7), 40)
    assert (circuit.room(46, 32), circuit.room(47, 32)) == (0, 32)
    for _ in range(9):
        circuit.note(Answer(422), 50)
    assert circuit.room(50, 32) == 32
