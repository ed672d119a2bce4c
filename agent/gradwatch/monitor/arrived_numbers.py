"""Signs of trouble in numbers of a device, which are read only once they have arrived: one or two steps later.

The numbers of a step that trains on the CPU are judged before its optimizer steps (see ``gradwatch.steps.schedule``).
Those of a device are still on their way then. They are judged here on the thread that trains, as soon as a later step
finds them in the memory of the host: waiting for the collector would take a second, and waking it at each step costs
more than a look at one float.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from torch import Tensor

from gradwatch.norms.transfer import Scalar, Transfer
from gradwatch.steps.core import StepCore
from gradwatch.steps.quiet import Signs
from gradwatch.steps.state import OptimizerKey, StepRecord

_MOST_OPTIMIZERS: Final = 256
"""Optimizers whose usual numbers are remembered."""


class _Sent(NamedTuple):
    """The numbers of a step that are on their way; the record's own are replaced by what the collector reads."""

    transfer: Transfer
    optimizer: OptimizerKey
    losses: Sequence[Scalar]
    clip_norm: Scalar | None
    found_infs: Sequence[Scalar]


class ArrivedNumbers:
    """Judges the numbers of earlier steps as they arrive, and has the next step sampled at a sign of trouble.

    Args:
        steps: the step core.
    """

    def __init__(self, steps: StepCore) -> None:
        self._steps = steps
        self._sent: deque[_Sent] = deque()
        self._signs: dict[OptimizerKey, Signs] = {}
        self._trouble_before = 0
        self._urgent = False

    def sent(self, record: StepRecord) -> None:
        """Note a step whose numbers are being copied to the host; a sign that was found makes it urgent."""
        if self._urgent:
            self._urgent, record.urgent = False, True
        if record.skipped:
            return
        clip = record.clips[-1] if record.clips and not record.clips[-1].partial else None
        optimizer = next(iter(record.stepped), 0)
        norm = None if clip is None else clip.total_norm
        self._sent.append(_Sent(record.buffers, optimizer, tuple(record.losses), norm, tuple(record.found_infs)))

    def look(self) -> None:
        """Judge what has arrived, in order; nothing is waited for."""
        sent = self._sent
        while sent and (sent[0].transfer.is_lost or sent[0].transfer.arrived()):
            step = sent.popleft()
            if not step.transfer.is_lost:
                self._judge(step)

    def _judge(self, step: _Sent) -> None:
        def read(number: Scalar) -> float:
            return float(step.transfer.read(number)[0]) if isinstance(number, Tensor) else float(number)

        if any(map(read, step.found_infs)):
            return  # a fused optimizer has skipped this step
        loss = sum(map(read, step.losses)) if step.losses else None
        norm = None if step.clip_norm is None else read(step.clip_norm)
        finite = all(number is None or math.isfinite(number) for number in (loss, norm))
        trouble = 0 if finite else 2
        if finite:
            if step.optimizer not in self._signs and len(self._signs) >= _MOST_OPTIMIZERS:
                self._signs.clear()
            trouble = int(self._signs.setdefault(step.optimizer, Signs()).of_numbers(loss, norm))
        before, self._trouble_before = self._trouble_before, trouble
        if trouble:
            self._urgent = True
        if trouble > before:
            state = self._steps.state
            self._steps.schedule.sample_next(finite=finite, begun=bool(state.open or state.coming))
