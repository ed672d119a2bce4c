"""A batch while it is filled, and the numbers of steps without a record that go into it."""

import math
import secrets
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from gradwatch import wire
from gradwatch.model.discovery import shorten_name
from gradwatch.settings import LONGEST_NAME, can_be_stored

# A batch is written when it reaches one of these, all well below what a server takes by default.
LARGEST_BATCH_BYTES: Final = 4 << 20
LARGEST_BATCH_SAMPLES: Final = 500
LARGEST_BATCH_VALUES: Final = 50_000
"""Losses and logged scalars."""
LARGEST_BATCH_EVENTS: Final = 5_000
LARGEST_BATCH_NAMES: Final = 200
"""Different names of scalars."""

_MOST_NAMES: Final = 1_000
"""Different names that a run may log: the server keeps the latest value of each with the run."""
_OWN_NAMES: Final = ("loss", "clip_norm")


class ScalarNames:
    """The names of scalars that a run has logged, of which the server takes only so many."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._has_warned = False

    def accept(self, name: str) -> bool:
        """Return whether the server takes a scalar of this name."""
        if name in self._names or name in _OWN_NAMES:
            return True
        if len(self._names) < _MOST_NAMES and len(name) <= LONGEST_NAME and can_be_stored(name):
            self._names.add(name)
            return True
        return False

    def warning(self, name: str) -> str:
        """Return why a name is not taken; empty where this has been told."""
        if self._has_warned:
            return ""
        self._has_warned = True
        why = f"that has a name of more than {LONGEST_NAME} characters or with NUL, or a new one beyond {_MOST_NAMES:,}"
        return f"log({name[:40]}=...) is dropped, as all is {why}"


class StepNumbers:
    """Loss and clip norm of steps that have no record: three lists of the same length, to which one thread appends."""

    __slots__ = ("clip_norms", "losses", "read", "steps")

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float | None] = []
        """None for a step without a loss."""
        self.clip_norms: list[float | None] = []
        """None for a step without clipping."""
        self.read = 0
        """How many of them the collector has taken."""


class Batch:
    """A batch while it is filled."""

    def __init__(self) -> None:
        self.samples: list[wire.Sample] = []
        self.trail: dict[str, list[tuple[int, float]]] = {}
        """Name -> (step, value), by step."""
        self.events: list[wire.Event] = []
        self.end: wire.End | None = None
        self.opened_at = time.monotonic()
        self._bytes = 0
        """Size of the encoded samples and values, roughly."""
        self._values = 0

    def add_sample(self, sample: wire.Sample) -> None:
        """Add a sample."""
        self.samples.append(sample)
        self._bytes += sum(4 * vector.size for vector in sample.statistics.values()) + 256
        self._bytes += 32 * len(sample.scalars) + 9 * sum(map(len, sample.histograms.values()))

    def takes(self, name: str) -> bool:
        """Return whether there is room for a scalar of this name."""
        return name in self.trail or len(self.trail) < LARGEST_BATCH_NAMES

    def add_value(self, step: int, name: str, value: float) -> None:
        """Add a number that belongs to no sample; a later one of the same step and name replaces it."""
        pairs = self.trail.setdefault(name, [])
        if pairs and pairs[-1][0] == step:
            pairs.pop()
        pairs.append((step, value))
        self._values += 1
        self._bytes += 16

    def add_values(self, name: str, pairs: Sequence[tuple[int, float]]) -> None:
        """Add numbers of later steps than those that are there, as (step, value)."""
        self.trail.setdefault(name, []).extend(pairs)
        self._values += len(pairs)
        self._bytes += 16 * len(pairs)

    @property
    def age_seconds(self) -> float:
        """Return for how long it has been filled."""
        return time.monotonic() - self.opened_at

    @property
    def is_full(self) -> bool:
        """Return whether it is to be written now."""
        return (
            self._bytes >= LARGEST_BATCH_BYTES
            or len(self.samples) >= LARGEST_BATCH_SAMPLES
            or self._values >= LARGEST_BATCH_VALUES
            or len(self.events) >= LARGEST_BATCH_EVENTS
        )

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is in it."""
        return not (self.samples or self.trail or self.events or self.end is not None)

    def to_wire(self, attempt: int, dropped: wire.Dropped) -> wire.Batch:
        """Return the document under a new id."""
        return wire.Batch(
            id=secrets.token_hex(8),
            attempt=attempt,
            samples=self.samples,
            trail={name: _trail(pairs) for name, pairs in self.trail.items()},
            events=[
                event
                if event.parameter is None
                else msgspec.structs.replace(event, parameter=shorten_name(event.parameter))
                for event in self.events
            ],
            dropped=dropped,
            end=self.end,
        )


def _trail(pairs: Sequence[tuple[int, float]]) -> wire.Trail:
    values: list[wire.Number] = [value for _, value in pairs]
    if not math.isfinite(sum(value for _, value in pairs)):
        values = [wire.serialise(value) for _, value in pairs]
    return wire.Trail(steps=[step for step, _ in pairs], values=values)
