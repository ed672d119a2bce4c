"""Everything that delivers: one lane a receiver, laid anew when the configuration is read again."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

import sqlalchemy as sa

from gradwatch_server.notify import outbox
from gradwatch_server.notify.outbox import Delivery
from gradwatch_server.notify.receivers import Alertmanager, Receiver
from gradwatch_server.notify.reminder import remind
from gradwatch_server.notify.worker import Lane, written
from gradwatch_server.store.group_commit import Writer

_AGAIN_SECONDS = 1.0
_BURY_SECONDS = 5.0
_DRAIN_SECONDS = 3.0

log = logging.getLogger(__name__)


class Notifier:
    """Delivers due deliveries for as long as it runs."""

    def __init__(self, engine: sa.Engine, writer: Writer, receivers: Sequence[Receiver], pace: Delivery) -> None:
        self._engine = engine
        self._writer = writer
        self._receivers = list(receivers)
        self._pace = pace
        self._lanes: list[Lane] = []
        self._changed = asyncio.Event()
        self._stopped = False
        self.results: Counter[tuple[str, str]] = Counter()
        """Attempts by (receiver, state they led to)."""

    def wake(self) -> None:
        """Look for due deliveries now."""
        for lane in self._lanes:
            lane.wake()

    def configure(self, receivers: Sequence[Receiver], pace: Delivery) -> None:
        """Deliver to these receivers from now on."""
        self._receivers, self._pace = list(receivers), pace
        self._changed.set()

    async def run(self) -> None:
        """Deliver until stopped; lanes that a new configuration replaces end when what is under way has ended."""
        running: set[asyncio.Task[None]] = set()
        while not self._stopped:
            self._changed.clear()
            self._lanes = [Lane(self._writer, each, self._pace, self.results) for each in self._receivers]
            aside = [asyncio.create_task(self._bury(sorted(each.name for each in self._receivers)))]
            reminded = [each for each in self._receivers if isinstance(each, Alertmanager)]
            aside += [asyncio.create_task(remind(self._engine, each, self._pace)) for each in reminded]
            for task in [asyncio.create_task(_kept(lane)) for lane in self._lanes]:
                running.add(task)
                task.add_done_callback(running.discard)
            try:
                await self._changed.wait()
            finally:
                for task in aside:
                    task.cancel()
            for lane in self._lanes:
                lane.close()
        if running:
            await asyncio.wait(running, timeout=_DRAIN_SECONDS)
        for task in running:
            task.cancel()

    def stop(self) -> None:
        """Claim no more and end, with what is under way recorded where it ends within a few seconds."""
        self._stopped = True
        self._changed.set()

    async def _bury(self, names: list[str]) -> None:
        """Give up, every few seconds, what nobody will take, and forget what is left of runs that were deleted."""

        def tidy(connection: sa.Connection) -> int:
            outbox.forget(connection, time.time())
            return outbox.bury(connection, names, time.time())

        while True:
            try:
                buried = await written(self._writer, tidy)
                if buried:
                    log.warning("deliveries that are dead, because their receivers are disabled or gone: %d", buried)
            except Exception:
                log.exception("deliveries to receivers that are gone could not be given up; the next try comes")
            await asyncio.sleep(_BURY_SECONDS)


async def _kept(lane: Lane) -> None:
    """Run a lane; an error that it does not expect is logged and it starts anew."""
    ended = False
    while not ended:
        try:
            await lane.run()
            ended = True
        except Exception:
            log.exception("a lane of deliveries broke; it starts again")
            await asyncio.sleep(_AGAIN_SECONDS)
