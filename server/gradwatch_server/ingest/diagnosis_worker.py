"""The program of a worker process of the diagnosis pool: reads jobs from standard input, writes results to its output.

The process ends when its input ends, which happens however the server stops. Between two jobs it keeps only the objects
that it has unpickled for earlier ones.
"""

import pickle
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from gradwatch.wire import Statistic
from gradwatch_server.diagnosis import Sample
from gradwatch_server.ingest.diagnosis_pool import PICKLE_PROTOCOL, READY, diagnose_all

_CACHED_OBJECTS = 64
_LARGEST_CACHED_BYTES = 1 << 18


def _do_job(job: bytes) -> bytes:
    """Return the pickled ``Diagnosed`` of a job that the pool has encoded."""
    parameters, thresholds, history, plain = _unpickle(job)
    samples = [_sample(*values) for values in plain]
    diagnosed = diagnose_all(_unpickle_cached(parameters), history, samples, _unpickle_cached(thresholds))
    return pickle.dumps(tuple(diagnosed), PICKLE_PROTOCOL)


def _sample(step: int, at: float, statistics: dict[Statistic, bytes], scalars: Any, losses: Any) -> Sample:
    vectors = {name: np.frombuffer(vector, np.float32) for name, vector in statistics.items()}
    return Sample(step=step, at=at, statistics=vectors, scalars=scalars, losses=losses)


def _unpickle(content: bytes) -> Any:
    return pickle.loads(content)  # noqa: S301  # it comes from the server that started this process


_cached = lru_cache(_CACHED_OBJECTS)(_unpickle)


def _unpickle_cached(content: bytes) -> Any:
    """Return an object that comes with every job of a run, unpickled once unless it is large."""
    return _cached(content) if len(content) <= _LARGEST_CACHED_BYTES else _unpickle(content)


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
