"""JSON responses full of numbers: half a million of them are encoded in a few milliseconds."""

from typing import Any

import numpy as np
import orjson
from fastapi import Response
from numpy.typing import NDArray

from gradwatch import wire


def json_response(content: dict[str, Any]) -> Response:
    """Return a response whose vectors and matrices may be arrays; a float32 is written in the digits that it has."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=wire.JSON_TYPE)


def serialise(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]] | list[Any]:
    """Return a vector or matrix of statistics as JSON carries it: null where missing, text where not finite."""
    rows_with_nonfinite = ~np.isfinite(values).all(axis=-1)
    clean = np.ascontiguousarray(np.where(values == wire.MISSING, np.nan, values))  # orjson writes NaN as null
    if not rows_with_nonfinite.any():
        return clean
    if values.ndim == 1:
        return _serialise_row(values)
    rows = zip(values, clean, rows_with_nonfinite, strict=True)
    return [_serialise_row(row) if nonfinite else clean_row for row, clean_row, nonfinite in rows]


def _serialise_row(row: NDArray[np.floating[Any]]) -> list[Any]:
    listed: list[Any] = list(row)
    for place in np.flatnonzero(~np.isfinite(row) | (row == wire.MISSING)):
        listed[place] = None if row[place] == wire.MISSING else wire.serialise(float(row[place]))
    return listed
