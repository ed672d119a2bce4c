"""The order in which an attempt lists the parameters of its run, where it is not the run's own.

A resumed training may find lazy parameters at once that the first attempt found last, or find some only later. Its
vectors are put into the run's order when they arrive, so that nothing behind has to know of attempts. An order is
stored as segments (first position in the run's vectors, length), which are few unless a network was shuffled.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch_server.errors import Refused
from gradwatch_server.ingest.validation import invalid

Order = list[list[int]]
"""Segments: [first position in the run's vectors, length]."""


def check_same_network(run_id: str, stored: Sequence[wire.Parameter], listed: Sequence[wire.Parameter]) -> None:
    """Refuse parameters that are neither among those of the run nor all of those and more.

    Raises:
        Refused: 409, and names the first difference.
    """
    before, after = ([parameter.name for parameter in several] for several in (stored, listed))
    if set(before) <= set(after) or set(after) <= set(before):
        return
    missing = next(name for name in before if name not in set(after))
    strange = next(name for name in after if name not in set(before))
    detail = f"run {run_id!r} has parameter {missing!r}, the registration lists {strange!r} and not that one"
    raise Refused(409, "Another run", f"{detail}: use another run id for another network")


def order_of(names: Sequence[str], listed: Sequence[wire.Parameter]) -> Order:
    """Return the order in which a registration lists parameters; ``names`` are all of the run in the run's order."""
    places = {name: place for place, name in enumerate(names)}
    order: Order = []
    for parameter in listed:
        place = places[parameter.name]
        if order and sum(order[-1]) == place:
            order[-1][1] += 1
        else:
            order.append([place, 1])
    return order


def is_plain(order: Order, count: int) -> bool:
    """Return whether an order is that of the run with all of its ``count`` parameters."""
    return order == ([[0, count]] if count else [])


def in_run_order(batch: wire.Batch, orders: Mapping[str, Order], count: int, latest: int) -> wire.Batch:
    """Return a batch with its vectors in the order of the run, and ``MISSING`` for what its attempt has not listed.

    Args:
        batch: a batch with the attempt's number by the server's clock.
        orders: attempt -> its order, of the attempts that have one of their own; empty where it is not known any more.
        count: number of parameters of the run.
        latest: the run's latest attempt. A batch of an earlier one may be from before it listed its last parameters.

    Raises:
        Refused: 422, a vector has not as many values as the attempt has listed parameters.
    """
    order = orders.get(str(batch.attempt))
    if order is None:
        return batch
    places = np.concatenate([np.zeros(0, np.intp), *(np.arange(first, first + length) for first, length in order)])
    older = batch.attempt < latest
    samples = [_in_run_order(sample, places, count, older=older) for sample in batch.samples]
    return msgspec.structs.replace(batch, samples=samples)


def _in_run_order(sample: wire.Sample, places: NDArray[np.intp], count: int, *, older: bool) -> wire.Sample:
    statistics = {}
    for name, vector in sample.statistics.items():
        if vector.size > places.size or (vector.size < places.size and not older):
            detail = f"statistics.{name} of step {sample.step} has {vector.size} values, its attempt has listed"
            raise invalid(f"{detail} {places.size} parameters: register the run again if it has gained some")
        statistics[name] = np.full(count, wire.MISSING, np.float32)
        statistics[name][places[: vector.size]] = vector
    unstepped = [int(places[index]) if index < places.size else count for index in sample.unstepped or ()]
    return msgspec.structs.replace(sample, statistics=statistics, unstepped=unstepped)
