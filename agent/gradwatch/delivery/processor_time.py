"""Processor time of the agent's threads: what a sample takes of it, and everything else."""

import time
from typing import Final

_WEIGHT: Final = 1 / 16
"""Weight of the newest samples in the averages."""
_MOST_TIMES: Final = 8.0
"""Times the average that one sample counts as at most."""
_DOCUMENT_BYTES: Final = 64 << 10
"""A document takes as long to write and send as so many of its bytes, however small it is."""


def samples_share(samples: int, size_bytes: int) -> float:
    """Return the share of the time for a document that would be saved without the samples in it."""
    return size_bytes / (size_bytes + _DOCUMENT_BYTES) if samples else 0.0


class ProcessorTime:
    """Processor time of one thread, which calls the methods itself; others may read the numbers."""

    def __init__(self) -> None:
        self.other_seconds = 0.0
        """What was not for samples."""
        self.sample_seconds = 0.0
        """Average time for one sample, over all kinds of work."""
        self._averages: dict[str, float] = {}
        """Kind of work -> average time for one sample."""
        self._booked = 0.0
        self.seconds = 0.0
        """All of it."""

    def book(self) -> None:
        """Book what the thread has taken since it last booked anything."""
        self.other_seconds += self._since()

    def book_samples(self, work: str, samples: int, share: float = 1.0) -> None:
        """Book what the thread has taken as work for samples.

        Args:
            work: the kind of work.
            samples: for how many.
            share: the part that would have been saved without them.
        """
        spent = self._since()
        self.other_seconds += spent * (1 - share)
        if not samples:
            return
        each = spent * share / samples
        average = self._averages.get(work, each)
        self._averages[work] = average + _WEIGHT * (min(each, _MOST_TIMES * average) - average)
        self.sample_seconds = sum(self._averages.values())

    def _since(self) -> float:
        now = time.thread_time()
        spent = now - self._booked
        self._booked = self.seconds = now
        return spent
