"""The server's errors: one class for each thing that a caller can do about it."""

from enum import IntEnum


class GradwatchError(Exception):
    """Base of the server's errors; the text names the setting or value at fault and says what to do."""


class ConfigurationError(GradwatchError):
    """A setting is wrong: correct it and start again."""


class DatabaseError(GradwatchError):
    """The database cannot be used as it is: the text says which command mends it."""


class RetryAfter(IntEnum):
    """Seconds until a refused request may be sent again, as the header Retry-After says, by the reason."""

    SOON = 1
    """Other requests are in the way, or the connection was slow."""
    STOPPING = 2
    """The server is restarted, or another one takes over."""
    DATABASE = 5
    STREAMS = 10
    """Whoever watches a page may close it."""
    DISK_FULL = 30


class Refused(GradwatchError):
    """A request that changes nothing; becomes an RFC 9457 problem document."""

    def __init__(self, status: int, title: str, detail: str, *, retry_after: RetryAfter | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.detail = detail
        self.retry_after = retry_after


def stopping() -> Refused:
    """Return the refusal of a server that is shutting down: 503."""
    return Refused(503, "Stopping", "the server is stopping: send it again", retry_after=RetryAfter.STOPPING)
