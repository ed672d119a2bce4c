"""Connections of HTTP clients: how many there are, how long one may keep the server waiting, and how large a head is.

Whoever reaches the port can open connections, without a token. So these bounds stand in front of everything: uvicorn
has none for heads of requests, for connections on which nothing is sent, and for responses that nobody reads.
"""

import asyncio
import resource
from collections.abc import Callable
from typing import Any, cast

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gradwatch_server.api.problem import PROBLEM_TYPE, problem_document
from gradwatch_server.settings import Configuration
from gradwatch_server.store.tokens import EVERYTHING

_SHARE_OF_FILES = 0.75
"""Share of the files that this process may open which connections may take: the database needs some, too."""
_MOST_PIPELINED = 16
"""Requests of one connection that wait for the response to an earlier one."""
_LINGER_SECONDS = 10.0
_MOST_LINGERING_BYTES = 1024 * 1024
"""How long the rest of a body may come that nobody reads: if the connection closed at once, the response were lost."""


def raise_file_limit(wanted: int) -> None:
    """Let this process open as many files as ``wanted`` connections need, if the system's hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = round(wanted / _SHARE_OF_FILES)
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class ConnectionTable:
    """The open connections of a server; beyond their number the one closes that has kept the server waiting longest.

    Args:
        configuration: returns the configuration in force.
    """

    def __init__(self, configuration: Callable[[], Configuration]) -> None:
        self.configuration = configuration
        self._open: set[Connection] = set()

    @property
    def _most(self) -> int:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = self.configuration().connections.most
        return most if files == resource.RLIM_INFINITY else min(most, round(files * _SHARE_OF_FILES))

    def add(self, connection: "Connection") -> None:
        """Add a new connection, and make room for it."""
        self._open.add(connection)
        if len(self._open) > self._most:
            waiting = [one for one in self._open if one is not connection and one.waits]
            (min(waiting, key=Connection.precedence) if waiting else connection).abort()

    def discard(self, connection: "Connection") -> None:
        """Forget a connection that is closed."""
        self._open.discard(connection)

    def may_keep(self, connection: "Connection") -> bool:
        """Return whether a caller's connection is kept between two requests: whether not too many are."""
        kept = sum(one.kept for one in self._open if one is not connection)
        return kept < self.configuration().connections.kept

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> "Connection":
        """Return the protocol of a new connection, as uvicorn asks for it."""
        return Connection(self, config, server_state, app_state, _loop)


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    def __init__(
        self,
        table: ConnectionTable,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.kept = False
        """Whether its caller has shown a valid token and it stays open between requests."""
        self._table = table
        self._opened_at = self._waits_since = self.loop.time()
        self._reads_head = True
        self._sending = False
        """Whether the client does not take the response."""
        self._head_bytes = 0
        self._unframed_bytes = 0
        """Bytes that came since the last piece of a body: of a head, of a chunk's extension or of trailers."""
        self._unread_bytes = 0
        """Bytes of a body that came after its response."""
        self._timer: asyncio.TimerHandle | None = None
        self._refusal = (400, "Malformed request", "this is no HTTP request")

    @property
    def waits(self) -> bool:
        """Return whether the server waits for the client: for a request, the rest of one, or to take a response."""
        return self._reads_head or self._sending or self._is_idle or self._in_progress.more_body

    @property
    def _in_progress(self) -> RequestResponseCycle:
        return self.cycle

    @property
    def _is_idle(self) -> bool:
        """Whether all requests that have come have their responses; before the first one there is no ``cycle``."""
        latest = cast("RequestResponseCycle | None", self.cycle)
        return not self.pipeline and (latest is None or latest.response_complete)

    @property
    def _lingers(self) -> bool:
        """Whether the rest of a body comes that nobody reads any more."""
        latest = cast("RequestResponseCycle | None", self.cycle)
        return latest is not None and latest.response_complete and latest.more_body

    def precedence(self) -> tuple[bool, float]:
        """Return the order in which connections are closed to make room: the smallest first."""
        return self.kept, self._waits_since

    def abort(self) -> None:
        """Close the connection without a word."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait(self._bounds.header_seconds)
        self._table.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._table.discard(self)
        super().connection_lost(exc)

    @property
    def _bounds(self) -> Any:
        return self._table.configuration().connections

    def _wait(self, seconds: float) -> None:
        """Close the connection unless the client does what is expected within some seconds."""
        self._stop_waiting()
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(seconds, self.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        """Handle what has come."""
        if self._is_idle and not self._reads_head and not self._lingers:
            self._reads_head = True
            self._wait(self._bounds.header_seconds)
        self._unset_keepalive_if_required()
        self._unframed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # the request is answered as one of HTTP/1.1
        except httptools.HttpParserError:
            self._refuse()
            return
        if self._unframed_bytes > self._bounds.header_bytes:
            self._refuse_head()
            self._refuse()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the request line."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header or a trailer."""
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > self._bounds.header_bytes:
            self._refuse_head()
            raise ValueError("the head of a request is too large")  # the parser stops

    def on_headers_complete(self) -> None:
        """Begin to handle the request."""
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise ValueError("too many requests wait for a response")
        self._reads_head = False
        self._unframed_bytes = 0
        self._unread_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body; close the connection if too much comes of one that nobody reads."""
        self._unframed_bytes = 0
        super().on_body(body)
        if self.cycle.response_complete:
            self._unread_bytes += len(body)
            if self._unread_bytes > self._most_unread():
                self.abort()

    def _most_unread(self) -> int:
        """Return how many bytes of a body may come after its response: of a declared length, all that is allowed."""
        declared = dict(self.headers).get(b"content-length", b"")
        most = self._table.configuration().limits.body_bytes
        return int(declared) if declared.isdigit() and int(declared) <= most else _MOST_LINGERING_BYTES

    def on_message_complete(self) -> None:
        """End the request."""
        self._unframed_bytes = 0
        if self._lingers:
            self._stop_waiting()
            self.cycle.more_body = False
            keep_alive = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, keep_alive)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the rest of the request's body, or for the next request."""
        state = self.cycle.scope["state"]
        grant = state.get("grant")
        self.kept = self.kept or (grant is not None and grant is not EVERYTHING)
        bounds = self._bounds
        self._waits_since = self.loop.time()
        left = self._opened_at + bounds.kept_seconds - self._waits_since
        self.timeout_keep_alive = bounds.idle_seconds
        if self.kept and self._table.may_keep(self):
            self.timeout_keep_alive = max(left, bounds.idle_seconds)
        super().on_response_complete()
        if self._lingers:
            self._unset_keepalive_if_required()
            self._wait(_LINGER_SECONDS)

    def pause_writing(self) -> None:
        """Wait for the client to take a part of its response."""
        self._sending = True
        self._wait(self._bounds.send_seconds)
        super().pause_writing()

    def resume_writing(self) -> None:
        """Go on with a response."""
        self._sending = False
        self._stop_waiting()
        super().resume_writing()

    def _refuse_head(self) -> None:
        most = f"connections.header_bytes allows ({self._bounds.header_bytes})"
        self._refusal = (431, "Request head too large", f"the request line and headers are more bytes than {most}")

    def _refuse(self) -> None:
        """Respond that this is no request that can be handled, and close the connection."""
        if self.transport.is_closing():
            return
        if self._is_idle or self._reads_head:
            status = self._refusal[0]
            body = msgspec.json.encode(problem_document(*self._refusal))
            head = f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
