"""Encodes requests of Prometheus remote write 1.0: protobuf messages in snappy's block format.

Only a small and simple part of both formats is needed, so the server needs no package for them.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

HEADERS: Mapping[str, str] = {
    "content-type": "application/x-protobuf",
    "content-encoding": "snappy",
    "x-prometheus-remote-write-version": "0.1.0",
}
_NAN = struct.pack("<Q", 0x7FF8000000000001)
"""The NaN that stands for every NaN: the bit pattern 0x7ff0000000000002 would mean that a series has ended."""
_LONGEST_LITERAL = 65536


class Series(NamedTuple):
    """The points of one series, in the order of their times."""

    labels: tuple[tuple[str, str], ...]
    """Sorted by name, ``__name__`` among them."""
    points: Sequence[tuple[int, float]]
    """Unix milliseconds and value."""


def encode(series: Iterable[Series]) -> bytes:
    """Return the body of a write request."""
    return _compress(b"".join(_field(1, _series(one)) for one in series))


def _series(series: Series) -> bytes:
    labels = (_field(1, _field(1, name.encode()) + _field(2, value.encode())) for name, value in series.labels)
    points = (_field(2, b"\x09" + _double(value) + b"\x10" + _varint(at)) for at, value in series.points)
    return b"".join((*labels, *points))


def _double(value: float) -> bytes:
    return _NAN if math.isnan(value) else struct.pack("<d", value)


def _field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field."""
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _compress(content: bytes) -> bytes:
    """Return snappy's block format with literals only: valid, though not smaller than the content."""
    blocks = [_varint(len(content))]
    for start in range(0, len(content), _LONGEST_LITERAL):
        literal = content[start : start + _LONGEST_LITERAL]
        blocks += [b"\xf4", struct.pack("<H", len(literal) - 1), literal]
    return b"".join(blocks)
