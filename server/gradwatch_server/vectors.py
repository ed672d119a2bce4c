"""Float32 vectors to and from the database, in its binary form and without a Python float in between.

SQLite holds them as little-endian bytes, PostgreSQL as ``real[]``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import psycopg
import sqlalchemy as sa
from numpy.typing import NDArray
from psycopg import abc, adapt, postgres, pq

_ELEMENT = np.dtype([("bytes", ">i4"), ("value", ">f4")])
_HEADER = np.dtype(">i4")
_HEADER_BYTES = 20

Rows = Sequence[NDArray[np.float32] | None] | NDArray[np.float32]
"""Vectors, none where there is none; a matrix where all are there and of one length."""
_REAL = postgres.types["float4"]


class _VectorDumper(adapt.Dumper):
    """Writes: dimensions, whether there are NULLs, type of an element, length, lower bound, then every element."""

    format = pq.Format.BINARY
    oid = _REAL.array_oid

    def dump(self, obj: NDArray[np.float32]) -> bytes:
        if not obj.size:
            return np.array([0, 0, _REAL.oid], _HEADER).tobytes()
        elements = np.empty(obj.size, _ELEMENT)
        elements["bytes"] = 4
        elements["value"] = obj
        return np.array([1, 0, _REAL.oid, obj.size, 1], _HEADER).tobytes() + elements.tobytes()


class _VectorLoader(adapt.Loader):
    """Reads what ``_VectorDumper`` writes; SQL's NULL elements do not occur."""

    format = pq.Format.BINARY

    def load(self, data: abc.Buffer) -> NDArray[np.float32]:
        return _of_array(data)


def _of_array(data: abc.Buffer) -> NDArray[np.float32]:
    """Return the vector of an array as PostgreSQL sends it, or as it holds it in memory: that begins with a 1."""
    if len(data) < _HEADER_BYTES:
        return np.empty(0, np.float32)
    if data[0]:
        return np.frombuffer(data, "<f4", offset=_HEADER_BYTES)
    return np.frombuffer(data, _ELEMENT, offset=_HEADER_BYTES)["value"].astype(np.float32)


def raw(vector: sa.ColumnElement[Any], engine: str) -> sa.ColumnElement[Any]:
    """Return what selects a vector as bytes, for ``unpack``: thousands of them are decoded at once."""
    return sa.type_coerce(sa.func.gradwatch_bytes(vector) if engine == "postgresql" else vector, sa.types.NULLTYPE)


def unpack(packed: Sequence[bytes | None], engine: str) -> Rows:
    """Return the vectors that ``raw`` selected; where all are of one length, they are the rows of a matrix."""
    header = _HEADER_BYTES if engine == "postgresql" else 0
    lengths = {-1 if data is None else len(data) for data in packed}
    if len(lengths) == 1 and min(lengths) > header:
        joined = np.frombuffer(b"".join(data for data in packed if data is not None), np.uint8)
        rows = joined.reshape(len(packed), -1)[:, header:]
        if not header or joined[0]:
            return rows.view("<f4")
        return np.ascontiguousarray(rows).view(_ELEMENT)["value"].astype(np.float32)
    return [None if data is None else _of_array(data) if header else np.frombuffer(data, "<f4") for data in packed]


class BinaryCursor(psycopg.Cursor[Any]):
    """A cursor that asks for results in binary form."""

    def __init__(self, connection: psycopg.Connection[Any], **options: Any) -> None:
        super().__init__(connection, **options)
        self.format = pq.Format.BINARY


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make a connection write and read float32 vectors."""
    connection.cursor_factory = BinaryCursor
    connection.adapters.register_dumper(np.ndarray, _VectorDumper)
    connection.adapters.register_loader(_REAL.array_oid, _VectorLoader)
