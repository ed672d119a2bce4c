"""What comes of one attempt to deliver."""

import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

Verdict = Literal["delivered", "failed", "refused", "gone"]

_TEMPORARY = (408, 425, 429)


@dataclass(frozen=True)
class Answer:
    """What the receiver said, or why it said nothing."""

    status: int | None
    """HTTP status (of other protocols: the nearest one); none: there was no answer."""
    error: str = ""
    retry_after_seconds: float | None = None
    text: str = ""
    """The first characters of what it wrote."""

    @property
    def verdict(self) -> Verdict:
        """What follows: done, try again (a redirection too: none is followed), never again, or no longer there."""
        if self.status is None:
            return "failed"
        if 200 <= self.status < 300:
            return "delivered"
        if self.status == 410:
            return "gone"
        return "refused" if 400 <= self.status < 500 and self.status not in _TEMPORARY else "failed"


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, in either of its forms; none where it says nothing."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
