"""A batch that the server does not take whole, in two."""

from collections.abc import Iterable, Iterator

import msgspec

from gradwatch import wire

_Atom = tuple[int, wire.Sample | wire.Event | wire.End | tuple[str, wire.Number]]
"""The smallest that can be sent: one of the things that were measured at a step."""


def halves(batch: wire.Batch) -> tuple[wire.Batch, wire.Batch] | None:
    """Return the earlier and the later half of a batch; None where it holds one thing only.

    Their ids follow from its id: cut again, it gives the same batches, of which the server keeps each once.
    """
    atoms = sorted(_atoms(batch), key=lambda atom: atom[0])
    middle = len(atoms) // 2
    if not middle:
        return None
    return _of(batch, f"{batch.id}.0", atoms[:middle]), _of(batch, f"{batch.id}.1", atoms[middle:])


def values(batch: wire.Batch) -> int:
    """Return the numbers of a batch that belong to no sample: losses and what was logged."""
    return sum(len(trail.steps) for trail in batch.trail.values())


def _atoms(batch: wire.Batch) -> Iterator[_Atom]:
    for sample in batch.samples:
        yield sample.step, sample
    for name, trail in batch.trail.items():
        for step, value in zip(trail.steps, trail.values, strict=True):
            yield step, (name, value)
    for event in batch.events:
        yield event.step, event
    if batch.end is not None:
        yield 2**63, batch.end


def _of(batch: wire.Batch, name: str, atoms: Iterable[_Atom]) -> wire.Batch:
    samples, events, trails, end = list[wire.Sample](), list[wire.Event](), dict[str, wire.Trail](), None
    for step, thing in atoms:
        if isinstance(thing, wire.Sample):
            samples.append(thing)
        elif isinstance(thing, wire.Event):
            events.append(thing)
        elif isinstance(thing, wire.End):
            end = thing
        else:
            trail = trails.setdefault(thing[0], wire.Trail(steps=[], values=[]))
            trail.steps.append(step)
            trail.values.append(thing[1])
    return msgspec.structs.replace(batch, id=name, samples=samples, trail=trails, events=events, end=end)
