"""Without a token, nobody stops the server: endless heads and bodies, connections on which nothing comes, streams."""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from gradwatch import wire
from tests.processes import PATIENCE_SECONDS, GradwatchServer, sample
from tests.server.test_tokens import token

MEGABYTE = 1024 * 1024
MOST_SENT = 64 * MEGABYTE
"""More than the buffers between two sockets hold."""


def connected(server: GradwatchServer, *options: tuple[int, int, int]) -> socket.socket:
    opened = socket.socket()
    opened.settimeout(PATIENCE_SECONDS)
    for option in options:
        opened.setsockopt(*option)
    opened.connect(("127.0.0.1", urlsplit(server.url).port))
    return opened


def configured(folder: Path, text: str, *options: str) -> GradwatchServer:
    config = folder / "gradwatch.toml"
    config.write_text(text)
    return GradwatchServer(folder / "gradwatch.db", "--config", str(config), *options)


def read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65_536):
            told += piece
    return told


def answered(connection: socket.socket, path: str, header: str = "") -> int:
    """Ask on an open connection; return the status."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode())
    response = b""
    while b"\r\n\r\n" not in response:
        response += connection.recv(65_536)
    head, _, body = response.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)
    return int(head.split()[1])


def refused(server: GradwatchServer, head: str, pieces: Callable[[int], bytes]) -> tuple[int, bytes]:
    """Send a request without end; return how much was sent until the connection was closed, and the response."""
    sent = 0
    with connected(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head.encode())
            for number in itertools.count():
                piece = pieces(number)
                sent += len(piece)
                connection.sendall(piece)
                assert sent < MOST_SENT
        return sent, read_to_end(connection)


GET = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = "POST /api/v1/session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = b"a" * MEGABYTE
HEADS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "headers": (GET, lambda number: b"".join(b"X-%d-%d: %s\r\n" % (number, one, b"a" * 100) for one in range(1_000))),
    "one header": (GET + "X: ", lambda _: LONG),
    "the name of a header": (GET, lambda _: LONG),
    "the request line": ("GET /healthz?", lambda _: LONG),
    "one trailer": (POST + "Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", lambda _: LONG),
    "the extension of a chunk": (POST + "Transfer-Encoding: chunked\r\n\r\n1;", lambda _: LONG),
}


@pytest.mark.parametrize("kind", HEADS)
def test_an_endless_head_is_refused(server: GradwatchServer, kind: str) -> None:
    _, response = refused(server, *HEADS[kind])
    assert response == b"" or response.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 422 ", b"HTTP/1.1 400 ")), response
    assert server.http.get("/healthz").status_code == 200


def test_a_head_that_is_too_large_is_refused_in_words_and_one_that_is_not_is_taken(server: GradwatchServer) -> None:
    with connected(server) as connection:
        connection.sendall(f"{GET}X: {'a' * 66_000}\r\n\r\n".encode())
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert "connections.header_bytes allows (65536)" in json.loads(body)["detail"]
    assert server.http.get("/healthz", headers={"x": "a" * 60_000}).status_code == 200


@pytest.mark.parametrize(
    "request_line",
    ["POST /api/v1/session", "POST /api/v1/silences", "POST /api/v1/runs", "GET /healthz", "PUT /page/x", "POST /any"],
)
def test_an_endless_body_is_refused(server: GradwatchServer, request_line: str) -> None:
    head = f"{request_line} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"100000\r\n" + b"x" * MEGABYTE + b"\r\n"
    sent, _ = refused(server, head + "Transfer-Encoding: chunked\r\n\r\n", lambda _: chunk)
    assert sent < MOST_SENT
    assert server.http.get("/healthz").status_code == 200


def test_a_document_that_is_too_large_is_refused_in_words(server: GradwatchServer) -> None:
    login = server.http.post("/api/v1/session", json={"token": "x" * MEGABYTE})
    assert (login.status_code, "limits.document_bytes allows (65536 bytes)" in login.text) == (413, True)
    assert server.http.post("/api/v1/session", json={"token": "x" * 1_000}).status_code in (200, 422)


STALLED = ("", "GET /hea", GET, f"{GET}\r\n", f"{GET}\r\nGET /", f"{POST}Content-Length: 9\r\n\r\n{{")
"""What is sent on a connection before nothing more comes."""


def test_a_client_that_keeps_the_server_waiting_is_closed(tmp_path: Path) -> None:
    """It sends no request, a part of one, nothing after one, or takes nothing of its response."""
    text = "[connections]\nheader_seconds = 3\nidle_seconds = 3\nsend_seconds = 3\n[limits]\nbody_seconds = 3\n"
    small = ((socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096), (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536))
    with configured(tmp_path, text) as server, ExitStack() as opened:
        run = server.register([f"{number}{'x' * 400}" for number in range(2_000)])
        stalled = [opened.enter_context(connected(server)) for _ in STALLED]
        for connection, sent in zip(stalled, STALLED, strict=True):
            connection.sendall(sent.encode())
        reader = opened.enter_context(connected(server, *small))
        reader.sendall(f"GET /api/v1/runs/{run} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        for connection in stalled:
            told = read_to_end(connection)
            assert told == b"" or told.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 408 "))
        wait_until_gone(server, reader.getsockname())
        assert len(read_to_end(reader)) < 800_000


def wait_until_gone(server: GradwatchServer, peer: tuple[str, int]) -> None:
    """Wait until the server has no connection to a client."""
    wanted = f"{peer[1]:04X}"
    port = urlsplit(server.url).port
    while any(
        line.split()[1].endswith(f":{port:04X}") and line.split()[2].endswith(":" + wanted) and line.split()[3] == "01"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
    ):
        threading.Event().wait(0.1)


def test_idle_connections_keep_nobody_out(tmp_path: Path) -> None:
    with configured(tmp_path, "[connections]\nmost = 20\n") as server, ExitStack() as opened:
        idle = [opened.enter_context(connected(server)) for _ in range(60)]
        with httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS, trust_env=False) as other:
            assert [other.get(path).status_code for path in ("/healthz", "/readyz", "/api/v1/runs")] == [200] * 3
        assert read_to_end(idle[0]) == b"", "the one that kept the server waiting longest is closed"
        assert answered(idle[-1], "/healthz") == 200


def test_a_caller_with_a_token_keeps_its_connection_for_longer(tmp_path: Path) -> None:
    shown = f"Authorization: Bearer {token(tmp_path / 'gradwatch.db', 'create', '--scope', 'read')}\r\n"
    text = "[connections]\nidle_seconds = 0.5\nkept = 1\n"
    with configured(tmp_path, text) as server, ExitStack() as opened:
        kept, beyond, without = [opened.enter_context(connected(server)) for _ in range(3)]
        assert [answered(one, "/api/v1/runs", shown) for one in (kept, beyond)] == [200, 200]
        assert answered(without, "/healthz") == 200
        assert read_to_end(without) == read_to_end(beyond) == b""
        assert answered(kept, "/api/v1/runs", shown) == 200


def test_streams_have_a_number(tmp_path: Path) -> None:
    with configured(tmp_path, "[connections]\nstreams = 1\n") as server:
        run = server.register(["a"])
        with server.http.stream("GET", "/api/v1/stream") as first:
            pieces = first.iter_bytes()  # what lets go of it closes the stream
            next(pieces)
            with httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS, trust_env=False) as other:
                beyond = other.get("/api/v1/stream")
                assert (beyond.status_code, beyond.headers["retry-after"]) == (503, "10")
                assert "connections.streams" in beyond.text
                batch = wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0)]))
                headers = {"content-type": wire.MESSAGEPACK_TYPE}
                assert other.post(f"/api/v1/runs/{run}/samples", content=batch, headers=headers).status_code == 200


def test_streams_have_an_age_and_leave_room_when_they_end(tmp_path: Path) -> None:
    with configured(tmp_path, "[connections]\nstreams = 1\nstream_seconds = 0.1\n") as server:
        with server.http.stream("GET", "/api/v1/stream") as first:
            assert first.status_code == 200
            assert b"".join(first.iter_bytes())  # it ends by itself
        deadline = time.monotonic() + PATIENCE_SECONDS
        while server.http.head("/api/v1/stream").status_code != 200:  # the client may see the end first
            assert time.monotonic() < deadline
