"""Float32 vectors to and from the database, in its binary form and without a Python float in between.

SQLite holds them as little-endian bytes, PostgreSQL as ``real[]``.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import psycopg
import sqlalchemy as sa
from numpy.typing import NDArray
from psycopg import abc, adapt, postgres, pq

from gradwatch.wire import MISSING

_ELEMENT = np.dtype([("bytes", ">i4"), ("value", ">f4")])
_HEADER = struct.Struct(">5i")
_STRING_BYTES = 1 << 18
_MOST_STRETCHES = 32

Rows = Sequence[NDArray[np.float32] | None] | NDArray[np.float32]
"""Vectors, none where there is none; a matrix where all are there and of one length."""
_REAL = postgres.types["float4"]


class _VectorDumper(adapt.Dumper):
    """Writes: dimensions, whether there are NULLs, type of an element, length, lower bound, then every element."""

    format = pq.Format.BINARY
    oid = _REAL.array_oid

    def dump(self, obj: NDArray[np.float32]) -> bytes:
        if not obj.size:
            return struct.pack(">3i", 0, 0, _REAL.oid)
        elements = np.empty(obj.size, _ELEMENT)
        elements["bytes"] = 4
        elements["value"] = obj
        return _HEADER.pack(1, 0, _REAL.oid, obj.size, 1) + elements.tobytes()


class _VectorLoader(adapt.Loader):
    """Reads what ``_VectorDumper`` writes; SQL's NULL elements do not occur."""

    format = pq.Format.BINARY

    def load(self, data: abc.Buffer) -> NDArray[np.float32]:
        return _of_array(data)


def _of_array(data: abc.Buffer) -> NDArray[np.float32]:
    """Return the vector of an array as PostgreSQL sends it, or as it holds it in memory: that begins with a 1."""
    if len(data) < _HEADER.size:
        return np.empty(0, np.float32)
    if data[0]:
        return np.frombuffer(data, "<f4", offset=_HEADER.size)
    return np.frombuffer(data, _ELEMENT, offset=_HEADER.size)["value"].astype(np.float32)


class Gathered(NamedTuple):
    """What a ``read`` found of one statistic: the steps of its rows, ascending, and each column's vectors."""

    steps: NDArray[np.int64]
    columns: Sequence[Rows]


def padded(vector: NDArray[np.float32] | None, width: int) -> NDArray[np.float32]:
    """Return a vector of this width: missing where nothing was measured, or where the run gained a parameter later."""
    whole = np.full(width, MISSING, np.float32)
    if vector is not None:
        whole[: len(vector)] = vector
    return whole


def raw(vector: sa.ColumnElement[Any], engine: str) -> sa.ColumnElement[Any]:
    """Return what selects a vector as bytes, for ``read``: thousands of them are decoded at once."""
    return sa.type_coerce(sa.func.gradwatch_bytes(vector) if engine == "postgresql" else vector, sa.types.NULLTYPE)


def gathered(
    rows: sa.Select[Any], engine: str, *, divided: sa.Select[Any] | None = None, several: bool
) -> sa.Select[Any]:
    """Return what ``read`` executes of a select of statistics, steps and raw vectors, in this order.

    PostgreSQL strings the vectors of a statistic together: a row for each would cost it and the driver more than what
    is in it. So would one string of megabytes, which is copied as it grows: a long range is divided into stretches of
    steps, each with a string of its own. Within one the vectors come as they lie there, which need not be in the order
    of the steps.

    Args:
        rows: in the order of the steps.
        engine: name of the dialect.
        divided: selects the step at which they begin, and the one by which they have ended, where there are to be
            several stretches: as many as the parameter of this name says.
        several: whether they are of more than one statistic.
    """
    if engine != "postgresql":
        return rows
    rows = rows.order_by(None).offset(sa.literal_column("0"))  # so that what it selects is computed once
    if divided is None:
        return _strung(rows.subquery(), several=several)
    count: sa.BindParameter[int] = sa.bindparam("stretches", type_=sa.BigInteger)
    numbers = sa.func.generate_series(sa.literal_column("0"), count - 1)
    stretch = numbers.table_valued("number", name="stretch").render_derived()
    span = divided.cte("span")
    first, end = span.c
    begin, until = (first + (end - first) * number // count for number in (stretch.c.number, stretch.c.number + 1))
    step = rows.selected_columns[1]
    mine = rows.where(step >= begin, step < until).correlate(span, stretch)
    strings = _strung(mine.subquery(), several=several).lateral("strings")
    joined = span.join(stretch, sa.true()).join(strings, sa.true())
    return sa.select(strings).select_from(joined).where(strings.c.steps.is_not(None))


def _strung(rows: sa.Subquery, *, several: bool) -> sa.Select[Any]:
    statistic, step, *vectors = rows.c

    def strung(part: sa.ColumnElement[Any], label: str) -> sa.Label[Any]:
        return sa.func.string_agg(part, sa.literal_column("''::bytea"), type_=sa.types.NULLTYPE).label(label)

    parts = [strung(sa.func.int8send(step), "steps")]
    for place, vector in enumerate(vectors):
        lengths = sa.func.int4send(sa.func.coalesce(sa.func.octet_length(vector), -1))
        parts += [strung(lengths, f"lengths_{place}"), strung(vector, f"vectors_{place}")]
    if several:
        return sa.select(statistic, *parts).group_by(statistic)
    return sa.select(sa.func.min(statistic), *parts).having(sa.func.count() > 0)


def stretches(rows: int, width: int) -> int:
    """Return into how many stretches the steps of as many vectors of this width are best divided, at most."""
    return max(1, min(rows * width * 4 // _STRING_BYTES, _MOST_STRETCHES))


def read(connection: sa.Connection, statement: sa.Select[Any], parameters: Mapping[str, Any]) -> dict[str, Gathered]:
    """Return the vectors that a ``gathered`` select finds, by statistic."""
    rows = connection.execute(statement, parameters).all()
    if connection.dialect.name == "postgresql":
        strings: dict[str, list[Sequence[bytes | None]]] = {}
        for row in rows:
            strings.setdefault(row[0], []).append(row[1:])
        return {statistic: _of_strings(mine) for statistic, mine in strings.items()}
    if not rows:
        return {}
    statistics, *columns = zip(*rows, strict=True)
    found = {}
    for statistic in dict.fromkeys(statistics):
        first = statistics.index(statistic)
        steps, *packed = (column[first : first + statistics.count(statistic)] for column in columns)
        found[statistic] = Gathered(np.array(steps, np.int64), [_unpacked(column) for column in packed])
    return found


def _of_strings(strings: Sequence[Sequence[bytes | None]]) -> Gathered:
    """Return the vectors of strings, each of which is steps, then lengths and bytes of each column in turn."""
    steps, *parts = (b"".join(part or b"" for part in column) for column in zip(*strings, strict=True))
    found = np.frombuffer(steps, ">i8").astype(np.int64)
    columns: list[Rows] = [
        _split(vectors, np.frombuffer(lengths, ">i4"), _HEADER.size)
        for lengths, vectors in zip(parts[::2], parts[1::2], strict=True)
    ]
    if (found[1:] > found[:-1]).all():
        return Gathered(found, columns)
    order = found.argsort()
    ordered = [rows[order] if isinstance(rows, np.ndarray) else [rows[place] for place in order] for rows in columns]
    return Gathered(found[order], ordered)


def _unpacked(packed: Sequence[bytes | None]) -> Rows:
    lengths = np.array([-1 if data is None else len(data) for data in packed], np.int64)
    return _split(b"".join(data for data in packed if data is not None), lengths, 0)


def _split(strung: bytes, lengths: NDArray[np.integer[Any]], header: int) -> Rows:
    """Return the vectors that lie one after the other, none where a length is -1; of one length: as a matrix."""
    if len(lengths) and lengths[0] > header and (lengths == lengths[0]).all():
        rows = np.frombuffer(strung, np.uint8).reshape(len(lengths), -1)[:, header:]
        if not header or strung[0]:
            return rows.view("<f4")
        return np.ascontiguousarray(rows).view(_ELEMENT)["value"].astype(np.float32)
    ends = np.maximum(lengths, 0).cumsum().tolist()
    pieces = [strung[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
    decoded = _of_array if header else _of_bytes
    return [None if length < 0 else decoded(piece) for piece, length in zip(pieces, lengths.tolist(), strict=True)]


def _of_bytes(data: abc.Buffer) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4")


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
