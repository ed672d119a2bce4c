"""Where the samples of a batch are looked at: here, or in a process beside the server once that takes much of its time.

Python runs one thread at a time: beside a fleet, a third of what the server does would be diagnosis, while the
machine's other cores stand idle.
"""

import contextlib
import fcntl
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO, cast

from gradwatch_server.diagnosis import History, RunParameters, Sample, Thresholds
from gradwatch_server.ingest.diagnosis_worker import READY, Examined, examine_all, packed, receive, send, unpacked

_WINDOW_SECONDS = 2.0
LARGE_SHARE = 0.1
"""Of a writer's time, from which a server's diagnosis moves out."""
_PIPE_BYTES = 1 << 20
"""Two usual batches fit in: the writer need not wait until they are read."""

log = logging.getLogger(__name__)


class Process:
    """A process that does jobs in turn; not for several threads."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P keeps modules in the working directory from taking the place of the standard library's.
            [sys.executable, "-P", "-m", "gradwatch_server.ingest.diagnosis_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # a signal to the server's group is none of its business
        )
        self._jobs = cast("BinaryIO", self._process.stdin)
        self._answers = cast("BinaryIO", self._process.stdout)
        self._room_bytes = _widened(self._jobs)
        self._ready = self._closed = False
        self._begun = 0
        self._owed: deque[tuple[int, int]] = deque()
        """Number and size of each job whose answer is still to come, though perhaps nobody waits for it any more."""
        self._collected: dict[int, bytes] = {}

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def takes_jobs(self, patience_seconds: float = 0.0) -> bool:
        """Return whether it is up, or will be within this time.

        Raises:
            EOFError: it has ended before.
        """
        if not self._ready:
            looking = select.poll()
            looking.register(self._answers, select.POLLIN)
            if not looking.poll(1e3 * patience_seconds):
                return False
            if self._answers.read(1) != READY:
                raise EOFError("it ended before it was up")
            self._ready = True
            log.info("process %d does the diagnosis of a busy writer from now on", self.pid)
        return True

    def begin(self, job: bytes) -> int:
        """Have a job done, after those that were begun before; return its number.

        A job that the pipe might not hold waits until all of them are done: else each end could wait for the other.

        Raises:
            OSError, EOFError: the process is gone.
        """
        if self._closed:
            raise EOFError("it was closed")
        while self._owed and sum(size for _, size in self._owed) + len(job) > self._room_bytes:
            self._collect()
        send(self._jobs, job)
        self._begun += 1
        self._owed.append((self._begun, len(job)))
        return self._begun

    def result(self, number: int) -> bytes:
        """Wait for what came of a job; that of an earlier one cannot be asked for any more.

        Raises:
            OSError, EOFError: the process is gone.
        """
        while number not in self._collected:
            self._collect()
        answer = self._collected.pop(number)
        self._collected = {later: found for later, found in self._collected.items() if later > number}
        return answer

    def _collect(self) -> None:
        if self._closed:  # while another job was waited for
            raise EOFError("it was closed")
        answer = receive(self._answers)
        self._collected[self._owed.popleft()[0]] = answer

    def close(self) -> None:
        """End it, whatever it is at."""
        self._closed = True
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # what was not sent goes with it
            self._jobs.close()
        self._answers.close()
        self._process.wait()


def _widened(pipe: BinaryIO) -> int:
    """Widen a pipe where that is allowed; return how much it holds unread, on the safe side, 0 where nothing tells."""
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        return 0
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) * 3 // 4


class _Own:
    """What one writer's thread has of its own."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self._since = time.monotonic()
        self._spent_seconds = 0.0

    def share(self, seconds: float) -> float:
        """Add time spent on the diagnosis here; return its share of the window, before its end at least so much."""
        now = time.monotonic()
        self._spent_seconds += seconds
        passed = now - self._since
        share = self._spent_seconds / max(passed, _WINDOW_SECONDS)
        if passed >= _WINDOW_SECONDS:
            self._since, self._spent_seconds = now, 0.0
        return share


class Examiner:
    """Has the samples of batches looked at, for several threads; each has a process of its own, or none."""

    def __init__(self, from_share: float = math.inf) -> None:
        """Start.

        Args:
            from_share: share of a thread's time from which it gets a process, which ``close`` ends; by default none.
        """
        self._from_share = from_share
        self._of_thread = threading.local()
        self._changing = threading.Lock()
        self.processes: list[Process] = []
        """Those that run."""

    def begin(
        self, layout: RunParameters, memory: History, readings: Sequence[Sample], thresholds: Thresholds
    ) -> Callable[[], Examined]:
        """Look at samples; return what waits for what came of it. It is the same wherever it is done."""
        here = partial(self._here, layout, memory, readings, thresholds)
        process = self._mine().process
        if process is None or not readings:
            return here
        try:
            if not process.takes_jobs():
                return here
        except EOFError:
            self._from_share = math.inf
            self._lost(process, " ended before it took a job: the diagnosis is done here")
            return here
        try:
            number = process.begin(packed(layout, memory, readings, thresholds))
        except (OSError, EOFError):
            self._lost(process)
            return here
        return partial(self._there, process, number, here)

    def close(self) -> None:
        """End the processes; from now on everything is done here."""
        with self._changing:
            self._from_share = math.inf
            running, self.processes = self.processes, []
        for process in running:
            process.close()

    def _mine(self) -> _Own:
        if not hasattr(self._of_thread, "own"):
            self._of_thread.own = _Own()
        return cast("_Own", self._of_thread.own)

    def _here(
        self, layout: RunParameters, memory: History, readings: Sequence[Sample], thresholds: Thresholds
    ) -> Examined:
        started = time.perf_counter()
        examined = examine_all(layout, memory, readings, thresholds)
        own = self._mine()
        share = own.share(time.perf_counter() - started)
        if share > self._from_share and own.process is None:
            self._start(own, share)
        return examined

    def _there(self, process: Process, number: int, here: Callable[[], Examined]) -> Examined:
        try:
            return unpacked(process.result(number))
        except (OSError, EOFError):
            self._lost(process)
            return here()

    def _start(self, own: _Own, share: float) -> None:
        with self._changing:
            if share <= self._from_share:  # it has been closed meanwhile
                return
            try:
                own.process = Process()
            except OSError as error:  # no more processes, no memory: it goes on here, and is not tried at every batch
                log.warning("no process for the diagnosis: %s", error)
                self._from_share = math.inf
                return
            self.processes.append(own.process)

    def _lost(self, process: Process, how: str = ", which did the diagnosis, has ended: it is done here") -> None:
        """Go on without a process that has ended; another is started where it still takes much time."""
        own = self._mine()
        if own.process is process:
            own.process = None
        with self._changing:
            if process not in self.processes:
                return
            self.processes.remove(process)
        log.warning("process %d%s", process.pid, how)
        process.close()
