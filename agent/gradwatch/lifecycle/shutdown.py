"""How a run ends whose agent nobody closes: with its context, the interpreter or a child of ``multiprocessing``."""

import atexit
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.util import Finalize
from typing import Final, Protocol

CLOSING_SECONDS: Final = 10.0
"""Longest wait for the server at the end, of all agents together at the end of the interpreter."""

_aside: Final[list[threading.Thread]] = []
"""Those that end a training after which others followed."""

_in_child: Final[list[Finalize]] = []
"""What closes the agents of a child of ``multiprocessing``."""


class Ends(Protocol):
    """What is closed at the end."""

    @property
    def exit_code(self) -> int | None:
        """Return what ``sys.exit`` was called with last, unless the training went on after it."""

    def stop(self, deadline: float, status: str, exit_code: int | None = None) -> bool:
        """End all but the wait for the server; return whether ``deliver`` must follow."""

    def deliver(self) -> None:
        """Wait for the server, until the deadline of ``stop``."""


def code(status: object) -> int:
    """Return the exit code of ``sys.exit``; a text, which Python prints, is 1."""
    return status if isinstance(status, int) else 0 if status is None else 1


def ending(error: BaseException | None) -> tuple[str, int | None]:
    """Return how a run ends that an exception ends, or none, and the exit code where it says one."""
    if isinstance(error, SystemExit):
        number = code(error.code)
        return "failed" if number else "completed", number
    return "completed" if error is None else "failed", None


def aside(act: Callable[[], None]) -> None:
    """Do on a thread of its own what ends a training after which others follow; the interpreter's end waits for it."""
    _aside[:] = [thread for thread in _aside if thread.is_alive()]
    _aside.append(threading.Thread(target=act, name="gradwatch-finishing", daemon=True))
    _aside[-1].start()


def close_at_the_end(running: Callable[[], Iterable[Ends]]) -> None:
    """Close what is running when this process ends.

    To be called again with each agent: what the user opened before it, a run of wandb for one, is then still open at
    the end.
    """
    atexit.unregister(close_all)
    atexit.register(close_all, running)
    if multiprocessing.parent_process() is None:
        return
    for earlier in _in_child:
        earlier.cancel()
    _in_child[:] = [Finalize(None, _close_all_in_child, (running,), exitpriority=0)]


def _close_all_in_child(running: Callable[[], Iterable[Ends]]) -> None:
    """A child of ``multiprocessing`` leaves by ``os._exit``, with the exception that ended it still under way here."""
    close_all(running, ending(sys.exc_info()[1]))


def close_all(running: Callable[[], Iterable[Ends]], how: tuple[str, int | None] | None = None) -> None:
    """Close what is running: all wait for their servers at the same time, not one after the other.

    Args:
        running: gives it.
        how: status and exit code; None: each as ``sys.exit`` or an exception that nobody caught tells.
    """
    deadline = time.monotonic() + CLOSING_SECONDS
    if how is None and hasattr(sys, "last_value"):
        how = "failed", None
    stopped = []
    for agent in list(running()):
        status, number = how or ("failed" if agent.exit_code else "completed", agent.exit_code)
        if agent.stop(deadline, status, number):
            stopped.append(agent)
    with suppress(KeyboardInterrupt):  # what the server has not taken yet stays in the spool
        for agent in stopped:
            agent.deliver()
        for thread in _aside:
            thread.join(max(deadline - time.monotonic(), 0.0))
