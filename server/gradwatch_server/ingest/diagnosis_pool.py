"""Diagnosis pool: diagnoses the samples of batches in the server, or in worker processes once that takes much time.

Python runs one thread at a time. With many runs a third of the server's time would be diagnosis, while the other cores
of the machine are idle. ``diagnosis_worker.py`` is the program of a worker process.

``concurrent.futures.ProcessPoolExecutor`` was measured in its place. It costs the writer's thread ten times as much to
hand over a batch (2.2 ms instead of 0.2 for 16 samples of 500 parameters), since two threads of its own take turns with
it, and its worker lives on when the server is killed.
"""

import contextlib
import fcntl
import logging
import math
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple, cast

from gradwatch_server import diagnosis
from gradwatch_server.diagnosis import Finding, History, RunParameters, Sample, Thresholds

LARGE_TIME_SHARE = 0.1
"""Share of a writer's time from which its diagnosis moves to a worker process."""
_LEAST_WORK = 4_000
"""Smallest work that is worth handing over, in parameters; each sample counts as 1,000 more.

To hand one sample of 300 parameters over takes the writer as long as to diagnose it, and the worker as long again.
"""
READY = b"ready"
"""What a worker process sends first: from then on it takes jobs."""
PICKLE_PROTOCOL = 5
_DEADLINE_SECONDS = 5.0
"""Time in which a worker has to take a job, or to answer one; then it is killed, and the server does its work."""
_WINDOW_SECONDS = 2.0
_LENGTH = struct.Struct("!i")
"""What stands before each message of ``multiprocessing.connection``."""
_PIPE_BYTES = 1 << 20
"""Two usual batches fit in, so the writer need not wait until they are read."""

log = logging.getLogger(__name__)


class Diagnosed(NamedTuple):
    """The result of diagnosing several samples of a run."""

    history: History
    """The run's history with all of the samples in it."""
    findings: list[list[Finding]]
    """The findings of each sample."""


def diagnose_all(
    parameters: RunParameters, history: History, samples: Sequence[Sample], thresholds: Thresholds
) -> Diagnosed:
    """Diagnose samples of a run one after the other, by ascending steps."""
    found = []
    for sample in samples:
        history, findings = diagnosis.diagnose(parameters, history, sample, thresholds)
        found.append(findings)
    return Diagnosed(history, found)


class WorkerProcess:
    """A worker process that does jobs in the order in which they are begun. It belongs to one thread."""

    def __init__(self) -> None:
        job_reader, self._jobs = Pipe(duplex=False)
        self._results, result_writer = Pipe(duplex=False)
        self._capacity_bytes = _widen(self._jobs)
        os.set_blocking(self._jobs.fileno(), False)  # a process that stands still must not hold up the writer
        os.set_blocking(self._results.fileno(), False)
        with job_reader, result_writer:
            self._process = subprocess.Popen(
                # -P keeps modules in the working directory from taking the place of the standard library's.
                [sys.executable, "-P", "-m", "gradwatch_server.ingest.diagnosis_worker"],
                stdin=job_reader.fileno(),
                stdout=result_writer.fileno(),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # signals to the server's process group do not reach it
            )
        self._ready = False
        self._begun = 0
        self._pending: deque[tuple[int, int]] = deque()
        """Number and size of each job whose result has not been read; perhaps nobody waits for it any more."""
        self._read: dict[int, bytes] = {}
        """Number -> result of jobs that have not been asked for yet."""

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def is_ready(self, timeout_seconds: float = 0.0) -> bool:
        """Return whether the process takes jobs, or will do so within this time.

        Raises:
            OSError, EOFError: the process ended before.
        """
        if not self._ready:
            if not self._results.poll(timeout_seconds):
                return False
            if _receive(self._results.fileno()) != READY:
                raise EOFError("it sent something else first")
            self._ready = True
            log.info("diagnosis worker %d is ready", self.pid)
        return True

    def begin(self, job: bytes) -> int:
        """Send a job; return its number.

        A job that the pipe may have no room for waits until all earlier ones are done: otherwise both processes could
        wait for each other to read.

        Raises:
            OSError, EOFError: the process has ended, or stands still.
        """
        while self._pending and sum(size for _, size in self._pending) + len(job) > self._capacity_bytes:
            self._read_result()
        _send(self._jobs.fileno(), job)
        self._begun += 1
        self._pending.append((self._begun, len(job)))
        return self._begun

    def result(self, number: int) -> bytes:
        """Wait for the result of a job; those of earlier jobs are dropped.

        Raises:
            OSError, EOFError: the process has ended, or stands still.
        """
        while number not in self._read:
            self._read_result()
        result = self._read.pop(number)
        self._read = {later: kept for later, kept in self._read.items() if later > number}
        return result

    def _read_result(self) -> None:
        result = _receive(self._results.fileno())
        self._read[self._pending.popleft()[0]] = result

    def close(self) -> None:
        """Kill the process, whatever it is doing; a thread that waits for its result gets an EOFError."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a frozen process ends when it goes on
            self._process.wait(_DEADLINE_SECONDS)


def _send(pipe: int, content: bytes) -> None:
    """Write a message for ``Connection.recv_bytes`` to a pipe that does not block.

    Raises:
        TimeoutError: the other side does not read it.
        OSError: the other side has ended.
    """
    deadline = time.monotonic() + _DEADLINE_SECONDS
    rest = memoryview(_LENGTH.pack(len(content)) + content)
    while rest:
        _await_pipe(pipe, select.POLLOUT, deadline)
        with contextlib.suppress(BlockingIOError):
            rest = rest[os.write(pipe, rest) :]


def _receive(pipe: int) -> bytes:
    """Read a message of ``Connection.send_bytes`` from a pipe that does not block.

    Raises:
        TimeoutError: it does not come.
        EOFError, OSError: the other side has ended.
    """
    deadline = time.monotonic() + _DEADLINE_SECONDS
    (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size, deadline))
    return _read_exactly(pipe, length, deadline)


def _read_exactly(pipe: int, size: int, deadline: float) -> bytes:
    found = bytearray()
    while len(found) < size:
        _await_pipe(pipe, select.POLLIN, deadline)
        part = os.read(pipe, size - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def _await_pipe(pipe: int, event: int, deadline: float) -> None:
    """Wait until a pipe can be read or written, or its other side has ended."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, 1_000 * (deadline - time.monotonic()))):
        raise TimeoutError(f"stood still for {_DEADLINE_SECONDS:g} s")


def _widen(pipe: Connection) -> int:
    """Widen a pipe where that is allowed; return how many unread bytes it holds for sure, 0 if that is unknown."""
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        return 0
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) * 3 // 4


class _OfThread:
    """The worker process of one writer's thread, if it has one, and the time that the thread spends on diagnosis."""

    def __init__(self) -> None:
        self.worker: WorkerProcess | None = None
        self._window_start = time.monotonic()
        self._spent_seconds = 0.0

    def time_share(self, seconds: float) -> float:
        """Add time spent on diagnosis; return its share of the present window, or a lower bound before its end."""
        now = time.monotonic()
        self._spent_seconds += seconds
        passed = now - self._window_start
        share = self._spent_seconds / max(passed, _WINDOW_SECONDS)
        if passed >= _WINDOW_SECONDS:
            self._window_start, self._spent_seconds = now, 0.0
        return share


class DiagnosisPool:
    """Diagnoses batches for the writer's threads; each thread has a worker process of its own, or none."""

    def __init__(self, from_time_share: float = math.inf) -> None:
        """Start without worker processes.

        Args:
            from_time_share: share of a thread's time from which it gets a worker process; by default none does.
        """
        self._from_time_share = from_time_share
        self._threads = threading.local()
        self._lock = threading.Lock()
        self.workers: list[WorkerProcess] = []
        """The worker processes that run."""

    def begin(
        self, parameters: RunParameters, history: History, samples: Sequence[Sample], thresholds: Thresholds
    ) -> Callable[[], Diagnosed]:
        """Begin to diagnose samples; return the function that waits for the result, the same in any process."""
        here = partial(self._diagnose_here, parameters, history, samples, thresholds)
        worker = self._of_thread().worker
        if worker is None or not _is_large(parameters, samples):
            return here
        try:
            if not worker.is_ready():
                return here
        except (OSError, EOFError):
            self._from_time_share = math.inf
            self._drop(worker, EOFError("it ended before it took a job, no other one is started"))
            return here
        try:
            number = worker.begin(_encode_job(parameters, history, samples, thresholds))
        except (OSError, EOFError) as error:
            self._drop(worker, error)
            return here
        return partial(self._wait, worker, number, here)

    def close(self) -> None:
        """End the worker processes; no others are started."""
        with self._lock:
            self._from_time_share = math.inf
            running, self.workers = self.workers, []
        for worker in running:
            worker.close()

    def _of_thread(self) -> _OfThread:
        if not hasattr(self._threads, "own"):
            self._threads.own = _OfThread()
        return cast("_OfThread", self._threads.own)

    def _diagnose_here(
        self, parameters: RunParameters, history: History, samples: Sequence[Sample], thresholds: Thresholds
    ) -> Diagnosed:
        started = time.perf_counter()
        diagnosed = diagnose_all(parameters, history, samples, thresholds)
        thread = self._of_thread()
        share = thread.time_share(time.perf_counter() - started)
        if share > self._from_time_share and thread.worker is None and _is_large(parameters, samples):
            self._start_worker(thread, share)
        return diagnosed

    def _wait(self, worker: WorkerProcess, number: int, here: Callable[[], Diagnosed]) -> Diagnosed:
        try:
            return Diagnosed(*pickle.loads(worker.result(number)))  # noqa: S301  # of this server's own worker
        except (OSError, EOFError) as error:
            self._drop(worker, error)
            return here()

    def _start_worker(self, thread: _OfThread, share: float) -> None:
        with self._lock:
            if share <= self._from_time_share:  # the pool was closed in the meantime
                return
            try:
                thread.worker = WorkerProcess()
            except OSError as error:  # no more processes, no memory: do not try again at every batch
                log.warning("cannot start a diagnosis worker: %s", error)
                self._from_time_share = math.inf
                return
            self.workers.append(thread.worker)

    def _drop(self, worker: WorkerProcess, reason: Exception) -> None:
        """Go on without a worker process; another one is started if diagnosis still takes much time."""
        thread = self._of_thread()
        if thread.worker is worker:
            thread.worker = None
        with self._lock:
            if worker not in self.workers:
                return
            self.workers.remove(worker)
        event = (
            str(reason) if isinstance(reason, TimeoutError) else f"has ended ({str(reason) or type(reason).__name__})"
        )
        log.warning("diagnosis worker %d %s: the server diagnoses on its own for now", worker.pid, event)
        worker.close()


def _is_large(parameters: RunParameters, samples: Sequence[Sample]) -> bool:
    return len(samples) * (len(parameters.names) + 1_000) >= _LEAST_WORK


def _encode_job(
    parameters: RunParameters, history: History, samples: Sequence[Sample], thresholds: Thresholds
) -> bytes:
    """Return a job for a worker process, which costs the server little.

    Vectors are sent as bytes, and objects that are the same in every batch of a run are pickled only once.
    """
    plain = [
        (
            sample.step,
            sample.at,
            {name: vector.tobytes() for name, vector in sample.statistics.items()},
            sample.scalars,
            sample.losses,
        )
        for sample in samples
    ]
    return pickle.dumps((parameters.pickled, _pickle_thresholds(thresholds), history, plain), PICKLE_PROTOCOL)


@lru_cache(64)
def _pickle_thresholds(thresholds: Thresholds) -> bytes:
    return pickle.dumps(thresholds, PICKLE_PROTOCOL)
