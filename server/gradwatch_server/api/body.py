"""Request bodies of agents: read with a size limit, decompressed with another one, and decoded."""

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
"""Of a zstd frame, as RFC 9659 recommends: a decoder holds the window in memory beside the content."""
_INLINE_BYTES = 512 * 1024
"""Larger bodies are decoded in a thread, so that the event loop goes on."""
_UNCOMPRESSED = "identity"


async def read(request: Request, document: type[Document], limits: Limits, reservation: Reservation) -> Document:
    """Return the document in a request's body.

    Args:
        request: its body has not been read.
        document: the type that is expected.
        limits: the limits in force.
        reservation: grows with the memory that the body takes.

    Raises:
        Refused: 400 if the body is malformed, 408 if it does not arrive in time, 413 over a size limit, 415 for another
            type or encoding, 422 if a value is beyond its bounds, 503 if the server has no memory left for it now.
    """
    # 1. Refuse what cannot be decoded before the body is read.
    content_type, encoding = _content_type(request), _content_encoding(request)
    # 2. Read it.
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read_bounded(request, limits.body_bytes, reservation)
    except TimeoutError:
        raise _too_slow(limits) from None
    # 3. Decompress it.
    if encoding != _UNCOMPRESSED:
        async with reservation.budget.decompressing:
            body = await asyncio.to_thread(_DECOMPRESSORS[encoding], body, limits.decoded_bytes)
        reservation.grow(len(body))
    # 4. Decode it.
    loose: dict[type, int] = {wire.Batch: limits.loose_bytes, wire.Registration: limits.decoded_bytes}
    if len(body) <= _INLINE_BYTES:
        return _decode(body, document, content_type, loose[document])
    return await asyncio.to_thread(_decode, body, document, content_type, loose[document])


def _content_type(request: Request) -> str:
    """Return the format of the body: JSON or MessagePack."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in CONTENT_TYPES:
        detail = f"content type {given!r} is not supported: send {wire.JSON_TYPE} or {wire.MESSAGEPACK_TYPE}"
        raise Refused(415, "Unsupported media type", detail)
    return CONTENT_TYPES[given]


def _content_encoding(request: Request) -> str:
    """Return how the body is compressed."""
    encoding = request.headers.get("content-encoding", _UNCOMPRESSED).strip().lower()
    if encoding != _UNCOMPRESSED and encoding not in _DECOMPRESSORS:
        detail = f"content encoding {encoding!r:.80} is not supported: gzip, zstd or none, and only one of them"
        raise Refused(415, "Unsupported encoding", detail)
    return encoding


async def _read_bounded(request: Request, most: int, reservation: Reservation) -> bytes:
    """Return the body as it arrives, of at most so many bytes."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
        reservation.grow(len(body))
    return bytes(body)


def _too_large(most: int) -> Refused:
    detail = f"the body is larger than limits.body_bytes allows ({most} bytes): send smaller batches"
    return Refused(413, "Body too large", detail)


async def read_document(request: Request, limits: Limits) -> None:
    """Read the body of a request that is not an agent's, within its bounds; FastAPI finds it in the request then.

    Raises:
        Refused: 408 if it does not arrive in time, 413 if it is too large.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.document_bytes:
                    detail = f"the body is larger than limits.document_bytes allows ({limits.document_bytes} bytes)"
                    raise Refused(413, "Body too large", detail)
    except TimeoutError:
        raise _too_slow(limits) from None
    request._body = bytes(body)  # noqa: SLF001  # where Starlette keeps a body that has been read


def _too_slow(limits: Limits) -> Refused:
    detail = f"the body did not arrive within limits.body_seconds ({limits.body_seconds:g} s): send it again"
    return Refused(408, "Body too slow", detail, retry_after=RetryAfter.SOON)


def _decompress_gzip(body: bytes, most: int) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        content = inflater.decompress(body, most + 1)
    except zlib.error as error:
        raise Refused(400, "Malformed document", f"the body is not gzip: {error}") from None
    _check_decompressed(len(content), most)
    if not inflater.eof or inflater.unused_data:
        raise Refused(400, "Malformed document", "the gzip stream is cut off or followed by something else")
    return content


_END = b"the body is whole"
_END_FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(_END)
"""Appended to a body in zstd, since the reader does not tell whether a frame is cut off.

``_END`` comes out last only if every frame before is whole: a frame that is cut off takes these bytes for its own rest.
"""


def _decompress_zstd(body: bytes, most: int) -> bytes:
    """Return the content of one or several frames; the size that a frame declares is not trusted."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
    content = bytearray()
    source, most_read = io.BytesIO(body + _END_FRAME), most + len(_END)
    try:
        with decompressor.stream_reader(source, read_across_frames=True) as reader:
            while len(content) <= most_read and (piece := reader.read(_INLINE_BYTES)):
                content += piece
    except zstandard.ZstdError as error:
        raise Refused(400, "Malformed document", f"the body is not zstd, or cut off: {error}") from None
    _check_decompressed(len(content) - len(_END), most)
    if not content.endswith(_END):
        raise Refused(400, "Malformed document", "the zstd stream is cut off")
    return bytes(content[: -len(_END)])


_DECOMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {"gzip": _decompress_gzip, "zstd": _decompress_zstd}


def _check_decompressed(size: int, most: int) -> None:
    if size > most:
        detail = f"the body unpacks to more than limits.decoded_bytes allows ({most} bytes): send smaller batches"
        raise Refused(413, "Body too large", detail)


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
    """Return the refusal of a value beyond its bounds, or of malformed content after that value."""
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
    """Return how many bytes of a batch are packed vectors: all others become objects of many times their size."""
    vectors = [memoryview(raw) for sample in _outline.decode(body).samples for raw in sample.statistics.values()]
    return sum(len(vector) for vector in vectors if vector[0] in _BINARY_TAGS)
