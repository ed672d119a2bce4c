"""The way to the server: the spool, and what empties it. Only the rank that reports has one."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Final

from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.sender import Http, Sender
from gradwatch.delivery.spool import Spool, leftovers
from gradwatch.settings import Settings

_log = logging.getLogger("gradwatch")

_warned: Final[set[tuple[str, str]]] = set()
"""What was said in this process of each server: a sweep has an agent for each of its trainings."""


def _warn_once(url: str, warn: Callable[[str], None], text: str) -> None:
    kind = url, text.partition(":")[0]
    if kind not in _warned:
        _warned.add(kind)
        warn(text)


class Delivery:
    """Delivers what is written to its spool, and once what dead processes left on this machine.

    Args:
        run_id: of the run.
        settings: where the server and the spool are.
        dropped: counts what is dropped.
        warn: says something once.
        failed: called with an error of the agent's own.
    """

    def __init__(
        self,
        run_id: str,
        settings: Settings,
        dropped: Dropped,
        warn: Callable[[str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._settings = settings
        self._dropped = dropped
        self._warn = functools.partial(_warn_once, settings.url, warn)
        self._adopted = False
        self._http = Http(settings.url, settings.token)
        self.spool = Spool(settings.spool_directory, url=settings.url, run=run_id, dropped=dropped, warn=warn)
        self.sender = Sender(self.spool, self._http, dropped, self._warn, idle=self._adopt, failed=failed)

    def _adopt(self) -> None:
        """Deliver, once, what dead processes left for this server on this machine."""
        if self._adopted:
            return
        self._adopted = True
        for leftover in leftovers(self._settings.spool_directory):
            if leftover.url != self._settings.url:
                continue
            try:
                Sender(leftover, self._http, self._dropped, _log.debug).deliver(time.monotonic() + 30)
            except Exception as error:  # the agent's guard: out of a damaged file comes anything
                self._warn(f"the spool {leftover.path}, of another process, cannot be read and stays: {error}")

    def close(self) -> None:
        """Wait for the sender, which was told when to end."""
        self.sender.join()
        self.spool.close(timeout_seconds=0.2)
        self._http.close()
