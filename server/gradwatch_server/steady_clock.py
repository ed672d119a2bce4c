"""The server's clock: Unix seconds that never go back, for everything that is measured from one moment to another.

The machine's clock may be set at any time. If it is set back by an hour, retries and leases would last an hour longer.
So this clock follows it forth at once, as after a suspension, but never back: it goes on a little slower until the
other one has caught up. Several servers follow the clock of the database that they share.

Times that others compare with their own clocks are the machine's: timestamps of webhooks, ends of tokens and silences.
"""

import threading
import time
from collections.abc import Callable

_SLOWER_RATIO = 0.05
"""By how much it goes slower while it is ahead: an hour takes 20 hours to catch up."""
_MOST_AHEAD_SECONDS = 86_400.0
"""A stored time further ahead than this was written by a clock that was wrong: nothing goes on from there."""


class SteadyClock:
    """A clock that all parts of a process share."""

    def __init__(
        self, machine: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._followed, self._monotonic = machine, monotonic
        self._lock = threading.Lock()
        self._now, self._at = machine(), monotonic()

    def now(self) -> float:
        """Return the time in Unix seconds."""
        with self._lock:
            at = self._monotonic()
            passed, self._at = at - self._at, at
            self._now = max(self._followed(), self._now + (1 - _SLOWER_RATIO) * passed)
            return self._now

    def follow(self, now: float) -> None:
        """Follow another clock than the machine's, which shows ``now``, Unix seconds. Call this from time to time."""
        at = self._monotonic()
        with self._lock:
            self._followed = lambda: now + self._monotonic() - at

    def start(self, now: float, latest: float) -> None:
        """Set the clock when a server starts.

        Args:
            now: what the clock that is followed shows, Unix seconds.
            latest: the latest time that earlier servers have stored. If the clock was set back, this one goes on there.
        """
        with self._lock:
            self._now = latest if now < latest <= now + _MOST_AHEAD_SECONDS else now
            self._at = self._monotonic()


_clock = SteadyClock()
now, follow, start = _clock.now, _clock.follow, _clock.start
