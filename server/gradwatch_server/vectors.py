"""Float32 vectors to and from PostgreSQL's ``real[]``, in its binary form and without a Python float in between."""

from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import abc, adapt, postgres, pq

_ELEMENT = np.dtype([("bytes", ">i4"), ("value", ">f4")])
_HEADER = np.dtype(">i4")
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
        if len(data) < 20:
            return np.empty(0, np.float32)
        return np.frombuffer(data, _ELEMENT, offset=20)["value"].astype(np.float32)


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
