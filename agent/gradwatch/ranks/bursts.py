"""Bursts of samples that all ranks take at the same steps, although a sign of trouble may show on one of them alone.

A rank that sees a sign names a step ahead of the training, and every rank looks for such steps on its collector's
thread: none waits, and no two ranks go by different words, as all of them read the same ones in the same order.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from gradwatch.ranks.exchange import RankExchange

LOOK_SECONDS: Final = 0.2
"""Time between two looks for a step that another rank has named."""


class AgreedBursts:
    """Names the first steps of bursts to all ranks, and learns those that were named.

    Args:
        exchange: passes them on; its errors are raised.
        agreed: called with each step that a rank has named, this one among them.
    """

    def __init__(self, exchange: RankExchange, agreed: Callable[[int], None]) -> None:
        self._exchange = exchange
        self._agreed = agreed
        self._wanted: deque[int] = deque()
        """Steps that this rank is still to name."""
        self._known = 0
        """Number of steps that were named and are known here."""
        self._looked = 0.0

    def ask(self, step: int) -> None:
        """Have all ranks sample from a step on; any thread may call this."""
        self._wanted.append(step)

    def poll(self) -> None:
        """Name what is wanted, and look for what was named, if it is time to.

        Raises:
            StoreGone: the store does not answer.
        """
        now = time.monotonic()
        if not self._wanted and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        while self._wanted:
            self._exchange.name_burst(self._wanted.popleft())
        while (step := self._exchange.burst(self._known)) is not None:
            self._known += 1
            self._agreed(step)
