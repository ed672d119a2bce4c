"""The server's log: one line a message, and one message for what happens again and again."""

import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import sqlalchemy as sa

from gradwatch_server.plain_text import visible

_REPEAT_SECONDS = 60.0
"""How often the same message is written at most."""
_MOST_REMEMBERED = 1_000
"""Messages that are remembered; beyond it the oldest is forgotten, and is written when it comes again."""


def set_up() -> None:
    """Write what the server logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(RepetitionFilter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # its lines carry addresses with their query strings
    logging.getLogger("alembic").setLevel(logging.WARNING)


class LogFormatter(logging.Formatter):
    """Writes each message as one line; neither it nor a traceback can act on the terminal that shows the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the message's line."""
        return visible(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback below it if there is one."""
        return visible(super().format(record), keep="\n\t")


class RepetitionFilter(logging.Filter):
    """Lets a warning or an error through once a minute, and says then how often it came in between.

    If the database is out of reach, a line says so in the place of the traceback: every part of the server finds out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """Logger and text -> when it was written last, and how often it was left out since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written; it may be changed."""
        _shorten(record)
        if record.levelno < logging.WARNING:
            return True
        now, key = self._clock(), (record.name, record.getMessage())
        with self._lock:
            written, left_out = self._seen.pop(key, (-_REPEAT_SECONDS, 0))
            if now - written < _REPEAT_SECONDS:
                self._seen[key] = (written, left_out + 1)
                return False
            self._seen[key] = (now, 0)
            while len(self._seen) > _MOST_REMEMBERED:
                self._seen.popitem(last=False)
        if left_out:
            record.msg, record.args = f"{key[1]} ({left_out} times more in the last {now - written:.0f} s)", ()
        return True


def _shorten(record: logging.LogRecord) -> None:
    """Put one line in the place of the traceback of a database that is out of reach."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        reason = str(error.orig).strip().partition("\n")[0]
        record.msg, record.args = f"{record.getMessage()}: the database is out of reach: {reason}", ()
        record.exc_info = record.exc_text = None
