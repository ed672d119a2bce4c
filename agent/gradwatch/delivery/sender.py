"""The sender: a thread that posts the spooled documents to the server in order, with retries and back-off."""

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from gradwatch import wire
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.processor_time import ProcessorTime, samples_share
from gradwatch.delivery.splitting import dropped_with, split_entry
from gradwatch.delivery.spool import Entry
from gradwatch.delivery.transport import DeliveryResult

_LEAST_SECONDS: Final = 1.0
"""Least time that a request is given: what is left of closing's own time may be too little for any answer."""
CLOSING_PAUSE_SECONDS: Final = 0.2
"""Shortest pause between attempts while the agent is being closed."""
UNREACHED_SECONDS: Final = 0.5
"""Time after which an agent that is being closed gives up a server that has refused all connections so far."""
FIRST_PAUSE_SECONDS: Final = 0.25
LONGEST_PAUSE_SECONDS: Final = 30.0
UNAUTHORIZED_PAUSE_SECONDS: Final = 60.0
"""Pause between attempts while the server refuses the token."""
MOST_PIECES: Final = 64
"""Requests after which a rejected batch is not split any further."""


class Queue(Protocol):
    """A queue of documents: the spool of this agent, or one that a dead process left."""

    run: str

    def first(self) -> Entry | None:
        """Return the oldest document, None if the queue is empty."""

    def forget(self, entry: Entry) -> None:
        """Remove a document."""


class Transport(Protocol):
    """The connection to the server; tests replace it."""

    def post(self, path: str, body: bytes, timeout_seconds: float) -> DeliveryResult:
        """Send one document and return what became of it."""


class Sender:
    """Delivers a queue on a thread of its own until it is told to end.

    Args:
        queue: the documents.
        transport: the connection to the server.
        dropped: counts documents that the server rejects.
        warn: called with a warning, once for each kind of trouble.
        timeout_seconds: longest wait for one response.
        chance: source of the jitter, uniform in [0, 1).
        first_idle: called once, when the queue is empty for the first time.
        failed: called with an exception of the thread, which goes on.
        last: returns the last document of the queue, which holds how the run ended once it has.
        place: where the documents wait, in words.
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
        first_idle: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
        last: Callable[[], Entry | None] | None = None,
        place: str = "the spool",
    ) -> None:
        self._queue = queue
        self._transport = transport
        self._dropped = dropped
        self._warn = warn
        self._timeout_seconds = timeout_seconds
        self._chance = chance or random.Random(time.time_ns()).random  # noqa: S311 -- jitter, and never the user's generator
        self._first_idle = first_idle
        self._failed = failed
        self._last = last
        self._place = place
        self._registration: Entry | None = None
        self._failed_attempts = 0
        """Since the last delivered document."""
        self._warned: set[str] = set()
        self._wake = threading.Event()
        self._was_reached = False
        """Whether there was ever a connection to the server."""
        self._was_taken = False
        """Whether the server has ever taken a document."""
        self._patience_ends = math.inf
        """Monotonic time until which a server that was never reached is tried."""
        self._deadline: float | None = None
        """Monotonic time at which to stop; None: go on."""
        self.rejected = 0
        """Documents that the server did not take, or took only in part."""
        self.time = ProcessorTime()
        self._thread = threading.Thread(target=self._work, name="gradwatch-sender", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def notify(self) -> None:
        """Wake the thread: there is a new document in the queue."""
        self._wake.set()

    def end(self, deadline: float) -> None:
        """Tell the thread to deliver the queue and stop at a monotonic time; ``join`` waits for it."""
        self._patience_ends = time.monotonic() + UNREACHED_SECONDS
        self._deadline = deadline
        self._wake.set()

    def join(self) -> None:
        """Wait until the thread has stopped, hardly longer than the deadline of ``end``."""
        assert self._deadline is not None
        self._thread.join(max(self._deadline - time.monotonic(), 0.0) + 2 * _LEAST_SECONDS + 0.2)

    def deliver(self, deadline: float | None = None) -> bool:
        """Deliver the queue on the calling thread, without pauses; return whether it is empty.

        Args:
            deadline: monotonic time at which to stop.
        """
        while (entry := self._queue.first()) is not None:
            left = self._timeout_seconds if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            if not self._deliver_entry(entry, self._patience(left)).is_final:
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
                working = self._pause_unless_ending(DeliveryResult("retry"))

        try:
            if self._was_taken:
                self._send_end()
        except Exception as error:  # the spool may be closed by now
            if self._failed is None:
                raise
            self._failed(error)

    def _send_end(self) -> None:
        """Send how the run ended, if only what was measured does not get through in time; the spool keeps both."""
        entry = self._last() if self._last is not None else None
        if entry is None or entry.kind != "batch":
            return
        batch = wire.read_back(entry.body)
        if batch.end is not None:
            alone = wire.Batch(id=f"{batch.id}-end", attempt=batch.attempt, dropped=batch.dropped, end=batch.end)
            self._post(Entry(entry.number, "batch", 0, wire.encode(alone)), _LEAST_SECONDS)

    def _advance(self) -> bool:
        """Deliver one document, or wait for one; return False when it is time to stop."""
        left = self._timeout_seconds if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0:
            return False  # the spool may be closed by now
        entry = self._queue.first()
        if entry is None:
            return self._deadline is None and self._wait_for_entry()
        self.time.book()
        result = self._deliver_entry(entry, self._patience(left))
        if result.is_final:
            self.time.book_samples("send", entry.samples, samples_share(entry.samples, len(entry.body)))
            self._failed_attempts = 0
            return True
        self.time.book()
        return self._pause_unless_ending(result)

    def _wait_for_entry(self) -> bool:
        if self._first_idle is not None:
            first_idle, self._first_idle = self._first_idle, None
            first_idle()
        self._wake.wait()
        self._wake.clear()
        return True

    def _pause_unless_ending(self, result: DeliveryResult) -> bool:
        """Wait before the next attempt; return False if there will be none before the deadline."""
        if self._deadline is None:
            self._pause(result)
            return True
        left = self._deadline - time.monotonic()
        asked = result.retry_after_seconds or 0.0
        nobody_listens = result.refused and not self._was_reached and time.monotonic() >= self._patience_ends
        if asked >= left or nobody_listens or result.outcome in ("unauthorized", "unregistered"):
            return False
        time.sleep(min(max(asked, CLOSING_PAUSE_SECONDS), left))  # a server that is being restarted comes back
        return True

    def _patience(self, left_seconds: float) -> float:
        """Return how long a request may take: what is left, but no less than a busy server needs for the last one."""
        return min(max(left_seconds, _LEAST_SECONDS), self._timeout_seconds)

    def _deliver_entry(self, entry: Entry, timeout_seconds: float) -> DeliveryResult:
        """Send one document and do what the result asks for, except the pause."""
        result = self._post(entry, timeout_seconds)
        self._was_reached |= not result.refused
        self._was_taken |= result.outcome == "committed"
        if result.outcome == "unknown_run":
            result = self._register_and_post(entry, result, timeout_seconds)
        if result.outcome == "rejected":
            result = self._deliver_pieces(entry, result, timeout_seconds)
        if result.is_final:
            self._queue.forget(entry)
        elif result.outcome == "unauthorized":
            self._warn_once("unauthorized", f"the server refuses the token: {result.reason}; set GRADWATCH_TOKEN")
        elif result.outcome == "unregistered":
            refusal = f"the server refuses to register the run, whose measurements wait in {self._place}"
            self._warn_once("unregistered", f"{refusal}: {result.reason}")
        else:
            self._warn_once(
                "retry", f"the server cannot be reached, measurements wait in {self._place}: {result.reason}"
            )
        return result

    def _deliver_pieces(self, entry: Entry, result: DeliveryResult, timeout_seconds: float) -> DeliveryResult:
        """Send the pieces of a rejected document that the server takes, and count the others as dropped.

        The document stays in the queue until all its pieces are dealt with. After an interruption it is split into the
        same pieces again.
        """
        dropped, posts, reason = Dropped(), 0, result.reason
        waiting = [entry]
        while waiting:
            piece = waiting.pop()
            if piece is not entry:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    return DeliveryResult("retry", reason)
                result = self._post(piece, timeout_seconds)
                posts += 1
            if result.outcome == "committed":
                continue
            if result.outcome != "rejected":
                return DeliveryResult("retry", result.reason, result.retry_after_seconds)
            halves = split_entry(piece) if result.divisible and posts < MOST_PIECES else []
            waiting += reversed(halves)
            if not halves:
                reason = result.reason
                dropped.add(dropped_with(piece))
        return self._count_rejected(entry, dropped, reason)

    def _count_rejected(self, entry: Entry, dropped: Dropped, reason: str) -> DeliveryResult:
        if not dropped.bytes:
            return DeliveryResult("committed", reason)
        self._dropped.add(dropped)
        self.rejected += 1
        rejected = f"a {entry.kind}" if dropped.bytes == len(entry.body) else f"a part of a {entry.kind}"
        self._warn_once("rejected", f"the server refuses {rejected}, which is dropped: {reason}")
        return DeliveryResult("rejected", reason)

    def _post(self, entry: Entry, timeout_seconds: float) -> DeliveryResult:
        if entry.kind == "batch":
            return self._transport.post(f"/api/v1/runs/{self._queue.run}/samples", entry.body, timeout_seconds)
        self._registration = entry
        result = self._transport.post("/api/v1/runs", entry.body, timeout_seconds)
        # Without a registration the batches must wait: the run may be another project's, the address another server's.
        if result.outcome not in ("unknown_run", "rejected"):
            return result
        not_found = result.reason.startswith("404")
        hint = " (is the url the root of a server?)" if not_found else ""
        return DeliveryResult("unregistered", result.reason + hint)

    def _register_and_post(self, entry: Entry, result: DeliveryResult, timeout_seconds: float) -> DeliveryResult:
        """Register the run again and send the document once more: the server lost its database, or is another one."""
        if self._registration is None:
            return DeliveryResult("retry", result.reason)
        registered = self._post(self._registration, timeout_seconds)
        if registered.outcome != "committed":
            return registered
        again = self._post(entry, timeout_seconds)
        return DeliveryResult("retry", again.reason) if again.outcome == "unknown_run" else again

    def _pause(self, result: DeliveryResult) -> None:
        """Wait until the next attempt is due, exponentially longer with each failure, or until ``end`` is called."""
        self._failed_attempts += 1
        exponential = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self._failed_attempts - 1, 16))
        seconds = exponential * (0.5 + self._chance() / 2)
        if result.outcome == "unauthorized":
            seconds = UNAUTHORIZED_PAUSE_SECONDS
        elif result.retry_after_seconds is not None:
            seconds = result.retry_after_seconds
        until = time.monotonic() + seconds
        while self._deadline is None and (left := until - time.monotonic()) > 0:
            self._wake.wait(min(left, 1.0))
            self._wake.clear()
        asked = until - time.monotonic() if result.retry_after_seconds is not None else 0.0
        if self._deadline is not None and 0 < asked < self._deadline - time.monotonic():
            time.sleep(asked)  # what the server asks for holds while closing, too

    def warn_of_what_waits(self, documents: int) -> None:
        """Warn that documents are left, if no earlier warning has said that they wait."""
        if documents and not self._warned & {"retry", "unregistered", "unauthorized"}:
            self._warn_once("retry", f"not all was delivered in time, {documents} documents wait in {self._place}")

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(text)
