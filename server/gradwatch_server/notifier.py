"""The loop that delivers: claims what is due, posts it, records what came of it."""

import asyncio
import logging
import time
from collections import Counter

import httpx

from gradwatch_server import outbox, webhook
from gradwatch_server.outbox import Due
from gradwatch_server.settings import Receiver
from gradwatch_server.writer import Writer

_POLL_SECONDS = 1.0
_AT_ONCE = 32

log = logging.getLogger(__name__)


class Notifier:
    """Delivers due deliveries for as long as it runs; woken by commits, and at least once a second."""

    def __init__(self, writer: Writer, receivers: list[Receiver]) -> None:
        self._writer = writer
        self._receivers = {receiver.name: receiver for receiver in receivers}
        self._work = asyncio.Event()
        self.results: Counter[tuple[str, str]] = Counter()
        """Attempts by (receiver, state they led to)."""

    def wake(self) -> None:
        """Look for due deliveries now."""
        self._work.set()

    async def run(self) -> None:
        """Deliver until cancelled; an error of one round is logged and the next round tries again."""
        async with httpx.AsyncClient(
            timeout=webhook.TIMEOUT_SECONDS, follow_redirects=False, trust_env=False
        ) as client:
            while True:
                try:
                    delivered = await self._round(client)
                except Exception:
                    log.exception("a round of deliveries failed; the next one tries again")
                    delivered = 0
                if not delivered:
                    await self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._work.wait(), _POLL_SECONDS)
        except TimeoutError:
            return
        finally:
            self._work.clear()

    async def _round(self, client: httpx.AsyncClient) -> int:
        now = time.time()
        due = await asyncio.wrap_future(self._writer.submit(lambda connection: outbox.claim(connection, now, _AT_ONCE)))
        await asyncio.gather(*(self._deliver(client, delivery) for delivery in due))
        return len(due)

    async def _deliver(self, client: httpx.AsyncClient, due: Due) -> None:
        started = time.time()
        receiver = self._receivers.get(due.receiver)
        if receiver is None:
            answer = webhook.Answer(410, f"receiver {due.receiver!r} is no longer configured")
        else:
            answer = await webhook.post(client, receiver, due.id, due.payload, started)
        state = await asyncio.wrap_future(
            self._writer.submit(lambda connection: outbox.record(connection, due, answer, started, time.time()))
        )
        self.results[due.receiver, state] += 1
        if not answer.delivered:
            log.warning("delivery %s to %s: %s; it is %s", due.id, due.receiver, answer.error, state)
