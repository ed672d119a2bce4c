"""A request takes little memory, whatever the few bytes are from which it unpacks."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zstandard

from gradwatch import wire
from tests.processes import GradwatchServer
from tests.server.test_many_runs import peak_megabytes

MOST = 16 * 1024 * 1024 - 1_000
"""Bytes just below limits.decoded_bytes."""


def repeated(document: dict[str, object], place: bytes, piece: bytes, header: bytes) -> bytes:
    """Return a registration in MessagePack in whose field an array or map holds a piece very often."""
    count = MOST // len(piece)
    return msgspec.msgpack.encode(document).replace(place, header + count.to_bytes(4, "big") + piece * count)


def attributes() -> bytes:
    count = MOST // 7
    entries = b"".join(b"\xa5%05x\xa0" % number for number in range(count))
    document = msgspec.msgpack.encode({"version": 1, "parameters": [], "attributes": "here"})
    return document.replace(b"\xa4here", b"\xdf" + count.to_bytes(4, "big") + entries)


def parameters() -> bytes:
    piece = msgspec.msgpack.encode({"name": "", "shape": []})
    return repeated({"version": 1, "parameters": "here"}, b"\xa4here", piece, b"\xdd")


def a_field_that_stands_twice() -> bytes:
    first = repeated({"version": 1, "parameters": "here", "x": []}, b"\xa4here", b"\x80", b"\xdd")
    return first.replace(b"\xa1x\x90", b"\xaaparameters\x90")


def json_with_a_float() -> bytes:
    return b'{"version":1,"attempt":1.0,"parameters":[],"x":[' + b"[]," * (MOST // 3 - 30) + b"0]}"


def json_attributes() -> bytes:
    entries = b",".join(b'"%x":""' % number for number in range(MOST // 12))
    return b'{"version":1,"parameters":[],"attributes":{' + entries + b"}}"


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradwatchServer]:
    with GradwatchServer(tmp_path_factory.mktemp("greedy") / "gradwatch.db") as server:
        yield server


@pytest.mark.parametrize(
    ("made", "content_type"),
    [
        (attributes, wire.MESSAGEPACK_TYPE),
        (parameters, wire.MESSAGEPACK_TYPE),
        (a_field_that_stands_twice, wire.MESSAGEPACK_TYPE),
        (json_with_a_float, wire.JSON_TYPE),
        (json_attributes, wire.JSON_TYPE),
    ],
)
def test_a_registration_that_unpacks_to_very_much_takes_little_memory(
    greedy: GradwatchServer, made: Callable[[], bytes], content_type: str
) -> None:
    body = zstandard.ZstdCompressor().compress(made())
    headers = {"content-type": content_type, "content-encoding": "zstd"}
    before, answers = peak_megabytes(greedy), list[int]()

    def register() -> None:
        answers.append(greedy.http.post("/api/v1/runs", content=body, headers=headers).status_code)

    senders = [threading.Thread(target=register) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert set(answers) <= {413, 422, 503}
    assert answers.count(503) < 4, "all at once may be too many; one is not"
    assert peak_megabytes(greedy) - before < 256


def test_the_largest_registration_is_taken_in_both_formats(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[limits]\nparameters = 10000\n")
    listed = [wire.Parameter(f"l.{one}", [3, 3, 3, 3], depth=one, units=3, kind="Conv2d") for one in range(10_000)]
    registration = wire.Registration(parameters=listed)
    with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
        assert server.post("/api/v1/runs", registration).status_code == 201
        headers = {"content-type": wire.JSON_TYPE}
        body = wire.encode_json(registration)
        assert server.http.post("/api/v1/runs", content=body, headers=headers).status_code == 201
