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

from gradwatch.statistics import RATIO_EPS
from gradwatch.wire import MISSING, UNSTEPPED

_ELEMENT = np.dtype([("bytes", ">i4"), ("value", ">f4")])
_HEADER = struct.Struct(">5i")
_CHUNK_BYTES = 1 << 18
_MOST_CHUNKS = 32

Rows = Sequence[NDArray[np.float32] | None] | NDArray[np.float32]
"""Vectors, None where a row has none; a matrix if all rows have one and of the same length."""
_REAL = postgres.types["float4"]


class VectorColumns(NamedTuple):
    """Stored vectors of one statistic: the steps of their rows, ascending, and the vectors of each column."""

    steps: NDArray[np.int64]
    columns: Sequence[Rows]


def ratio(grad_norm: NDArray[np.float32], weight_norm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``grad_norm / (weight_norm + eps)``; missing where either is missing."""
    with np.errstate(invalid="ignore", over="ignore"):
        divided = weight_norm + np.float32(RATIO_EPS)
        np.divide(grad_norm, divided, out=divided)
    missing = grad_norm <= MISSING
    missing |= weight_norm == MISSING
    if missing.any():
        divided[missing] = np.where(grad_norm == UNSTEPPED, np.float32(UNSTEPPED), np.float32(MISSING))[missing]
    return divided


def padded(vector: NDArray[np.float32] | None, width: int) -> NDArray[np.float32]:
    """Return a vector of this width: missing where nothing was measured, or where the run gained a parameter later."""
    whole = np.full(width, MISSING, np.float32)
    if vector is not None:
        whole[: len(vector)] = vector
    return whole


def stacked(vectors: Rows, width: int) -> NDArray[Any]:
    """Return vectors as the rows of a matrix of this width, each as ``padded`` returns it."""
    if isinstance(vectors, np.ndarray) and vectors.shape[1] == width:
        return vectors
    whole = [vector for vector in vectors if vector is not None and len(vector) == width]
    if whole and len(whole) == len(vectors):
        return np.concatenate(whole).reshape(len(whole), width)
    rows = np.full((len(vectors), width), MISSING, np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        if vector is not None:
            row[: len(vector)] = vector
    return rows


def stacked_counts(vectors: Rows, lengths: Sequence[int], width: int, only: int | None) -> NDArray[Any]:
    """Return counts that ``compact_counts`` has made as the rows of a matrix of this width.

    Args:
        vectors: the vectors as they are stored.
        lengths: how many parameters the run had when each of them was stored.
        width: width of the matrix.
        only: position of the one parameter that is read; None: all are.
    """
    if only is not None:
        vectors = [one if one is None or len(one) == 1 else one[only:][:1] for one in vectors]
    if isinstance(vectors, np.ndarray) and vectors.shape[1] == 1 and min(lengths) == width:
        return np.repeat(vectors.astype(np.int64), width, axis=1)
    rows = np.zeros((len(vectors), width), np.int64)
    for row, vector, count in zip(rows, vectors, lengths, strict=True):
        row[:count] = vector
    return rows


def compact_counts(vector: NDArray[Any]) -> NDArray[np.float32]:
    """Return a vector as it is stored: counts that are all equal become a single number."""
    if vector.dtype == np.int64 and len(vector) and (vector == vector[0]).all():
        vector = vector[:1]
    return vector.astype(np.float32, copy=False)


def select_bytes(table: sa.Table, name: str, engine: str, only: int | None = None) -> sa.ColumnElement[Any]:
    """Return the expression that selects a column of vectors as bytes, of which ``read_vectors`` decodes many at once.

    Where ``only`` names the position of a parameter, the database cuts its element out of each vector; there is none if
    the run gained the parameter later.
    """
    column: sa.ColumnElement[Any] = table.c[name]
    if only is not None:
        path = f"{table.name}.{name}"
        cut = f"{path}[{only + 1}:{only + 1}]" if engine == "postgresql" else f"substr({path}, {4 * only + 1}, 4)"
        column = sa.literal_column(cut)
    return sa.type_coerce(sa.func.gradwatch_bytes(column) if engine == "postgresql" else column, sa.types.NULLTYPE)


def chunk_count(rows: int, width: int) -> int:
    """Return the largest number of chunks that the steps of so many vectors of this width are worth dividing into."""
    return max(1, min(rows * width * 4 // _CHUNK_BYTES, _MOST_CHUNKS))


def select_vectors(
    rows: sa.Select[Any], engine: str, *, divided: sa.Select[Any] | None = None, several: bool
) -> sa.Select[Any]:
    """Return the statement by which ``read_vectors`` reads rows of a statistic, a step and vectors as bytes.

    PostgreSQL concatenates the vectors of a statistic: a row for each would cost it and the driver more than what is in
    it. So would one string of megabytes, which is copied as it grows: a long range is divided into chunks of steps,
    each with a string of its own. Within a chunk the vectors come as they lie there, not always by ascending steps.

    Args:
        rows: select of these columns, by ascending steps.
        engine: name of the dialect.
        divided: selects the first step and the step after the last one, if the range is divided into chunks: as many as
            the parameter ``chunks`` says.
        several: whether they are of more than one statistic.
    """
    if engine != "postgresql":
        return rows
    rows = rows.order_by(None).offset(sa.literal_column("0"))  # so that each selected expression is computed once
    if divided is None:
        return _concatenated(rows.subquery(), several=several)
    count: sa.BindParameter[int] = sa.bindparam("chunks", type_=sa.BigInteger)
    numbers = sa.func.generate_series(sa.literal_column("0"), count - 1)
    chunk = numbers.table_valued("number", name="chunk").render_derived()
    span = divided.cte("span")
    first, end = span.c
    begin, until = (first + (end - first) * number // count for number in (chunk.c.number, chunk.c.number + 1))
    step = rows.selected_columns[1]
    mine = rows.where(step >= begin, step < until).correlate(span, chunk)
    strings = _concatenated(mine.subquery(), several=several).lateral("strings")
    joined = span.join(chunk, sa.true()).join(strings, sa.true())
    return sa.select(strings).select_from(joined).where(strings.c.steps.is_not(None))


def _concatenated(rows: sa.Subquery, *, several: bool) -> sa.Select[Any]:
    """Select the steps of rows in one string, and the lengths and the bytes of each column of vectors in two others."""
    statistic, step, *vectors = rows.c

    def concatenated(part: sa.ColumnElement[Any], label: str) -> sa.Label[Any]:
        return sa.func.string_agg(part, sa.literal_column("''::bytea"), type_=sa.types.NULLTYPE).label(label)

    parts = [concatenated(sa.func.int8send(step), "steps")]
    for place, vector in enumerate(vectors):
        lengths = sa.func.int4send(sa.func.coalesce(sa.func.octet_length(vector), -1))
        parts += [concatenated(lengths, f"lengths_{place}"), concatenated(vector, f"vectors_{place}")]
    if several:
        return sa.select(statistic, *parts).group_by(statistic)
    return sa.select(sa.func.min(statistic), *parts).having(sa.func.count() > 0)


def read_vectors(
    connection: sa.Connection, statement: sa.Select[Any], parameters: Mapping[str, Any]
) -> dict[str, VectorColumns]:
    """Return statistic -> the vectors that a statement of ``select_vectors`` finds."""
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
        steps, *encoded = (column[first : first + statistics.count(statistic)] for column in columns)
        found[statistic] = VectorColumns(np.array(steps, np.int64), [_of_column(column) for column in encoded])
    return found


def _of_strings(strings: Sequence[Sequence[bytes | None]]) -> VectorColumns:
    """Return the vectors of strings as ``_concatenated`` selects them, one tuple of strings a chunk."""
    steps, *parts = (b"".join(part or b"" for part in column) for column in zip(*strings, strict=True))
    found = np.frombuffer(steps, ">i8").astype(np.int64)
    columns: list[Rows] = [
        _split(vectors, np.frombuffer(lengths, ">i4"), _HEADER.size)
        for lengths, vectors in zip(parts[::2], parts[1::2], strict=True)
    ]
    if (found[1:] > found[:-1]).all():
        return VectorColumns(found, columns)
    order = found.argsort()
    ordered = [rows[order] if isinstance(rows, np.ndarray) else [rows[place] for place in order] for rows in columns]
    return VectorColumns(found[order], ordered)


def _of_column(column: Sequence[bytes | None]) -> Rows:
    """Return the vectors of a column of SQLite."""
    lengths = np.array([-1 if data is None else len(data) for data in column], np.int64)
    return _split(b"".join(data for data in column if data is not None), lengths, 0)


def _split(string: bytes, lengths: NDArray[np.integer[Any]], header: int) -> Rows:
    """Split concatenated vectors: return a list with None for each length of -1, or a matrix for equal lengths."""
    if len(lengths) and lengths[0] > header and (lengths == lengths[0]).all():
        rows = np.frombuffer(string, np.uint8).reshape(len(lengths), -1)[:, header:]
        if not header or string[0]:
            return rows.view("<f4")
        return np.ascontiguousarray(rows).view(_ELEMENT)["value"].astype(np.float32)
    ends = np.maximum(lengths, 0).cumsum().tolist()
    pieces = [string[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
    decode = _of_array if header else _of_bytes
    return [None if length < 0 else decode(piece) for piece, length in zip(pieces, lengths.tolist(), strict=True)]


def _of_bytes(data: abc.Buffer) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4")


def _of_array(data: abc.Buffer) -> NDArray[np.float32]:
    """Return the vector of a PostgreSQL array, either as it is sent or as it lies in memory, which begins with a 1."""
    if len(data) < _HEADER.size:
        return np.empty(0, np.float32)
    if data[0]:
        return np.frombuffer(data, "<f4", offset=_HEADER.size)
    return np.frombuffer(data, _ELEMENT, offset=_HEADER.size)["value"].astype(np.float32)


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
    """Reads what ``_VectorDumper`` writes; NULL elements do not occur."""

    format = pq.Format.BINARY

    def load(self, data: abc.Buffer) -> NDArray[np.float32]:
        return _of_array(data)


class _BinaryCursor(psycopg.Cursor[Any]):
    """A cursor that asks for results in binary form."""

    def __init__(self, connection: psycopg.Connection[Any], **options: Any) -> None:
        super().__init__(connection, **options)
        self.format = pq.Format.BINARY


def register_vectors(connection: psycopg.Connection[Any]) -> None:
    """Make a connection write and read float32 vectors."""
    connection.cursor_factory = _BinaryCursor
    connection.adapters.register_dumper(np.ndarray, _VectorDumper)
    connection.adapters.register_loader(_REAL.array_oid, _VectorLoader)
