"""A webhook receiver whose answers a test holds back, and what a delivery test writes and waits for."""

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import sqlalchemy as sa

from gradwatch_server.store import schema
from gradwatch_server.store.database import open_engine, writing
from tests.processes import STOP_POLL_SECONDS, GradwatchServer


@dataclass
class Hook:
    """A receiver that runs ``before`` each answer; it remembers (webhook-id, alert, state) of every request."""

    seen: list[tuple[str, str, str]] = field(default_factory=list)
    ids: dict[str, None] = field(default_factory=dict)
    """The ids of the different deliveries, in the order in which they first arrived."""
    before: Callable[[], None] = lambda: None
    port: int = 0

    def __post_init__(self) -> None:
        self._arrived = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen; on the port that it had before."""
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = json.loads(self.rfile.read(int(self.headers["content-length"])))["data"]
                with hook._arrived:
                    hook.seen.append((self.headers["webhook-id"], data["id"], data["state"]))
                    hook.ids[self.headers["webhook-id"]] = None
                    hook._arrived.notify_all()
                hook.before()
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Stay quiet."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                """The other side has been killed: that is the test."""

        server = Server(("127.0.0.1", self.port), Handler)
        self.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(STOP_POLL_SECONDS,), daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()

    def wait(self, count: int, seconds: float = 60) -> None:
        """Wait until so many different deliveries have arrived."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: len(self.ids) >= count, seconds)
        assert arrived, f"{len(self.ids)} deliveries in {len(self.seen)} requests, {count} deliveries expected"


@contextmanager
def full(port: int = 0) -> Iterator[int]:
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


def settled(server: GradwatchServer, seconds: float = 60) -> None:
    """Wait until nothing is due any more."""
    deadline = time.monotonic() + seconds
    while server.get("/api/v1/deliveries", state="due", limit=1):
        assert time.monotonic() < deadline, server.log.read_text()[-3000:]
        threading.Event().wait(0.05)


def fill(url: str, run: str | None, receivers: Sequence[str]) -> None:
    """Write alerts that fire, each of them due to one of these receivers, which are named as often as they get one."""
    alert: dict[str, Any] = dict.fromkeys(("summary", "cause", "remedy"), "") | {"parameters": [], "evidence": {}}
    alert |= dict.fromkeys(("held", "clear", "hold_samples", "clear_samples", "first_step", "first_at"), 1)
    alert |= {"run": run, "rule": "dead", "severity": "warning", "state": "firing", "parameters_left_out": 0}
    told = {"number": 1, "state": "firing", "severity": "warning", "step": 1, "at": 1.0}
    due = {"number": 1, "state": "due", **dict.fromkeys(("attempts", "due_at", "leased_until", "created_at"), 0)}
    ids = [secrets.token_hex(8) for _ in receivers]
    payload = '{"data": {"id": "%s", "state": "firing"}}'
    engine = open_engine(url)
    with writing(engine) as connection:
        connection.execute(sa.insert(schema.alerts), [alert | {"id": each} for each in ids])
        told_rows = [told | {"id": each, "alert": each, "payload": payload % each} for each in ids]
        connection.execute(sa.insert(schema.transitions), told_rows)
        due_rows = [
            due | {"id": each, "transition": each, "alert": each, "fingerprint": each, "receiver": name}
            for each, name in zip(ids, receivers, strict=True)
        ]
        connection.execute(sa.insert(schema.deliveries), due_rows)
    engine.dispose()


@contextmanager
def outcomes_locked(url: str) -> Iterator[Callable[[], None]]:
    """Yield what keeps everybody from writing down what came of an attempt, until the context ends."""
    engine = open_engine(url)
    connection = engine.execution_options(writes=True).connect()

    def lock() -> None:
        connection.begin()  # on SQLite this is the lock
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("LOCK TABLE attempts IN ACCESS EXCLUSIVE MODE"))

    try:
        yield lock
    finally:
        connection.close()
        engine.dispose()
