"""The agent's guard: telemetry never raises into training, and one thread at a time is let into an agent."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.processor_time import ProcessorTime
from gradwatch.norms.streams import StreamLog
from gradwatch.steps.schedule import Costs

_log = logging.getLogger("gradwatch")

DISARMED_AFTER: Final = 3
"""Errors of its own after which an agent stops measuring."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class AgentThread(Protocol):
    """A thread of the agent's own."""

    time: ProcessorTime
    """Processor time that it has taken."""


class Guard:
    """Swallows and counts the agent's own errors; after some of them the agent disarms.

    Args:
        watching: whether anything is measured.
        dropped: takes the number of errors.
        streams: the streams that the training uses.
        disarmed: called with the error after which the agent disarms.
    """

    raises_own_errors: ClassVar[bool] = False
    """For tests: raise the agent's own errors instead of counting them."""

    def __init__(
        self, dropped: Dropped, streams: StreamLog, disarmed: Callable[[Exception], None], *, watching: bool
    ) -> None:
        self.streams = streams
        self.captured: Callable[[], None] = _ignore
        """Called where a hook launches nothing, as its stream captures a graph."""
        self.watching = watching
        self.lock = threading.RLock()
        """Held by each guarded method: several threads may train what one agent watches."""
        self.spent_seconds = 0.0
        """Time that guarded methods have taken on the training thread."""
        self.sample_seconds = 0.0
        """The part of it that was taken for samples."""
        self._dropped = dropped
        self._disarmed = disarmed

    def book_sample(self, started: float) -> None:
        """Book the time since ``started``, of ``time.perf_counter``, as a sample's."""
        self.sample_seconds += time.perf_counter() - started

    def costs(self, threads: Sequence[AgentThread]) -> Costs:
        """Return what the agent has taken so far; what the hook that asks takes is not in it yet."""
        other, thread_sample = 0.0, 0.0
        for thread in threads:
            other += thread.time.other_seconds
            thread_sample += thread.time.sample_seconds
        return Costs(self.spent_seconds - self.sample_seconds, self.sample_seconds, other, thread_sample)

    def failed(self, error: Exception) -> None:
        """Count an error of the agent's own; after several errors, stop measuring and report that once."""
        self._dropped.errors += 1
        _log.debug("gradwatch: an error of the agent", exc_info=error)
        if self._dropped.errors >= DISARMED_AFTER and self.watching:
            self.watching = False
            self._disarmed(error)

    def swallow(self, error: Exception) -> None:
        """Count an error of the agent's own that a hook of the training has caught.

        Raises:
            Exception: the error, where tests ask for it.
        """
        self.failed(error)
        if self.raises_own_errors:
            raise error


def _ignore() -> None:
    """Do nothing."""


class Guarded(Protocol):
    """An object with guarded methods."""

    guard: Guard


def guarded(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R | None]:
    """Return ``method`` of a ``Guarded`` so that it never raises: it returns None instead, and the error is counted.

    A hook that nearly every step calls first tries to get by without this, which is a call more: it holds the lock, and
    catches and books by itself what is plain, and leaves everything else to a guarded method.
    """

    @functools.wraps(method)
    def guarded(self: Guarded, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        guard = self.guard
        started = time.perf_counter()
        with guard.lock:
            try:
                if guard.streams.used and not guard.streams.enter():
                    guard.captured()
                    return None
                return method(self, *args, **kwargs)
            except Exception as error:  # the agent's guard
                guard.swallow(error)
                return None
            finally:
                guard.spent_seconds += time.perf_counter() - started

    return cast("Callable[Concatenate[Any, _P], _R | None]", guarded)
