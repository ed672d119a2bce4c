"""The first contract: telemetry never raises into training. The one place of the agent that swallows errors."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("gradwatch")

MOST_ERRORS = 3


class Guard:
    """Swallows and counts the agent's own errors; disarms the agent after three of them and says so once."""

    def __init__(self, disarm: Callable[[str], None], *, reraise: bool) -> None:
        self._disarm = disarm
        self._reraise = reraise
        self._lock = threading.Lock()
        self.errors = 0

    @contextmanager
    def __call__(self, doing: str) -> Iterator[None]:
        """Run a part of the agent; whatever it raises ends here."""
        try:
            yield
        except Exception as error:
            if self._reraise:
                raise
            with self._lock:
                self.errors += 1
                last = self.errors == MOST_ERRORS
            log.debug("gradwatch failed while %s", doing, exc_info=True)
            if last:
                reason = f"{type(error).__name__} while {doing}: {error}"
                log.warning("gradwatch has switched itself off after %d errors; the last: %s", MOST_ERRORS, reason)
                self._disarm(reason)
