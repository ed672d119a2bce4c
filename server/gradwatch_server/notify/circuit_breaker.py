"""Whether a receiver is worth trying now, pure: closed, open after failures in a row, then one delivery as a probe."""

from dataclasses import dataclass

from gradwatch_server.notify.delivery_result import Answer

_LONGEST_SECONDS = 300.0


@dataclass
class Circuit:
    """One receiver's circuit; failures that the delivery itself is to blame for (4xx) do not count."""

    opens_after: int
    open_seconds: float
    failures: int = 0
    shut_until: float = 0.0

    def room(self, now: float, at_once: int) -> int:
        """Return how many deliveries may be under way now."""
        if now < self.shut_until:
            return 0
        return 1 if self.failures >= self.opens_after else at_once

    def note(self, answer: Answer, now: float) -> None:
        """Take an answer into account."""
        if answer.verdict != "failed":
            self.failures = 0
            return
        self.failures += 1
        if answer.retry_after_seconds is not None and answer.status in (429, 503):
            self.shut_until = max(self.shut_until, now + min(answer.retry_after_seconds, _LONGEST_SECONDS))
        if self.failures >= self.opens_after:
            trips = min(self.failures - self.opens_after, 10)
            self.shut_until = max(self.shut_until, now + min(self.open_seconds * 2**trips, _LONGEST_SECONDS))
