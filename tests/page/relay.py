"""A TCP relay before a server: it can fall silent as a VPN or a NAT does, which closes nothing, and it can be slow."""

import contextlib
import math
import socket
import threading
from typing import Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 65_536
_STREAM = b"GET /api/v1/stream"
_TILE = b"/tile?"
PIECE_BYTES = 4_096
"""Of a slow relay; more than the headers of a response."""


class Relay:
    """A relay on a port of its own; a context manager."""

    def __init__(self, url: str) -> None:
        """Relay to the server at ``url``."""
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._server = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._silenced: set[socket.socket] = set()
        self._streams: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._slow = False
        self._slowed: set[socket.socket] = set()
        self._sending = threading.Condition()
        self._allowed = 0.0
        """Bytes that slow responses may still send."""
        self.streams_asked = 0
        """How many event streams were asked for so far."""

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hurry()
        _close(self._listener)
        self._threads[0].join()
        for each in self._sockets:
            _close(each)
        for thread in self._threads[1:]:
            thread.join()

    @property
    def open_streams(self) -> int:
        """Return how many connections carry an event stream now."""
        with self._lock:
            return len(self._streams)

    def silence(self) -> None:
        """Forward nothing more on the connections that are open now; new ones work."""
        with self._lock:
            self._silenced |= set(self._sockets)

    def slow(self) -> None:
        """From now on, send tiles in pieces, each of them when ``send_piece`` is called."""
        self._slow = True

    def send_piece(self) -> None:
        """Send the next piece of a tile."""
        self._add(PIECE_BYTES)

    def hurry(self) -> None:
        """Send all pieces without waiting."""
        self._add(math.inf)

    def _add(self, allowed: float) -> None:
        with self._sending:
            self._allowed += allowed
            self._sending.notify_all()

    def _take(self, most: int) -> int:
        """Wait until a slow response may go on; return how many bytes of it may be sent now."""
        with self._sending:
            self._sending.wait_for(lambda: self._allowed > 0)
            taken = int(min(most, self._allowed))
            self._allowed -= taken
        return taken

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._lock:
                    self._sockets.append(client)
                server = socket.create_connection(self._server)
                with self._lock:
                    self._sockets.append(server)
                for source, target in ((client, server), (server, client)):
                    thread = threading.Thread(target=self._forward, args=(source, target, client))
                    self._threads.append(thread)
                    thread.start()

    def _forward(self, source: socket.socket, target: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(_CHUNK_BYTES):
                with self._lock:
                    silenced = source in self._silenced
                    if source is client and _STREAM in chunk:
                        self.streams_asked += 1
                        self._streams.add(client)
                    if source is client and self._slow and _TILE in chunk:
                        self._slowed.add(client)
                    slowed = target in self._slowed
                while chunk and not silenced:
                    length = self._take(len(chunk)) if slowed else len(chunk)
                    target.sendall(chunk[:length])
                    chunk = chunk[length:]
        with self._lock:
            self._streams.discard(client)
        _close(source)
        _close(target)


def _close(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
