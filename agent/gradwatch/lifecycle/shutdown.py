"""Closing agents that nobody closes: at the end of the interpreter or of a child of ``multiprocessing``."""

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
"""Longest wait for the server when an agent is closed; of all agents together at the end of the interpreter."""

_LONGEST_CALL_SECONDS: Final = 6.0
"""Longest wait for calls into PyTorch to return: a store answers within five seconds or not at all."""

_background: Final[list[tuple[threading.Thread, Callable[[float], None]]]] = []
"""Threads that finish runs which nobody waits for any more, each with what stops its work where the time is over."""

_earlier_errors: Final[list[int]] = []
"""Id of the last uncaught exception when an agent attached: a slip in an earlier cell of a notebook, which ends no run.
The interpreter keeps it alive."""

_child_finalizers: Final[list[Finalize]] = []
"""Closes the agents of a child of ``multiprocessing``, which leaves without running ``atexit``; at most one entry."""


class Closable(Protocol):
    """An agent, as far as shutdown needs it."""

    @property
    def exit_code(self) -> int | None:
        """Return the argument of the last ``sys.exit``, or None if the training went on after it."""

    def stop(self, deadline: float, status: str, exit_code: int | None = None) -> bool:
        """Stop measuring and write everything to the spool; return whether ``deliver`` must be called to finish."""

    def deliver(self) -> None:
        """Wait for the server until the deadline that ``stop`` was given."""


def exit_code_of(status: object) -> int:
    """Return the exit code that ``sys.exit(status)`` leads to: None is 0, a text, which Python prints, is 1."""
    return status if isinstance(status, int) else 0 if status is None else 1


def outcome(error: BaseException | None) -> tuple[str, int | None]:
    """Return the status of a run that ends with this exception or with none, and the exit code if one is known."""
    if isinstance(error, SystemExit):
        number = exit_code_of(error.code)
        return "failed" if number else "completed", number
    return "completed" if error is None else "failed", None


def finish_in_background(finish: Callable[[], None], give_up: Callable[[float], None]) -> None:
    """Call ``finish`` on a thread of its own; the end of the interpreter waits for it.

    Args:
        finish: finishes a run.
        give_up: called with a number of seconds where the end of the interpreter can wait no longer; returns once no
            thread of the run calls PyTorch any more, or when they are over. A thread that does so while the interpreter
            is taken down aborts the process.
    """
    _background[:] = [(thread, stop) for thread, stop in _background if thread.is_alive()]
    thread = threading.Thread(target=finish, name="gradwatch-finishing", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no room for a thread
        give_up(0.0)
    else:
        _background.append((thread, give_up))


def close_at_exit(running: Callable[[], Iterable[Closable]]) -> None:
    """Close the agents that ``running`` returns when this process ends.

    Every new agent calls this again. ``atexit`` runs the latest registration first, so that loggers which the user
    opened before the agent (a run of wandb, for example) are still open when the agent writes to them.
    """
    _earlier_errors[:] = [id(sys.last_value)] if hasattr(sys, "last_value") else []
    atexit.unregister(close_all)
    atexit.register(close_all, running)
    if multiprocessing.parent_process() is None:
        return
    for earlier in _child_finalizers:
        earlier.cancel()
    _child_finalizers[:] = [Finalize(None, _close_all_in_child, (running,), exitpriority=0)]


def _close_all_in_child(running: Callable[[], Iterable[Closable]]) -> None:
    # A child of multiprocessing leaves by os._exit; the exception that ended it is still being handled here.
    close_all(running, outcome(sys.exc_info()[1]))


def close_all(running: Callable[[], Iterable[Closable]], how: tuple[str, int | None] | None = None) -> None:
    """Close all running agents; they wait for their servers at the same time, not one after the other.

    Args:
        running: returns the agents.
        how: status and exit code of their runs; None: each run failed if ``sys.exit`` was called with an error or an
            exception was not caught, and completed otherwise.
    """
    deadline = time.monotonic() + CLOSING_SECONDS
    if how is None and hasattr(sys, "last_value") and id(sys.last_value) not in _earlier_errors:
        how = "failed", None
    stopped = []
    for agent in list(running()):
        status, number = how or ("failed" if agent.exit_code else "completed", agent.exit_code)
        if agent.stop(deadline, status, number):
            stopped.append(agent)
    with suppress(KeyboardInterrupt):  # what the server has not taken yet stays in the spool
        for agent in stopped:
            agent.deliver()
        for thread, _ in _background:
            thread.join(max(deadline - time.monotonic(), 0.0))
    with suppress(KeyboardInterrupt):
        late = [give_up for thread, give_up in _background if thread.is_alive()]
        for give_up in late:
            give_up(0.0)
        deadline = time.monotonic() + _LONGEST_CALL_SECONDS
        for give_up in late:
            give_up(max(deadline - time.monotonic(), 0.0))
