"""The HTTP client of notifications: bounded in time and size, and no error tells anything of the URL."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from gradwatch_server.notify.http_client import AddressGuard, DeliveryResult, HttpClient, HttpRequest
from tests.processes import WebhookReceiver, run_apart

LOOPBACK = ["127.0.0.0/8"]


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Listen; every connection is answered by this, whatever it asks."""

    def serve() -> None:
        with suppress(OSError):  # closed: either by the other side or at the end
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    connection.recv(65_536)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def post(port: int, timeout_seconds: float) -> DeliveryResult:
    async def once() -> DeliveryResult:
        async with HttpClient(AddressGuard(LOOPBACK), timeout_seconds, 1) as client:
            return await client.post(HttpRequest(f"http://127.0.0.1:{port}/hook?key=hidden", b"{}", {}))

    return run_apart(once())


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65_536)


def dripping(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"x")
        threading.Event().wait(0.05)


def garbage(connection: socket.socket) -> None:
    connection.sendall(b"\x00\xff" * 100 + b"\r\n\r\n")


def test_only_the_beginning_of_an_endless_response_is_read() -> None:
    with answering(endless) as port:
        result = post(port, 30)
    assert (result.verdict, len(result.text)) == ("delivered", 500)


def test_a_response_that_drips_is_cut_off_at_the_time_limit() -> None:
    started = time.monotonic()
    with answering(dripping) as port:
        result = post(port, 0.5)
    assert result == DeliveryResult(None, "no answer within 0.5 s (delivery.timeout_seconds)")
    assert time.monotonic() - started < 10


def test_errors_after_garbage_and_silence_do_not_show_the_url() -> None:
    with answering(garbage) as port:
        nonsense = post(port, 5)
    with answering(lambda connection: None) as port:
        silent = post(port, 5)
    gone = post(port, 5)
    for result in (nonsense, silent, gone):
        assert (result.verdict, result.status) == ("failed", None)
        assert "hidden" not in result.error


def test_proxies_from_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(garbage) as proxy, WebhookReceiver() as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        port = int(receiver.url.split(":")[2].partition("/")[0])
        assert post(port, 10).verdict == "delivered"
