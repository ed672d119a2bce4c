"""What a document may hold, beyond its types: checked before anything is stored."""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from gradwatch import wire
from gradwatch_server.errors import Refused
from gradwatch_server.settings import Limits

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{2,63}")
LARGEST_STEP = 2**53
LARGEST_TIME = 1e11


def invalid(detail: str) -> Refused:
    """Return the refusal of a document whose content cannot be right."""
    return Refused(422, "Invalid content", detail)


def check_registration(registration: wire.Registration, limits: Limits) -> None:
    """Refuse a registration that breaks a limit or contradicts itself.

    Raises:
        Refused: 422, with the field and its value; 409 where two parameters have one name, which no schema can say.
    """
    if registration.id is not None and not _RUN_ID.fullmatch(registration.id):
        raise invalid(f"id {registration.id!r:.80} is not a run id: 3 to 64 letters, digits, '-' and '_'")
    if not registration.project:
        raise invalid("project is empty: name one, or leave it out for 'default'")
    _check_names("project", [registration.project], limits)
    _check_names("name", [registration.name], limits)
    _check_time("started_at", registration.started_at)
    _check_whole("attempt", registration.attempt)
    listed = registration.parameters
    if len(listed) > limits.parameters:
        raise invalid(f"{len(listed)} parameters are more than limits.parameters allows ({limits.parameters})")
    _check_names("parameter", (parameter.name for parameter in listed), limits)
    if len({parameter.name for parameter in listed}) != len(listed):
        repeated = _first_repeated(parameter.name for parameter in listed)
        raise Refused(409, "Repeated name", f"parameter {repeated!r} stands twice in the list")
    for parameter in listed:
        if parameter.units < 0 or any(extent < 0 for extent in parameter.shape) or (parameter.depth or 0) < 0:
            raise invalid(f"parameter {parameter.name!r}: shape, units and depth are not negative")
        if max([parameter.units, parameter.depth or 0, *parameter.shape]) > LARGEST_STEP:
            raise invalid(f"parameter {parameter.name!r}: shape, units or depth is larger than 2**53")
        if parameter.depth is not None and parameter.depth >= 2**31:
            raise invalid(f"parameter {parameter.name!r}: depth {parameter.depth} is larger than 2**31")
        if len(parameter.shape) > 64:
            raise invalid(f"parameter {parameter.name!r}: {len(parameter.shape)} dimensions are more than 64")
        _check_names("dtype", [parameter.dtype], limits)
        _check_names("kind", [parameter.kind], limits)
    _check_names("attribute", registration.attributes, limits)
    if len(registration.attributes) > limits.scalar_names:
        raise invalid(f"{len(registration.attributes)} attributes are more than {limits.scalar_names}")
    for name, value in registration.attributes.items():
        if len(value) > limits.attribute_characters:
            most = f"limits.attribute_characters ({limits.attribute_characters})"
            raise invalid(f"attributes.{name} has {len(value)} characters, more than {most}: {value[:40]!r}...")
    _check_text(registration.attributes.values())


def check_batch(batch: wire.Batch, limits: Limits) -> None:
    """Refuse a batch that breaks a limit, whatever its run.

    Raises:
        Refused: 422, with the field and its value.
    """
    if not batch.id:
        raise invalid("id is empty: give each batch its own")
    _check_names("id", [batch.id], limits)
    if not 0 <= batch.rank < 2**31:
        raise invalid(f"rank {batch.rank} is not between 0 and 2**31")
    _check_whole("attempt", batch.attempt)
    if len(batch.samples) > limits.samples_per_batch:
        raise invalid(
            f"{len(batch.samples)} samples are more than limits.samples_per_batch ({limits.samples_per_batch})"
        )
    for index, sample in enumerate(batch.samples):
        _check_sample(f"samples[{index}]", sample, limits)
    _check_trail(batch.trail, limits)
    _check_distinct("scalars", [batch.trail, *(sample.scalars for sample in batch.samples)], limits)
    _check_distinct("histograms", [sample.histograms for sample in batch.samples], limits)
    if len(batch.events) > limits.events_per_batch:
        raise invalid(f"{len(batch.events)} events are more than limits.events_per_batch ({limits.events_per_batch})")
    for index, event in enumerate(batch.events):
        _check_whole(f"events[{index}].step", event.step)
        _check_time(f"events[{index}].at", event.at)
        _check_names("event", [event.kind, event.parameter or ""], limits)
        _check_text([event.message])
    for name in ("samples", "bytes", "errors", "values"):
        _check_whole(f"dropped.{name}", getattr(batch.dropped, name))
    if batch.end is not None:
        _check_time("end.at", batch.end.at)
        _check_names("end.status", [batch.end.status], limits)
        if not -(2**31) <= (batch.end.exit_code or 0) < 2**31:
            raise invalid(f"end.exit_code {batch.end.exit_code} is not a 32-bit number")


def check_fit(
    batch: wire.Batch, parameter_count: int, known_scalars: Iterable[str], limits: Limits, *, older: bool = False
) -> None:
    """Refuse a batch that does not fit its run, or brings it more different scalar names than it may have.

    Args:
        batch: what ``check_batch`` has let through.
        parameter_count: of the run.
        known_scalars: names that the run has.
        limits: in force.
        older: whether it is of an attempt before the latest, from before the run gained its last parameters maybe.

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
    names = {*known_scalars, *batch.trail, *(name for sample in batch.samples for name in sample.scalars)}
    most = limits.scalar_names_per_run
    if len(names) > most:
        raise invalid(f"{len(names)} scalar names are more than limits.scalar_names_per_run allows a run ({most})")


def _check_sample(place: str, sample: wire.Sample, limits: Limits) -> None:
    _check_whole(f"{place}.step", sample.step)
    _check_time(f"{place}.at", sample.at)
    vectors = sample.statistics.values()
    negative = len(vectors) > 0 and bool((np.concatenate(list(vectors)) < 0).any())  # as a rule none, or the missing
    for name, vector in sample.statistics.items() if negative else ():
        below = vector[vector < 0]
        if below.size and (below != wire.MISSING).any():
            found = below[below != wire.MISSING][0]
            raise invalid(f"{place}.statistics.{name} holds {found}: a norm, share or count is never negative")
    _check_names("scalar", sample.scalars, limits)
    _check_names("histogram", sample.histograms, limits)
    for histogram, counts in sample.histograms.items():
        if len(counts) > 1_000 or not np.isfinite(counts).all():
            raise invalid(f"{place}.histograms.{histogram} has over 1,000 bins or a count that is not finite")


def _check_trail(trail: Mapping[str, wire.Trail], limits: Limits) -> None:
    _check_names("scalar", trail, limits)
    for name, scalar in trail.items():
        if len(scalar.steps) != len(scalar.values):
            raise invalid(
                f"trail.{name} has {len(scalar.steps)} steps and {len(scalar.values)} values: as many of each"
            )
        if scalar.steps and not 0 <= min(scalar.steps) <= max(scalar.steps) <= LARGEST_STEP:
            raise invalid(f"trail.{name}.steps are not all between 0 and 2**53")
    total = sum(len(scalar.steps) for scalar in trail.values())
    if total > limits.scalars_per_batch:
        raise invalid(f"{total} values of scalars are more than limits.scalars_per_batch ({limits.scalars_per_batch})")


def _check_distinct(what: str, named: Iterable[Iterable[str]], limits: Limits) -> None:
    count = len({name for names in named for name in names})
    if count > limits.scalar_names:
        raise invalid(f"{count} names of {what} in one batch are more than limits.scalar_names ({limits.scalar_names})")


def _check_names(what: str, names: Iterable[str], limits: Limits) -> None:
    for name in names:
        if len(name) > limits.name_characters:
            raise invalid(
                f"{what} {name[:40]!r}... has {len(name)} characters, more than limits.name_characters "
                f"({limits.name_characters})"
            )
        _check_text([name])


def _check_text(texts: Iterable[str]) -> None:
    for text in texts:
        if "\0" in text or (not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)):
            raise invalid(f"{text[:40]!r} holds a character that no database keeps (NUL or half a surrogate pair)")


def _check_whole(place: str, value: int) -> None:
    if not 0 <= value <= LARGEST_STEP:
        raise invalid(f"{place} {value} is not between 0 and 2**53")


def _check_time(place: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and 0 <= value <= LARGEST_TIME):
        raise invalid(f"{place} {value} is not a time in Unix seconds")


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no name is repeated")
