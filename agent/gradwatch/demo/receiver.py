"""A local webhook receiver that accepts only deliveries with a valid signature (Standard Webhooks)."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Alert = dict[str, Any]


class Receiver:
    """Listens on a free loopback port.

    Args:
        secret: key of the signatures, ``whsec_`` and base64.
        arrived: called once for each delivery with a valid signature, with the alert.
    """

    def __init__(self, secret: str, arrived: Callable[[Alert], None]) -> None:
        self._key = base64.b64decode(secret.removeprefix("whsec_"))
        self._arrived = arrived
        self._seen: set[str] = set()
        self.deliveries = 0
        self.refused = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver._take(dict(self.headers.items()), body)
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Do not print requests."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="demo-receiver", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, headers: dict[str, str], body: bytes) -> int:
        fields = {name.lower(): value for name, value in headers.items()}
        signed = f"{fields.get('webhook-id')}.{fields.get('webhook-timestamp')}.".encode() + body
        expected = "v1," + base64.b64encode(hmac.new(self._key, signed, hashlib.sha256).digest()).decode()
        if not hmac.compare_digest(expected, fields.get("webhook-signature", "")):
            self.refused += 1
            return 401
        if fields["webhook-id"] not in self._seen:
            self._seen.add(fields["webhook-id"])
            self.deliveries += 1
            self._arrived(json.loads(body)["data"])
        return 204
