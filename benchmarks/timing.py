"""Interleaved timing: what is compared is measured in turns, so that a noisy machine is noisy for all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each piece of work over as many rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for index in range(rounds + 2):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if index >= 2:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def read_bandwidth() -> float:
    """Return bytes a second at which this machine reads memory with the threads of torch."""
    block = torch.ones(64 << 20)  # 256 MiB: larger than any cache
    seconds = interleaved({"sum": lambda: block.view(4096, -1).sum(1)}, 9)["sum"]
    return block.nbytes / seconds


def write_bandwidth() -> float:
    """Return bytes a second, read and written together, at which this machine scales memory in place."""
    block = torch.ones(64 << 20)
    seconds = interleaved({"mul": lambda: block.mul_(1.0)}, 9)["mul"]
    return 2 * block.nbytes / seconds
