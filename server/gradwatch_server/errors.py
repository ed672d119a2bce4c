"""What can go wrong on the server, one class for each thing a caller can do about it."""


class GradwatchError(Exception):
    """Root of the server's errors; the text names the thing, its value and the way out."""


class ConfigurationError(GradwatchError):
    """A setting is wrong: correct it and start again."""


class DatabaseError(GradwatchError):
    """The database cannot be used as it is: the text says which command mends it."""


class Refused(GradwatchError):
    """A request that changes nothing; becomes an RFC 9457 problem document."""

    def __init__(self, status: int, title: str, detail: str, *, retry_after_seconds: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


def stopping() -> Refused:
    """Return the refusal of a server that is shutting down: 503."""
    return Refused(503, "Stopping", "the server is stopping: send it again", retry_after_seconds=2)
