"""The body of a request: bounded before and after decompression, then decoded."""

import zlib
from typing import TypeVar

from fastapi import Request

from gradwatch import wire
from gradwatch_server.errors import Refused
from gradwatch_server.settings import Limits

Document = TypeVar("Document", wire.Registration, wire.Batch)

CONTENT_TYPES = {
    wire.JSON_TYPE: wire.JSON_TYPE,
    wire.MESSAGEPACK_TYPE: wire.MESSAGEPACK_TYPE,
    "application/msgpack": wire.MESSAGEPACK_TYPE,
    "application/x-msgpack": wire.MESSAGEPACK_TYPE,
}


async def read(request: Request, document: type[Document], limits: Limits) -> Document:
    """Return the document that the request carries.

    Raises:
        Refused: 413 over a size limit, 415 for a type or encoding that is not spoken here, 400 where it is malformed.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content_type = CONTENT_TYPES.get(given)
    if content_type is None:
        spoken = f"send {wire.JSON_TYPE} or {wire.MESSAGEPACK_TYPE}"
        raise Refused(415, "Unsupported media type", f"content type {given!r} is not spoken here: {spoken}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise Refused(415, "Unsupported encoding", f"content encoding {encoding!r} is not spoken here: gzip or none")
    body = await _bounded(request, limits.body_bytes)
    if encoding == "gzip":
        body = _decompress(body, limits.decoded_bytes)
    try:
        return wire.decode(body, document, content_type)
    except wire.WireError as error:
        raise Refused(400, "Malformed document", str(error)) from None


async def _bounded(request: Request, most: int) -> bytes:
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
    return bytes(body)


def _decompress(body: bytes, most: int) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        content = inflater.decompress(body, most + 1)
    except zlib.error as error:
        raise Refused(400, "Malformed document", f"the body is not gzip: {error}") from None
    if len(content) > most:
        detail = f"the body unpacks to more than limits.decoded_bytes allows ({most} bytes): send smaller batches"
        raise Refused(413, "Body too large", detail)
    if not inflater.eof or inflater.unused_data:
        raise Refused(400, "Malformed document", "the gzip stream is cut off or followed by something else")
    return content
