"""What agents have sent and the server has not answered yet: bounded, whatever clients send."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gradwatch_server.errors import Refused


class Room:
    """Bytes that are being received, decoded or wait for the writer; only the event loop takes and gives back."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._requests = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.unpacking = asyncio.Semaphore(2)
        """How many bodies are unpacked at once: until then nobody knows their size."""
        self.refused = 0

    @contextmanager
    def share(self) -> Iterator["Share"]:
        """Give back, at the end, what was taken meanwhile."""
        share = Share(self)
        self._requests += 1
        self._empty.clear()
        try:
            yield share
        finally:
            self.held -= share.bytes
            self._requests -= 1
            if not self._requests:
                self._empty.set()

    async def emptied(self) -> None:
        """Wait until no request holds anything."""
        await self._empty.wait()

    def take(self, count: int) -> None:
        """Hold so many bytes more.

        Raises:
            Refused: 503, there is no room for them now.
        """
        if self.held + count > self.most:
            self.refused += 1
            detail = f"the server holds {self.held} bytes of bodies, {self.most} at most (limits.held_bytes)"
            raise Refused(503, "No room", f"{detail}: send it again later", retry_after_seconds=1)
        self.held += count


class Share:
    """What one request holds."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.bytes = 0

    def grow(self, count: int) -> None:
        """Hold at least so many bytes.

        Raises:
            Refused: 503, there is no room for them now.
        """
        if count > self.bytes:
            self.room.take(count - self.bytes)
            self.bytes = count
