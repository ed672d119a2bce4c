"""The body of a request: bounded before and after decompression, then decoded."""

import asyncio
import io
import re
import zlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
import zstandard
from fastapi import Request

from gradwatch import wire
from gradwatch_server.errors import Refused, RetryAfter
from gradwatch_server.ingest.admission import Reservation
from gradwatch_server.ingest.validation import beyond_bounds
from gradwatch_server.settings import Limits

Document = TypeVar("Document", wire.Registration, wire.Batch)

CONTENT_TYPES = {
    wire.JSON_TYPE: wire.JSON_TYPE,
    wire.MESSAGEPACK_TYPE: wire.MESSAGEPACK_TYPE,
    "application/msgpack": wire.MESSAGEPACK_TYPE,
    "application/x-msgpack": wire.MESSAGEPACK_TYPE,
}
_LARGEST_WINDOW_BYTES = 8 * 1024 * 1024
"""Of a zstd frame, as RFC 9659 has it: what a decoder has to hold beside the content."""
_INLINE_BYTES = 512 * 1024
"""Larger documents are unpacked and decoded in a thread: the event loop goes on."""


async def read(request: Request, document: type[Document], limits: Limits, reservation: Reservation) -> Document:
    """Return the document that the request carries.

    Raises:
        Refused: 408 where it does not arrive, 413 over a size limit, 415 for a type or encoding that is not spoken
            here, 400 where it is malformed, 503 where the server has no room for it now.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content_type = CONTENT_TYPES.get(given)
    if content_type is None:
        spoken = f"send {wire.JSON_TYPE} or {wire.MESSAGEPACK_TYPE}"
        raise Refused(415, "Unsupported media type", f"content type {given!r} is not spoken here: {spoken}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _UNPACKERS:
        detail = f"content encoding {encoding!r:.80} is not spoken here: gzip, zstd or none, and one of them only"
        raise Refused(415, "Unsupported encoding", detail)
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _bounded(request, limits.body_bytes, reservation)
    except TimeoutError:
        detail = f"the body did not arrive within limits.body_seconds ({limits.body_seconds:g} s): send it again"
        raise Refused(408, "Body too slow", detail, retry_after=RetryAfter.SOON) from None
    if encoding != "identity":
        async with reservation.budget.decompressing:
            body = await asyncio.to_thread(_UNPACKERS[encoding], body, limits.decoded_bytes)
        reservation.grow(len(body))
    loose: dict[type, int] = {wire.Batch: limits.loose_bytes, wire.Registration: limits.decoded_bytes}
    if len(body) <= _INLINE_BYTES:
        return _decode(body, document, content_type, loose[document])
    return await asyncio.to_thread(_decode, body, document, content_type, loose[document])


async def _bounded(request: Request, most: int, reservation: Reservation) -> bytes:
    too_large = Refused(
        413, "Body too large", f"the body is larger than limits.body_bytes allows ({most} bytes): send smaller batches"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
        reservation.grow(len(body))
    return bytes(body)


def _gunzip(body: bytes, most: int) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        content = inflater.decompress(body, most + 1)
    except zlib.error as error:
        raise Refused(400, "Malformed document", f"the body is not gzip: {error}") from None
    _check_unpacked(len(content), most)
    if not inflater.eof or inflater.unused_data:
        raise Refused(400, "Malformed document", "the gzip stream is cut off or followed by something else")
    return content


_END = b"the body is whole"
_END_FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(_END)
"""Put behind a body in zstd: its content comes out only where every frame before it is whole, for the reader does not
tell. A frame that is cut off takes it for its own rest; its checksum is last, so that this never ends with ``_END``."""


def _unpack_zstd(body: bytes, most: int) -> bytes:
    """Return the content of one frame or several; what a frame declares of itself is not believed."""
    unpacker = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
    content = bytearray()
    source, most_read = io.BytesIO(body + _END_FRAME), most + len(_END)
    try:
        with unpacker.stream_reader(source, read_across_frames=True) as reader:
            while len(content) <= most_read and (piece := reader.read(_INLINE_BYTES)):
                content += piece
    except zstandard.ZstdError as error:
        raise Refused(400, "Malformed document", f"the body is not zstd, or cut off: {error}") from None
    _check_unpacked(len(content) - len(_END), most)
    if not content.endswith(_END):
        raise Refused(400, "Malformed document", "the zstd stream is cut off")
    return bytes(content[: -len(_END)])


_UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {"gzip": _gunzip, "zstd": _unpack_zstd}


def _check_unpacked(size: int, most: int) -> None:
    if size > most:
        detail = f"the body unpacks to more than limits.decoded_bytes allows ({most} bytes): send smaller batches"
        raise Refused(413, "Body too large", detail)


class _Vectors(msgspec.Struct):
    statistics: Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=len(wire.STATISTICS))] = {}


class _Outline(msgspec.Struct):
    """Where in a batch the packed vectors are; everything else is skipped."""

    samples: Annotated[list[_Vectors], msgspec.Meta(max_length=wire.MOST_SAMPLES)] = []


_outline = msgspec.msgpack.Decoder(_Outline)
_PACKED = (0xC4, 0xC5, 0xC6)
"""First byte of MessagePack's binary data."""


_UNDECODABLE = (wire.WireError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_INTEGER_EXPECTED = re.compile("Expected `int.*`, got `float`")


def _decode(body: bytes, document: type[Document], content_type: str, most: int) -> Document:
    try:
        packed = _packed_bytes(body) if content_type == wire.MESSAGEPACK_TYPE else 0
        _check_loose(len(body) - packed, most)
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
        if content_type != wire.JSON_TYPE or not _INTEGER_EXPECTED.search(str(error)):
            raise
    return wire.decode(msgspec.json.encode(_with_integers(msgspec.json.decode(body))), document, content_type)


def _beyond_bounds(fault: wire.BoundsError, body: bytes, content_type: str) -> Refused:
    """Return the refusal of a value beyond its bounds, or of what is malformed behind that value."""
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
    """Return how much of a document is packed vectors: all else becomes objects of many times its size."""
    vectors = [memoryview(raw) for sample in _outline.decode(body).samples for raw in sample.statistics.values()]
    return sum(len(vector) for vector in vectors if vector[0] in _PACKED)
