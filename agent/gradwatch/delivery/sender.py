"""The sender: delivers the spool to the server in order, from a thread of its own, for as long as it takes."""

import email.utils
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import urllib3

from gradwatch import wire
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.splitting import halves, values
from gradwatch.delivery.spool import Entry

CLOSING_PAUSE_SECONDS: Final = 0.2
"""Between attempts while the agent is being closed, for as long as its timeout allows."""
FIRST_PAUSE_SECONDS: Final = 0.25
LONGEST_PAUSE_SECONDS: Final = 30.0
MOST_PIECES: Final = 64
"""In which a refused batch is offered."""
REFUSED_PAUSE_SECONDS: Final = 60.0
"""Between attempts while the token is refused."""

_UNREGISTERED: Final = "the server refuses to register the run, whose measurements wait in the spool"

Verdict = Literal["committed", "unknown_run", "poison", "refused", "unregistered", "later"]
"""What an answer means for the document: see ``judge``."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one document."""

    verdict: Verdict
    reason: str = ""
    retry_after_seconds: float | None = None
    divisible: bool = False
    """Whether the server may take a part of what it refused."""


class Queue(Protocol):
    """Where documents wait: the spool of this agent, or one left behind by a dead process."""

    run: str

    def first(self) -> Entry | None:
        """Return the oldest document."""

    def forget(self, entry: Entry) -> None:
        """Remove a document."""


class Transport(Protocol):
    """The way to the server: one method, so that a test can have another."""

    def post(self, path: str, body: bytes, timeout_seconds: float) -> Answer:
        """Deliver one document."""


class Http:
    """The way to the server over HTTP.

    Args:
        url: root of the server.
        token: bearer token, None where the server wants none.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._pool = urllib3.PoolManager(num_pools=1, maxsize=1, retries=False)
        self._headers = {"Content-Type": wire.MESSAGEPACK_TYPE, "Accept": wire.JSON_TYPE, "User-Agent": "gradwatch"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def post(self, path: str, body: bytes, timeout_seconds: float) -> Answer:
        """Deliver one document; whatever goes wrong on the way is an answer, too."""
        timeout = urllib3.Timeout(total=max(timeout_seconds, 0.01))
        headers = self._headers | {wire.CLOCK_HEADER: f"{time.time():.3f}"}
        try:
            response = self._pool.request(
                "POST", self._url + path, body=body, headers=headers, timeout=timeout, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return Answer("later", f"{type(error).__name__}: {error}")
        return judge(response.status, response.headers, response.data)

    def close(self) -> None:
        """Close the connection."""
        self._pool.clear()


def judge(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """Return what the server's answer means.

    A 2xx counts only with a JSON object: a captive portal or a wrong server also says 200.
    """
    reason = f"{status} {_reason(body)}".strip()
    if 200 <= status < 300:
        return Answer("committed") if _object(body) is not None else Answer("later", f"{status} without a JSON object")
    if status in (404, 409):
        return Answer("unknown_run", reason)
    if status in (401, 403):
        return Answer("refused", reason)
    if status in (400, 413, 415, 422):
        return Answer("poison", reason, divisible=status in (413, 422))
    return Answer("later", reason, _retry_after_seconds(headers.get("Retry-After"), time.time()))


class Sender:
    """Delivers a queue until it is told to finish.

    Args:
        queue: what to deliver.
        transport: the way to the server.
        dropped: counts what the server will never take.
        warn: called with a text; once for each kind of trouble.
        timeout_seconds: how long an answer may take.
        chance: source of the jitter, uniform in [0, 1).
        idle: called when everything is delivered; delivers what others left behind.
        failed: called with an exception of the thread, which goes on.
    """

    def __init__(
        self,
        queue: Queue,
        transport: Transport,
        dropped: Dropped,
        warn: Callable[[str], None],
        *,
        timeout_seconds: float = 10.0,
        chance: Callable[[], float] | None = None,
        idle: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self._queue = queue
        self._transport = transport
        self._dropped = dropped
        self._warn = warn
        self._timeout_seconds = timeout_seconds
        self._chance = chance or random.Random(time.time_ns()).random  # noqa: S311 -- jitter, and never the user's generator
        self._idle = idle
        self._failed = failed
        self._registration: Entry | None = None
        self._failures = 0
        self._warned: set[str] = set()
        self._wake = threading.Event()
        self._deadline: float | None = None
        """Monotonic time at which to stop; None: go on."""
        self.refused = 0
        """Documents of which the server did not take all."""
        self.seconds = 0.0
        """Processor time that the thread has taken."""
        self._thread = threading.Thread(target=self._work, name="gradwatch-sender", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def notify(self) -> None:
        """There is something new in the queue."""
        self._wake.set()

    def end(self, deadline: float) -> None:
        """Deliver what is there and stop, by a monotonic time at the latest; ``join`` waits for it."""
        self._deadline = deadline
        self._wake.set()

    def join(self) -> None:
        """Wait until it has stopped; a server that does not answer is not waited for beyond the deadline."""
        assert self._deadline is not None
        self._thread.join(max(self._deadline - time.monotonic(), 0.0) + 0.2)

    def deliver(self, deadline: float | None = None) -> bool:
        """Deliver the queue in this thread, without pauses; return whether it is empty.

        Args:
            deadline: monotonic time to stop at.
        """
        while (entry := self._queue.first()) is not None:
            left = self._timeout_seconds if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            answer = self._offer(entry, min(left, self._timeout_seconds))
            if answer.verdict not in ("committed", "poison"):
                return False
        return True

    def _work(self) -> None:
        working = True
        while working:
            try:
                working = self._advance()
            except Exception as error:  # the agent's guard
                if self._failed is None:
                    raise
                self._failed(error)
                working = self._wait(Answer("later"))

    def _advance(self) -> bool:
        """Deliver one document, or wait for one; return False when it is time to stop."""
        self.seconds = time.thread_time()
        left = self._timeout_seconds if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0:
            return False  # the spool may be closed by now
        entry = self._queue.first()
        if self._deadline is not None and entry is None:
            return False
        if entry is None:
            if self._idle is not None:
                self._idle()
            self._wake.wait()
            self._wake.clear()
            return True
        answer = self._offer(entry, min(left, self._timeout_seconds))
        if answer.verdict in ("committed", "poison"):
            self._failures = 0
            return True
        return self._wait(answer)

    def _wait(self, answer: Answer) -> bool:
        """Wait before the next attempt; return False where there will be none before the end."""
        if self._deadline is None:
            self._pause(answer)
            return True
        left = self._deadline - time.monotonic()
        asked = answer.retry_after_seconds or 0.0
        if asked >= left or answer.verdict in ("refused", "unregistered"):
            return False
        time.sleep(min(max(asked, CLOSING_PAUSE_SECONDS), left))  # a server that is being restarted comes back
        return True

    def _offer(self, entry: Entry, timeout_seconds: float) -> Answer:
        """Send one document and draw the consequences, all but the pause."""
        answer = self._post(entry, timeout_seconds)
        if answer.verdict == "unknown_run":
            answer = self._register_and_post(entry, answer, timeout_seconds)
        if answer.verdict == "poison":
            answer = self._offer_pieces(entry, answer, timeout_seconds)
        if answer.verdict in ("committed", "poison"):
            self._queue.forget(entry)
        elif answer.verdict == "refused":
            self._warn_once("refused", f"the server refuses the token: {answer.reason}; set GRADWATCH_TOKEN")
        elif answer.verdict == "unregistered":
            self._warn_once("unregistered", f"{_UNREGISTERED}: {answer.reason}")
        else:
            self._warn_once("later", f"the server cannot be reached, measurements wait in the spool: {answer.reason}")
        return answer

    def _offer_pieces(self, entry: Entry, answer: Answer, timeout_seconds: float) -> Answer:
        """Send what can be taken of a refused document, and count the rest.

        Until all of it is done the document stays in the queue; its pieces will be the same.
        """
        lost, posts, reason = Dropped(), 0, answer.reason
        waiting = [entry]
        while waiting:
            piece = waiting.pop()
            if piece is not entry:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    return Answer("later", reason)
                answer = self._post(piece, timeout_seconds)
                posts += 1
            if answer.verdict == "committed":
                continue
            if answer.verdict != "poison":
                return Answer("later", answer.reason, answer.retry_after_seconds)
            batch = _batch(piece)
            parts = halves(batch) if batch is not None and answer.divisible and posts < MOST_PIECES else None
            if parts is not None:
                waiting += [piece._replace(samples=len(part.samples), body=wire.encode(part)) for part in parts[::-1]]
                continue
            reason = answer.reason
            lost.samples += piece.samples
            lost.bytes += len(piece.body)
            lost.values += 0 if batch is None else values(batch)
        self._dropped.add(lost)
        self.refused += lost.bytes > 0
        if lost.bytes:
            what = f"a {entry.kind}" if lost.bytes == len(entry.body) else f"a part of a {entry.kind}"
            self._warn_once("poison", f"the server refuses {what}, which is dropped: {reason}")
        return Answer("poison" if lost.bytes else "committed", reason)

    def _post(self, entry: Entry, timeout_seconds: float) -> Answer:
        if entry.kind == "batch":
            return self._transport.post(f"/api/v1/runs/{self._queue.run}/samples", entry.body, timeout_seconds)
        self._registration = entry
        answer = self._transport.post("/api/v1/runs", entry.body, timeout_seconds)
        # What follows must wait for it: the run may be another project's, and the address another server's.
        if answer.verdict not in ("unknown_run", "poison"):
            return answer
        nowhere = answer.reason.startswith("404")
        return Answer("unregistered", answer.reason + (" (is the url the root of a server?)" if nowhere else ""))

    def _register_and_post(self, entry: Entry, answer: Answer, timeout_seconds: float) -> Answer:
        """The server does not know the run (it lost its database, or the address is wrong): register, try once more."""
        if self._registration is None:
            return Answer("later", answer.reason)
        registered = self._post(self._registration, timeout_seconds)
        if registered.verdict != "committed":
            return registered
        again = self._post(entry, timeout_seconds)
        return Answer("later", again.reason) if again.verdict == "unknown_run" else again

    def _pause(self, answer: Answer) -> None:
        """Wait until the next attempt is due, or until the end has come."""
        self._failures += 1
        exponential = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self._failures - 1, 16))
        seconds = exponential * (0.5 + self._chance() / 2)
        if answer.verdict == "refused":
            seconds = REFUSED_PAUSE_SECONDS
        elif answer.retry_after_seconds is not None:
            seconds = answer.retry_after_seconds
        until = time.monotonic() + seconds
        while self._deadline is None and (left := until - time.monotonic()) > 0:
            self._wake.wait(min(left, 1.0))
            self._wake.clear()

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(text)


def _batch(entry: Entry) -> wire.Batch | None:
    try:
        return wire.decode(entry.body, wire.Batch) if entry.kind == "batch" else None
    except wire.WireError:
        return None


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _reason(body: bytes) -> str:
    content = _object(body) or {}
    return str(content.get("detail") or content.get("title") or body[:200].decode("utf-8", "replace"))


def _retry_after_seconds(header: str | None, now: float) -> float | None:
    """Return the pause that ``Retry-After`` asks for, in seconds or as a date; at most an hour."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
        except ValueError:
            return None
    return min(max(seconds, 0.0), 3600.0)
