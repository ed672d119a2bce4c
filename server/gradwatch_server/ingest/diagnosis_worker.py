"""Diagnoses the samples of a batch one after the other; run as a module, it is a worker process of the diagnosis pool.

Such a process reads jobs from its standard input and writes what it found to its standard output, until its input
ends, which it does however the server stops. It keeps nothing between two jobs but what it has unpacked.
"""

import pickle
import signal
import struct
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gradwatch.wire import Statistic
from gradwatch_server import diagnosis
from gradwatch_server.diagnosis import Finding, History, RunParameters, Sample, Thresholds

READY = b"\x01"
"""The first byte that such a process writes: from then on it takes jobs."""
_PROTOCOL = 5
_LENGTH = struct.Struct("<q")
_KEPT = 64
_LARGEST_KEPT_BYTES = 1 << 18


class Examined(NamedTuple):
    """What came of it."""

    memory: History
    """The memory with all of the samples in it."""
    findings: list[list[Finding]]
    """For each sample, what was found."""


def examine_all(layout: RunParameters, memory: History, readings: Sequence[Sample], thresholds: Thresholds) -> Examined:
    """Look at samples of a run, by ascending steps."""
    found = []
    for reading in readings:
        memory, findings = diagnosis.diagnose(layout, memory, reading, thresholds)
        found.append(findings)
    return Examined(memory, found)


def packed(layout: RunParameters, memory: History, readings: Sequence[Sample], thresholds: Thresholds) -> bytes:
    """Return a job. Vectors are taken apart, and what stays the same is packed once: all this costs the server time."""
    samples = [
        (
            reading.step,
            reading.at,
            {name: vector.tobytes() for name, vector in reading.statistics.items()},
            reading.scalars,
            reading.losses,
        )
        for reading in readings
    ]
    return pickle.dumps((layout.pickled, _pickled(thresholds), memory, samples), _PROTOCOL)


def done(job: bytes) -> bytes:
    """Do a job; return what ``unpacked`` reads."""
    layout, thresholds, memory, samples = _unpickled(job)
    readings = [_reading(*sample) for sample in samples]
    return pickle.dumps(tuple(examine_all(_kept(layout), memory, readings, _kept(thresholds))), _PROTOCOL)


def unpacked(answer: bytes) -> Examined:
    """Return what came of a job."""
    return Examined(*_unpickled(answer))


def send(pipe: BinaryIO, content: bytes) -> None:
    """Write a job, or what came of it."""
    pipe.write(_LENGTH.pack(len(content)) + content)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes:
    """Read what ``send`` wrote.

    Raises:
        EOFError: the other end is gone.
    """
    length = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))[0]
    return _exactly(pipe, length)


def _exactly(pipe: BinaryIO, size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError("the other end is gone")
    return content


def _reading(step: int, at: float, statistics: dict[Statistic, bytes], scalars: Any, losses: Any) -> Sample:
    vectors = {name: np.frombuffer(vector, np.float32) for name, vector in statistics.items()}
    return Sample(step=step, at=at, statistics=vectors, scalars=scalars, losses=losses)


@lru_cache(_KEPT)
def _pickled(thresholds: Thresholds) -> bytes:
    return pickle.dumps(thresholds, _PROTOCOL)


def _unpickled(content: bytes) -> Any:
    return pickle.loads(content)  # noqa: S301  # both ends are of one server


_known = lru_cache(_KEPT)(_unpickled)


def _kept(content: bytes) -> Any:
    """Return what comes with every job of a run: unpacked once, unless it is large."""
    return _known(content) if len(content) <= _LARGEST_KEPT_BYTES else _unpickled(content)


def main() -> None:
    """Do jobs until the input ends: the server's end, not a signal to all that belongs to it, ends this process."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        answers.write(READY)
        answers.flush()
        while True:
            send(answers, done(receive(jobs)))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
