"""JSON responses full of numbers: half a million of them are encoded in a few milliseconds."""

import time
from typing import Any

import numpy as np
import orjson
from fastapi import Response
from numpy.typing import NDArray

from gradwatch import wire

_VALUES_AT_ONCE = 20_000
"""Values of a matrix that are encoded at once: a millisecond or two."""


def json_response(content: dict[str, Any]) -> Response:
    """Return a response whose vectors and matrices may be arrays; a float32 is written in the digits that it has."""
    members = (orjson.dumps(name) + b":" + _encode(value) for name, value in content.items())
    return Response(b"{" + b",".join(members) + b"}", media_type=wire.JSON_TYPE)


def _encode(value: Any) -> bytes:
    """Encode a value; a matrix in pieces, between which others run: while orjson encodes, no other thread does."""
    if not isinstance(value, list | np.ndarray) or not len(value) or not isinstance(value[0], list | np.ndarray):
        return _dump(value)
    at_once = max(1, _VALUES_AT_ONCE // max(1, len(value[0])))
    pieces = []
    for first in range(0, len(value), at_once):
        pieces.append(_dump(value[first : first + at_once])[1:-1])
        time.sleep(0)
    return b"[" + b",".join(pieces) + b"]"


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def serialise(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]] | list[Any]:
    """Return a vector or matrix of statistics as JSON carries it: null where missing, text where not finite."""
    rows_with_nonfinite = ~np.isfinite(values).all(axis=-1)
    clean = np.ascontiguousarray(np.where(values <= wire.MISSING, np.nan, values))  # orjson writes NaN as null
    if not rows_with_nonfinite.any():
        return clean
    if values.ndim == 1:
        return _serialise_row(values)
    rows = zip(values, clean, rows_with_nonfinite, strict=True)
    return [_serialise_row(row) if nonfinite else clean_row for row, clean_row, nonfinite in rows]


def _serialise_row(row: NDArray[np.floating[Any]]) -> list[Any]:
    listed: list[Any] = list(row)
    for place in np.flatnonzero(~np.isfinite(row) | (row <= wire.MISSING)):
        listed[place] = None if row[place] <= wire.MISSING else wire.serialise(float(row[place]))
    return listed
