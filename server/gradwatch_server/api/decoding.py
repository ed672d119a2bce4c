"""Decoding of the documents of agents, with a bound for the memory that it takes.

A byte of MessagePack or JSON can become an object of 70 bytes and more. So whatever becomes many objects is counted
before it is decoded: the entries of a registration, and what of a batch is not packed into vectors.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec

from gradwatch import wire
from gradwatch_server.errors import Refused
from gradwatch_server.ingest.validation import beyond_bounds, invalid
from gradwatch_server.settings import Limits

Document = TypeVar("Document", wire.Registration, wire.Batch)

INLINE_BYTES = 512 * 1024
"""Larger bodies are decoded in a thread, so that the event loop goes on, and only smaller ones without types."""
_MOST_OTHER_BYTES = 1024 * 1024
"""Of a registration in MessagePack, besides its parameters and attributes."""
_COMMAS_PER_PARAMETER = 12
"""In JSON, with all fields and four dimensions."""


class _Vectors(msgspec.Struct):
    """The packed vectors of a sample."""

    statistics: Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=len(wire.STATISTICS))] = {}


class _Outline(msgspec.Struct):
    """The packed vectors of a batch; decoding skips everything else."""

    samples: Annotated[list[_Vectors], msgspec.Meta(max_length=wire.MOST_SAMPLES)] = []


_outline = msgspec.msgpack.Decoder(_Outline)
_BINARY_TAGS = (0xC4, 0xC5, 0xC6)
"""First byte of MessagePack's binary data."""
_UNDECODABLE = (wire.WireError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_INTEGER_EXPECTED = re.compile("Expected `int.*`, got `float`")


def decode(body: bytes, document: type[Document], content_type: str, limits: Limits) -> Document:
    """Return the document that a body holds.

    Raises:
        Refused: 400 if it is malformed, 413 if it would take too much memory, 422 if a value is beyond its bounds.
    """
    try:
        if document is wire.Batch:
            loose = len(body) - (_packed_bytes(body) if content_type == wire.MESSAGEPACK_TYPE else 0)
            _check_loose(loose, limits.loose_bytes)
        elif content_type == wire.MESSAGEPACK_TYPE:
            _check_entries(body, limits)
        else:
            _check_commas(body, limits)
        return _decode_numbers(body, document, content_type)
    except wire.BoundsError as fault:
        raise _beyond_bounds(fault, body, content_type) from None
    except _UNDECODABLE as error:
        raise Refused(400, "Malformed document", str(error)) from None


def _decode_numbers(body: bytes, document: type[Document], content_type: str) -> Document:
    """Return the document; in JSON, 2.0 is the integer 2, as JSON Schema has it."""
    try:
        return wire.decode(body, document, content_type)
    except wire.WireError as error:
        if content_type != wire.JSON_TYPE or not _INTEGER_EXPECTED.search(str(error)) or len(body) > INLINE_BYTES:
            raise
    return wire.decode(msgspec.json.encode(_with_integers(msgspec.json.decode(body))), document, content_type)


def _beyond_bounds(fault: wire.BoundsError, body: bytes, content_type: str) -> Refused:
    """Return the refusal of a value beyond its bounds, or of malformed content after that value."""
    if len(body) > INLINE_BYTES:
        return beyond_bounds(fault, None)
    try:
        content = msgspec.json.decode(body) if content_type == wire.JSON_TYPE else msgspec.msgpack.decode(body)
    except _UNDECODABLE as error:
        return Refused(400, "Malformed document", str(error))
    return beyond_bounds(fault, content)


def _with_integers(value: Any) -> Any:
    """Return a document in which every float without a fraction is an int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    return [_with_integers(item) for item in value] if isinstance(value, list) else value


def _check_loose(size: int, most: int) -> None:
    if size > most:
        detail = f"{size} bytes that are not packed vectors are more than limits.loose_bytes allows ({most})"
        raise Refused(413, "Body too large", f"{detail}: send smaller batches, or MessagePack instead of JSON")


def _packed_bytes(body: bytes) -> int:
    """Return how many bytes of a batch are packed vectors: all others become objects of many times their size.

    Those of a vector that is not packed are subtracted: what its list may hold takes twice as much as anything else.
    """
    vectors = [memoryview(raw) for sample in _outline.decode(body).samples for raw in sample.statistics.values()]
    return sum(len(vector) if vector[0] in _BINARY_TAGS else -len(vector) for vector in vectors)


class _Entries(msgspec.Struct):
    """The parts of a registration that may have many entries; decoding skips everything."""

    parameters: msgspec.Raw = msgspec.Raw(b"")
    attributes: msgspec.Raw = msgspec.Raw(b"")


_entries = msgspec.msgpack.Decoder(_Entries)


def _check_entries(body: bytes, limits: Limits) -> None:
    """Refuse a registration in MessagePack with too many entries; a field that stands twice counts as one unknown."""
    found = _entries.decode(body)
    for name, limit in (("parameters", "parameters"), ("attributes", "scalar_names")):
        count, most = _entry_count(bytes(memoryview(getattr(found, name))[:5])), getattr(limits, limit)
        if count > most:
            raise invalid(f"{name} has {count} entries, more than limits.{limit} allows ({most})")
    other = len(body) - len(memoryview(found.parameters)) - len(memoryview(found.attributes))
    if other > _MOST_OTHER_BYTES:
        detail = f"{other} bytes besides parameters and attributes are more than {_MOST_OTHER_BYTES}"
        raise Refused(413, "Body too large", detail)


def _entry_count(header: bytes) -> int:
    """Return the number of entries of an array or a map in MessagePack by its first bytes."""
    tag = header[0] if header else 0xC0
    if 0x80 <= tag <= 0x9F:
        return tag & 0x0F
    width = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}.get(tag, 0)
    return int.from_bytes(header[1 : 1 + width], "big")


def _check_commas(body: bytes, limits: Limits) -> None:
    """Refuse a registration in JSON with too many entries, which are counted by their commas."""
    most = _COMMAS_PER_PARAMETER * limits.parameters + 2 * limits.scalar_names + INLINE_BYTES // 10
    if body.count(b",") > most:
        detail = f"it has more entries than limits.parameters ({limits.parameters}) parameters need: send MessagePack"
        raise Refused(413, "Body too large", detail)
