"""Receives what an agent sends, in place of a server, and keeps it, so that the rules can run on it repeatedly."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from gradwatch import wire


class Recorder:
    """An HTTP server on a free port that acknowledges registrations and batches and keeps them; a context manager."""

    def __init__(self) -> None:
        self.registration: wire.Registration | None = None
        self.batches: list[wire.Batch] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["content-encoding"] == "gzip":  # a large registration
                    body = gzip.decompress(body)
                if self.path.endswith("/samples"):
                    recorder.batches.append(wire.decode(body, wire.Batch))
                else:
                    recorder.registration = wire.decode(body, wire.Registration)
                answer = json.dumps({"id": "run"}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Stay quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
