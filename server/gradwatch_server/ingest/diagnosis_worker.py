"""The program of a worker process of the diagnosis pool: reads jobs from standard input, writes results to its output.

The process ends when its input ends, which happens however the server stops. Between two jobs it keeps only the objects
that it has unpickled for earlier ones.
"""

import pickle
import signal
import sys
from collections import OrderedDict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from gradwatch.wire import Statistic
from gradwatch_server.diagnosis import Sample
from gradwatch_server.ingest.diagnosis_pool import PICKLE_PROTOCOL, READY, diagnose_all

_CACHE_BYTES = 32 << 20


def _do_job(job: bytes) -> bytes:
    """Return the pickled ``Diagnosed`` of a job that the pool has encoded."""
    parameters, thresholds, history, plain = _unpickle(job)
    samples = [_sample(*values) for values in plain]
    diagnosed = diagnose_all(_cache.unpickle(parameters), history, samples, _cache.unpickle(thresholds))
    return pickle.dumps(tuple(diagnosed), PICKLE_PROTOCOL)


def _sample(step: int, at: float, statistics: dict[Statistic, bytes], scalars: Any, losses: Any) -> Sample:
    vectors = {name: np.frombuffer(vector, np.float32) for name, vector in statistics.items()}
    return Sample(step=step, at=at, statistics=vectors, scalars=scalars, losses=losses)


def _unpickle(content: bytes) -> Any:
    return pickle.loads(content)  # noqa: S301  # it comes from the server that started this process


class _Cache:
    """Objects that come with every job of a run: unpickled once, while the pickled ones fit into some bytes.

    A fleet of small batches has hundreds of runs that take turns, so it is bounded in bytes and not in objects.
    """

    def __init__(self, limit_bytes: int = _CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._objects: OrderedDict[bytes, Any] = OrderedDict()

    def unpickle(self, content: bytes) -> Any:
        """Return the object; those that were asked for longest ago leave the cache first."""
        if content in self._objects:
            self._objects.move_to_end(content)
            return self._objects[content]
        found = self._objects[content] = _unpickle(content)
        self._bytes += len(content)
        while self._bytes > self._limit_bytes:
            self._bytes -= len(self._objects.popitem(last=False)[0])
        return found


_cache = _Cache()


def main() -> None:
    """Do jobs until the input ends. Signals are ignored: the end of the server ends this process."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    jobs = Connection(sys.stdin.fileno(), writable=False)
    results = Connection(sys.stdout.fileno(), readable=False)
    try:
        results.send_bytes(READY)
        while True:
            results.send_bytes(_do_job(jobs.recv_bytes()))
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    main()
