"""Request bodies of agents: read with a size limit, decompressed with another one, and decoded."""

import asyncio
import io
import zlib
from collections.abc import Callable
from typing import TypeVar

import zstandard
from fastapi import Request

from gradwatch import wire
from gradwatch_server.api.decoding import INLINE_BYTES, decode
from gradwatch_server.errors import Refused, RetryAfter
from gradwatch_server.ingest.admission import Reservation
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
        async with reservation.receiving(limits.body_seconds):
            body = await _read_bounded(request, limits.body_bytes, reservation)
    except TimeoutError:
        raise _too_slow(limits) from None
    # 3. Decompress it.
    if encoding != _UNCOMPRESSED:
        async with reservation.budget.decompressing:
            body = await asyncio.to_thread(_DECOMPRESSORS[encoding], body, limits.decoded_bytes)
        reservation.grow(len(body))
    # 4. Decode it: of the large ones one at a time, since objects take many times the memory of their bytes.
    if len(body) <= INLINE_BYTES:
        return decode(body, document, content_type, limits)
    async with reservation.budget.decoding:
        return await asyncio.to_thread(decode, body, document, content_type, limits)


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
            while len(content) <= most_read and (piece := reader.read(INLINE_BYTES)):
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
