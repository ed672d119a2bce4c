"""Splitting a batch in two, for a server that does not take it whole."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from gradwatch import wire
from gradwatch.delivery.dropped import Dropped

if TYPE_CHECKING:
    from gradwatch.delivery.spool import Entry  # which counts by this module

_Item = tuple[int, wire.Sample | wire.Event | wire.End | tuple[str, wire.Number]]
"""(step, the smallest thing that can be sent alone: a sample, an event, the end or one value of a trail)."""


def split_batch(batch: wire.Batch) -> tuple[wire.Batch, wire.Batch] | None:
    """Return the earlier and the later half of a batch by step; None if it holds only one item.

    The ids of the halves follow from the id of the batch, so that splitting it again gives the same batches and the
    server stores each of them once.
    """
    items = sorted(_items(batch), key=lambda item: item[0])
    middle = len(items) // 2
    if not middle:
        return None
    return _batch_of(batch, f"{batch.id}.0", items[:middle]), _batch_of(batch, f"{batch.id}.1", items[middle:])


def count_values(batch: wire.Batch) -> int:
    """Return how many values of trails a batch holds: losses and logged scalars."""
    return sum(len(trail.steps) for trail in batch.trail.values())


def _items(batch: wire.Batch) -> Iterator[_Item]:
    for sample in batch.samples:
        yield sample.step, sample
    for name, trail in batch.trail.items():
        for step, value in zip(trail.steps, trail.values, strict=True):
            yield step, (name, value)
    for event in batch.events:
        yield event.step, event
    if batch.end is not None:
        yield 2**63, batch.end


def _batch_of(batch: wire.Batch, batch_id: str, items: Iterable[_Item]) -> wire.Batch:
    samples, events, trails, end = list[wire.Sample](), list[wire.Event](), dict[str, wire.Trail](), None
    for step, item in items:
        if isinstance(item, wire.Sample):
            samples.append(item)
        elif isinstance(item, wire.Event):
            events.append(item)
        elif isinstance(item, wire.End):
            end = item
        else:
            trail = trails.setdefault(item[0], wire.Trail(steps=[], values=[]))
            trail.steps.append(step)
            trail.values.append(item[1])
    return msgspec.structs.replace(batch, id=batch_id, samples=samples, trail=trails, events=events, end=end)


def split_entry(piece: "Entry") -> "list[Entry]":
    """Return the two halves of a batch, the earlier one first; nothing if it cannot be split."""
    batch = _batch(piece)
    halves = None if batch is None else split_batch(batch)
    return [piece._replace(samples=len(half.samples), body=wire.encode(half)) for half in halves or ()]


def dropped_with(piece: "Entry") -> Dropped:
    """Return what is dropped with a document."""
    batch = _batch(piece)
    return Dropped(samples=piece.samples, bytes=len(piece.body), values=0 if batch is None else count_values(batch))


def _batch(entry: "Entry") -> wire.Batch | None:
    try:
        return wire.read_back(entry.body) if entry.kind == "batch" else None
    except wire.WireError:
        return None
