"""Checks of what agents send, beyond the bounds of the wire's types: settings, consistency, words for a refusal.

The types in ``gradwatch.wire`` carry the bounds of single values, and decoding checks them. This module makes the
checks that a type cannot express: limits that are settings, whether the parts of a document fit each other, and NaN
where it is no valid value.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
import numpy as np

from gradwatch import wire
from gradwatch_server.errors import Refused
from gradwatch_server.settings import Limits

MOST_ENTRIES: Final[Mapping[tuple[type[msgspec.Struct], str], str]] = {
    (wire.Registration, "parameters"): "parameters",
    (wire.Registration, "attributes"): "scalar_names",
    (wire.Batch, "samples"): "samples_per_batch",
    (wire.Batch, "events"): "events_per_batch",
    (wire.Batch, "trail"): "scalar_names",
    (wire.Sample, "scalars"): "scalar_names",
    (wire.Sample, "histograms"): "scalar_names",
}
"""(document, field) -> the setting in ``[limits]`` that bounds how many entries the field has."""

_FAULT = re.compile(r"Expected (?P<expected>.+?)(?: - at `(?P<of>key` in `)?\$\.?(?P<place>[^`]*)`)?")
_STEP_OF_PATH = re.compile(r"\.?(\w+)|\[(\d+|\.\.\.)\]")


def invalid(detail: str) -> Refused:
    """Return the refusal of a document whose content cannot be right."""
    return Refused(422, "Invalid content", detail)


def beyond_bounds(fault: wire.BoundsError, content: Any) -> Refused:
    """Return the refusal of a document with a value beyond a bound of its type.

    Args:
        fault: the error that decoding raised.
        content: the same document as decoded without types, in which the value is looked up.
    """
    found = _FAULT.fullmatch(str(fault))
    if found is None:
        return invalid(str(fault))
    expected, place = found["expected"], found["place"]
    for pattern, words in wire.PATTERNS.items():
        expected = expected.replace(f"`str` matching regex {pattern!r}", words)
    if found["of"]:
        return invalid(f"a name in {place} is not allowed: expected {expected}")
    return invalid(f"{place} {_described(content, place, expected)}: expected {expected}")


def _described(content: Any, place: str, expected: str) -> str:
    """Return the value at a place such as ``samples[0].step``, or how long it is, in words."""
    value = content
    try:
        for name, index in _STEP_OF_PATH.findall(place):
            value = value[name or int(index)]
    except (LookupError, TypeError, ValueError):  # msgspec does not tell the key of a dict, or a key stands twice
        return "is not allowed"
    if "of length" not in expected:
        return f"{value!r:.80}"
    return f"has {len(value)} {'characters' if isinstance(value, str) else 'entries'}" if value else "is empty"


def check_registration(registration: wire.Registration, limits: Limits) -> None:
    """Refuse a registration that breaks a setting in ``[limits]`` or names a parameter twice.

    Raises:
        Refused: 422, with the field and its value; 409 where two parameters have one name, which no schema can say.
    """
    _check_names("project", [registration.project], limits)
    _check_names("name", [registration.name], limits)
    _check_counts(registration, limits)
    listed = registration.parameters
    for parameter in listed:
        _check_names("parameter", [parameter.name, parameter.dtype, parameter.kind], limits)
    if len({parameter.name for parameter in listed}) != len(listed):
        repeated = _first_repeated(parameter.name for parameter in listed)
        raise Refused(409, "Repeated name", f"parameter {repeated!r} stands twice in the list")
    _check_names("attribute", registration.attributes, limits)
    for name, value in registration.attributes.items():
        if len(value) > limits.attribute_characters:
            most = f"limits.attribute_characters ({limits.attribute_characters})"
            raise invalid(f"attributes.{name} has {len(value)} characters, more than {most}: {value[:40]!r}...")


def check_batch(batch: wire.Batch, limits: Limits) -> None:
    """Refuse a batch that breaks a setting in ``[limits]`` or whose parts contradict each other, whatever its run.

    Raises:
        Refused: 422, with the field and its value.
    """
    _check_names("id", [batch.id], limits)
    _check_counts(batch, limits)
    for index, sample in enumerate(batch.samples):
        _check_sample(f"samples[{index}]", sample)
    _check_trail(batch.trail, limits)
    _check_distinct("scalars", [batch.trail, *(sample.scalars for sample in batch.samples)], limits)
    _check_distinct("histograms", [sample.histograms for sample in batch.samples], limits)
    for event in batch.events:
        _check_names("event", [event.kind, event.parameter or ""], limits)
    if batch.end is not None:
        _check_names("end.status", [batch.end.status], limits)


def check_fit(
    batch: wire.Batch, parameter_count: int, existing_scalars: Iterable[str], limits: Limits, *, older: bool = False
) -> None:
    """Refuse a batch that does not fit its run, or brings it more different scalar names than it may have.

    Args:
        batch: a batch that has passed ``check_batch``.
        parameter_count: number of parameters of the run.
        existing_scalars: scalar names that the run has.
        limits: the limits in force.
        older: whether the batch is of an attempt before the latest, so that it may lack the run's last parameters.

    Raises:
        Refused: 422, with the field and its value, or the limit.
    """
    for index, sample in enumerate(batch.samples):
        for name, vector in sample.statistics.items():
            if vector.size > parameter_count or (vector.size < parameter_count and not older):
                raise invalid(
                    f"samples[{index}].statistics.{name} has {vector.size} values, the run has {parameter_count} "
                    "parameters: register the run again if it has gained some"
                )
        _check_unstepped(f"samples[{index}]", sample, parameter_count)
    names = {*existing_scalars, *batch.trail, *(name for sample in batch.samples for name in sample.scalars)}
    most = limits.scalar_names_per_run
    if len(names) > most:
        raise invalid(f"{len(names)} scalar names are more than limits.scalar_names_per_run allows a run ({most})")


def with_states(batch: wire.Batch) -> wire.Batch:
    """Return a batch whose gradient norms say, as they are kept, where a gradient is there that no optimizer steps."""
    if all(not sample.unstepped for sample in batch.samples):
        return batch
    return msgspec.structs.replace(batch, samples=[_with_states(sample) for sample in batch.samples])


def _with_states(sample: wire.Sample) -> wire.Sample:
    norms = sample.statistics.get("grad_norm")
    if not sample.unstepped or norms is None:
        return sample
    norms = norms.copy()
    norms[[place for place in sample.unstepped if norms[place] == wire.MISSING]] = wire.UNSTEPPED
    return msgspec.structs.replace(sample, statistics={**sample.statistics, "grad_norm": norms})


def _check_counts(document: wire.Registration | wire.Batch, limits: Limits) -> None:
    for (kind, field), limit in MOST_ENTRIES.items():
        if kind is type(document) and len(getattr(document, field)) > getattr(limits, limit):
            entries = f"{field} has {len(getattr(document, field))} entries"
            raise invalid(f"{entries}, more than limits.{limit} allows ({getattr(limits, limit)})")


def _check_sample(place: str, sample: wire.Sample) -> None:
    vectors = sample.statistics.values()
    negative = len(vectors) > 0 and bool((np.concatenate(list(vectors)) < 0).any())  # as a rule none, or the missing
    for name, vector in sample.statistics.items() if negative else ():
        below = vector[vector < 0]
        if below.size and (below != wire.MISSING).any():
            found = below[below != wire.MISSING][0]
            raise invalid(f"{place}.statistics.{name} holds {found}: a norm, share or count is never negative")
    for histogram, counts in sample.histograms.items():
        if not all(map(math.isfinite, counts)):
            raise invalid(f"{place}.histograms.{histogram} holds a count that is not finite")


def _check_unstepped(place: str, sample: wire.Sample, parameter_count: int) -> None:
    norms = sample.statistics.get("grad_norm")
    width = parameter_count if norms is None else norms.size
    beyond = [index for index in sample.unstepped or () if index >= width]
    if beyond:
        raise invalid(f"{place}.unstepped holds {beyond[0]}: the sample has {width} parameters")


def _check_trail(trail: Mapping[str, wire.Trail], limits: Limits) -> None:
    for name, scalar in trail.items():
        if len(scalar.steps) != len(scalar.values):
            raise invalid(
                f"trail.{name} has {len(scalar.steps)} steps and {len(scalar.values)} values: as many of each"
            )
    total = sum(len(scalar.steps) for scalar in trail.values())
    if total > limits.scalars_per_batch:
        raise invalid(f"{total} values of scalars are more than limits.scalars_per_batch ({limits.scalars_per_batch})")


def _check_distinct(what: str, named: Iterable[Iterable[str]], limits: Limits) -> None:
    distinct = {name for names in named for name in names}
    _check_names(what, distinct, limits)
    if len(distinct) > limits.scalar_names:
        most = f"limits.scalar_names ({limits.scalar_names})"
        raise invalid(f"{len(distinct)} names of {what} in one batch are more than {most}")


def _check_names(what: str, names: Iterable[str], limits: Limits) -> None:
    for name in names:
        if len(name) > limits.name_characters:
            raise invalid(
                f"{what} {name[:40]!r}... has {len(name)} characters, more than limits.name_characters "
                f"({limits.name_characters})"
            )


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no name is repeated")
