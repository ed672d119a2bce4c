"""Answers full of numbers: half a million of them become JSON in a few milliseconds."""

from typing import Any

import numpy as np
import orjson
from fastapi import Response
from numpy.typing import NDArray

from gradwatch import wire


def answer(content: dict[str, Any]) -> Response:
    """Return a document whose vectors and matrices may be arrays; float32 are told in the digits that they have."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=wire.JSON_TYPE)


def spelled(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]] | list[Any]:
    """Return a vector or matrix of statistics as JSON carries it: null where missing, spelled where not finite."""
    odd = ~np.isfinite(values).all(axis=-1)
    told = np.ascontiguousarray(np.where(values == wire.MISSING, np.nan, values))  # in an array, NaN is told as null
    if not odd.any():
        return told
    if values.ndim == 1:
        return _spelled_row(values)
    return [_spelled_row(row) if strange else clean for row, clean, strange in zip(values, told, odd, strict=True)]


def _spelled_row(row: NDArray[np.floating[Any]]) -> list[Any]:
    listed: list[Any] = list(row)
    for place in np.flatnonzero(~np.isfinite(row) | (row == wire.MISSING)):
        listed[place] = None if row[place] == wire.MISSING else wire.spell(float(row[place]))
    return listed
