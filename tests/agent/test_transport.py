"""The way to the server: through proxies, past body limits, with a certificate authority of one's own."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gradwatch import wire
from gradwatch.delivery.transport import HttpTransport

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUEST_METHOD")


class Recorder:
    """Answers every request as a server that has taken it, and keeps target, headers and body."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                recorder.requests.append((self.path, dict(self.headers), body))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def do_CONNECT(self) -> None:
                recorder.requests.append((self.path, dict(self.headers), b""))
                self.send_error(502)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.address = f"127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    recorder = Recorder()
    yield recorder
    recorder.close()


def _post(url: str, body: bytes = b"x", path: str = "/api/v1/runs") -> str:
    transport = HttpTransport(url, None)
    try:
        return transport.post(path, body, 60.0).outcome
    finally:
        transport.close()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_reaches_a_server_that_only_it_knows(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, f"http://user:pass%20word@{recorder.address}")
    assert _post("http://gradwatch.invalid") == "committed"
    ((target, headers, body),) = recorder.requests
    assert (target, body) == ("http://gradwatch.invalid/api/v1/runs", b"x")
    assert headers["proxy-authorization"].startswith("Basic ")


@pytest.mark.parametrize(
    "proxy", ["socks5://me:secret@127.0.0.1:1080", "http://[::1", "proxy:abc", "http://me:x@p:99999"]
)
def test_a_proxy_that_cannot_be_used_is_told_and_left_out(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert _post("http://gradwatch.invalid") == "retry"
    assert "the environment's proxy cannot be used" in caplog.text
    assert "secret" not in caplog.text


def test_https_goes_through_a_tunnel(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", recorder.address)
    assert _post("https://gradwatch.invalid") == "retry"
    assert recorder.requests[0][0] == "gradwatch.invalid:443"


def test_a_server_on_this_machine_is_reached_directly(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert _post(f"http://{recorder.address}") == "committed"
    assert recorder.requests[0][0] == "/api/v1/runs"


def test_no_proxy_names_servers_that_are_reached_directly(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{recorder.address}")
    monkeypatch.setenv("NO_PROXY", "another.invalid,.internal.invalid")
    assert _post("http://gradwatch.internal.invalid") == "retry"
    assert not recorder.requests


def test_a_large_registration_is_compressed_below_one_megabyte(recorder: Recorder) -> None:
    name = "base_model.model.model.layers.{}.mlp.experts.{}.down_proj.lora_A.default.{}"
    parameters = [
        wire.Parameter(name.format(index // 1600, index % 1600 // 6, index % 6), [16, 4096], units=16, depth=index)
        for index in range(90_000)
    ]
    body = wire.encode(wire.Registration(parameters=parameters))
    assert _post(f"http://{recorder.address}", body) == "committed"
    ((_, headers, sent),) = recorder.requests
    assert (headers["Content-Encoding"], len(body) > 10_000_000, len(sent) < 1_000_000) == ("gzip", True, True)
    assert gzip.decompress(sent) == body
    small = wire.encode(wire.Registration(parameters=parameters[:10]))
    _post(f"http://{recorder.address}", small)
    assert recorder.requests[1][2] == small
