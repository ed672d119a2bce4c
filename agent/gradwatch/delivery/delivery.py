"""Delivery of one run's measurements: its spool, its sender, and the spools of dead processes on this machine."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Final

from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.sender import Sender
from gradwatch.delivery.spool import Spool, leftovers
from gradwatch.delivery.transport import HttpTransport
from gradwatch.settings import Settings

_LEFTOVER_SECONDS: Final = 30.0
"""Longest time that the delivery of one leftover spool takes."""

_log = logging.getLogger("gradwatch")

_warned: Final[set[tuple[str, str]]] = set()
"""(url, start of the text) of the warnings of this process: a sweep has an agent for each of its trainings."""


def _warn_once(url: str, warn: Callable[[str], None], text: str) -> None:
    kind = url, text.partition(":")[0]
    if kind not in _warned:
        _warned.add(kind)
        warn(text)


class Delivery:
    """Delivers the documents that are appended to its spool, and once the leftover spools on this machine.

    Only the rank that reports has a delivery.

    Args:
        run_id: id of the run.
        settings: the address of the server and the folder of the spool.
        dropped: counts dropped samples, bytes and values.
        warn: called with a warning for the user.
        failed: called with an error of the sender's thread.
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
        self._http = HttpTransport(settings.url, settings.token)
        self.spool = Spool(settings.spool_directory, url=settings.url, run=run_id, dropped=dropped, warn=warn)
        self.sender = Sender(
            self.spool, self._http, dropped, self._warn, first_idle=self._deliver_leftovers, failed=failed
        )

    def _deliver_leftovers(self) -> None:
        for leftover in leftovers(self._settings.spool_directory):
            if leftover.url != self._settings.url:
                continue
            http = HttpTransport(leftover.url, self._settings.token, tell_clock=leftover.has_this_clock)
            try:
                Sender(leftover, http, self._dropped, _log.debug).deliver(time.monotonic() + _LEFTOVER_SECONDS)
            except Exception as error:  # the agent's guard: a damaged file may raise anything
                self._warn(f"the spool {leftover.path}, of another process, cannot be read and stays: {error}")
            finally:
                http.close()

    def close(self) -> None:
        """Wait until the sender has stopped, as ``sender.end`` told it to, and close the spool."""
        self.sender.join()
        self.spool.close(timeout_seconds=0.2)
        self._http.close()
