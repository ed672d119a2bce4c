"""Admission control: how many bytes of request bodies the server holds at once, whatever its clients send."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from gradwatch_server.errors import Refused, RetryAfter, stopping

SLOW_SECONDS = 5.0
"""A body that has been arriving for longer is given up when there is no room for others."""


class ByteBudget:
    """Bytes of bodies that are being received or decoded, or that wait for the writer.

    Only the event loop reserves and releases bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.refused = 0
        self.decompressing = asyncio.Semaphore(2)
        """How many bodies are decompressed at once: their size is unknown until then."""
        self.decoding = asyncio.Semaphore(1)
        """How many large bodies are decoded at once: objects take many times the memory of their bytes."""
        self._receiving: set[Reservation] = set()
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @contextmanager
    def reserve(self) -> Iterator["Reservation"]:
        """Yield the reservation of one request; its bytes are released at the end.

        Raises:
            Refused: 503, the server is stopping.
        """
        if self._closed:
            raise stopping()
        reservation = Reservation(self)
        self._requests += 1
        self._idle.clear()
        try:
            yield reservation
        finally:
            self.held_bytes -= reservation.bytes
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    def receives(self, reservation: "Reservation") -> None:
        """Note that the body of a request begins to arrive."""
        self._receiving.add(reservation)

    def has_received(self, reservation: "Reservation") -> None:
        """Note that it has arrived, or was given up."""
        self._receiving.discard(reservation)

    def close(self) -> None:
        """Refuse further requests; those that have a reservation go on."""
        self._closed = True

    async def wait_idle(self) -> None:
        """Wait until no request has a reservation."""
        await self._idle.wait()

    def take(self, count: int) -> None:
        """Hold ``count`` bytes more; where they do not fit, give up the bodies that arrive slowly.

        Raises:
            Refused: 503, they would exceed the budget.
        """
        if self.held_bytes + count > self.limit_bytes:
            self.refused += 1
            self._give_up_slow()
            limit = f"{self.limit_bytes} at most (limits.held_bytes)"
            detail = f"the server holds {self.held_bytes} bytes of bodies, {limit}"
            raise Refused(503, "No room", f"{detail}: send it again later", retry_after=RetryAfter.SOON)
        self.held_bytes += count

    def _give_up_slow(self) -> None:
        """Have the bodies that have been arriving for long time out now: they hold what others need."""
        now = asyncio.get_running_loop().time()
        for reservation in self._receiving:
            if now - reservation.began_at > SLOW_SECONDS and not reservation.deadline.expired():
                reservation.deadline.reschedule(now)


class Reservation:
    """The bytes that one request holds of the budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self.budget = budget
        self.bytes = 0
        self.began_at = 0.0
        self.deadline = asyncio.timeout(None)

    @asynccontextmanager
    async def receiving(self, seconds: float) -> AsyncIterator[None]:
        """Receive a body within some seconds, or fewer if it arrives slowly while others wait for its bytes.

        Raises:
            TimeoutError: it has not arrived in time.
        """
        self.began_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds) as self.deadline:
                self.budget.receives(self)
                yield
        finally:
            self.budget.has_received(self)

    def grow(self, count: int) -> None:
        """Hold at least ``count`` bytes.

        Raises:
            Refused: 503, they would exceed the budget.
        """
        if count > self.bytes:
            self.budget.take(count - self.bytes)
            self.bytes = count
