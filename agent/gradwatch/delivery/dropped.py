"""Counts of what an agent could not deliver: dropped samples, bytes and values, and errors of its own."""

from dataclasses import dataclass


@dataclass(slots=True)
class Dropped:
    """Counts over one attempt of a run; each batch carries the current ones as ``wire.Dropped``."""

    samples: int = 0
    bytes: int = 0
    errors: int = 0
    """Errors of the agent's own, which are swallowed so that the training goes on."""
    values: int = 0
    """Numbers that belong to no sample: losses and logged scalars."""

    def add_sample(self) -> None:
        """Count one dropped sample."""
        self.samples += 1

    def add(self, other: "Dropped") -> None:
        """Add the counts of ``other``."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.errors += other.errors
        self.values += other.values
