"""The wire format: its bytes are pinned, and every number survives."""

import re
import struct
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import wire

GOLDEN = wire.Batch(
    id="b1",
    attempt=3,
    samples=[wire.Sample(step=7, at=1.5, statistics={"grad_norm": np.array([1.0, np.nan, -1.0, np.inf], np.float32)})],
    trail={"loss": wire.Trail(steps=[6, 7], values=[0.5, float("nan")])},
)
GOLDEN_BYTES = bytes.fromhex(
    "89a776657273696f6e01a26964a26231a472616e6b00a7617474656d707403a773616d706c65739185a47374657007a26174cb3ff800000000"
    "0000aa7374617469737469637381a9677261645f6e6f726dc4100000803f0000c07f000080bf0000807fa77363616c61727380aa686973746f"
    "6772616d7380a5747261696c81a46c6f737382a57374657073920607a676616c75657392cb3fe0000000000000cb7ff8000000000000a66576"
    "656e747390a764726f7070656484a773616d706c657300a5627974657300a66572726f727300a676616c75657300a3656e64c0"
)


def test_the_bytes_of_version_1_are_pinned() -> None:
    assert wire.encode(GOLDEN) == GOLDEN_BYTES


@pytest.mark.parametrize("content_type", [wire.MESSAGEPACK_TYPE, wire.JSON_TYPE])
def test_both_forms_carry_nan_infinity_and_missing_exactly(content_type: str) -> None:
    body = wire.encode(GOLDEN) if content_type == wire.MESSAGEPACK_TYPE else wire.encode_json(GOLDEN)
    decoded = wire.decode(body, wire.Batch, content_type)
    vector = decoded.samples[0].statistics["grad_norm"]
    assert vector.tobytes() == GOLDEN.samples[0].statistics["grad_norm"].tobytes()
    assert wire.deserialise(decoded.trail["loss"].values[0]) == 0.5
    assert np.isnan(wire.deserialise(decoded.trail["loss"].values[1]))


def test_json_spells_what_it_has_no_number_for() -> None:
    assert b'"grad_norm":[1.0,"NaN",null,"Infinity"]' in wire.encode_json(GOLDEN)


@given(st.lists(st.floats(width=32, min_value=0) | st.just(float("nan")) | st.just(wire.MISSING)))
def test_any_vector_survives_both_forms(values: list[float]) -> None:
    vector = np.array(values, np.float32)
    batch = wire.Batch(id="b", samples=[wire.Sample(step=0, at=0.0, statistics={"grad_norm": vector})])
    packed = wire.decode(wire.encode(batch), wire.Batch).samples[0].statistics["grad_norm"]
    listed = wire.decode(wire.encode_json(batch), wire.Batch, wire.JSON_TYPE).samples[0].statistics["grad_norm"]
    assert packed.tobytes() == vector.tobytes()
    np.testing.assert_array_equal(listed, vector)


def _vector(number: bytes) -> bytes:
    return b'{"id":"b","samples":[{"step":1,"at":1,"statistics":{"grad_norm":[%s, 1]}}]}' % number


@pytest.mark.parametrize("number", [b"3.4028235e38", b"340282346638528859811704183484516925440", b'"Infinity"'])
def test_the_largest_float32_and_infinity_are_read_as_they_are(number: bytes) -> None:
    vector = wire.decode(_vector(number), wire.Batch, wire.JSON_TYPE).samples[0].statistics["grad_norm"]
    assert vector.tolist() == [float("inf") if b"I" in number else float(np.finfo(np.float32).max), 1.0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"version": 2}', "version 2 is unknown"),
        (b'{"id": 5}', "Expected `str`, got `int` - at `$.id`"),
        (b"\xff\xfe", "malformed"),
        (b'{"id":"b","samples":[{"step":1,"at":1,"statistics":{"grad_norm":["one"]}}]}', "not 'one'"),
        (b'{"id":"b","samples":[{"step":1,"at":1,"statistics":{"grad_nrm":[1]}}]}', "Invalid enum value 'grad_nrm'"),
        (b'{"id":"b","samples":[{"step":1,"at":1,"statistics":{"grad_norm":7}}]}', "a vector is a list"),
        (b'{"id":"b","samples":[{"step":1,"at":1,"statistics":{"grad_norm":[true]}}]}', "not True"),
        (_vector(b"1" + b"0" * 399), "1000000000000000000000000000000000000000 is beyond its range"),
        (_vector(b"9" * 5_000), ""),
        (_vector(b"1e39"), "1e+39 is beyond its range"),
        (_vector(b"-1e39"), "-1e+39 is beyond its range"),
        (b"[" * 100_000, ""),
    ],
)
def test_what_is_not_of_this_format_is_refused_with_the_place(body: bytes, reason: str) -> None:
    with pytest.raises(wire.WireError, match=r".*") as refusal:
        wire.decode(body, wire.Batch, wire.JSON_TYPE)
    assert reason in str(refusal.value)


def test_a_packed_vector_is_whole_float32s() -> None:
    body = wire.encode(GOLDEN).replace(b"\xc4\x10" + struct.pack("<f", 1.0), b"\xc4\x0f" + struct.pack("<f", 1.0)[1:])
    with pytest.raises(wire.WireError, match="15 bytes are not a multiple of 4"):
        wire.decode(body, wire.Batch)


BEYOND_BOUNDS = wire.Batch(
    id="",
    rank=-1,
    samples=[wire.Sample(step=2**53 + 1, at=float("nan"), scalars={"x" * 600: 1.0})],
    trail={"loss\0": wire.Trail(steps=[-5], values=[1.0])},
    events=[wire.Event(step=-1, at=-1.0, kind="a\0")],
    dropped=wire.Dropped(values=-1),
    end=wire.End(at=1e12, exit_code=2**40),
)


def test_an_agent_reads_back_what_is_beyond_its_bounds() -> None:
    body = wire.encode(BEYOND_BOUNDS)
    with pytest.raises(wire.BoundsError, match="of length >= 1"):
        wire.decode(body, wire.Batch)
    batch = wire.read_back(body)
    assert isinstance(batch, wire.Batch)
    assert isinstance(batch.samples[0], wire.Sample)
    assert wire.encode(batch) == body
    assert wire.encode(wire.read_back(GOLDEN_BYTES)) == GOLDEN_BYTES
    for damaged in (b"", b"\xc1", body[:-1], wire.encode_json(GOLDEN)):
        with pytest.raises(wire.WireError):
            wire.read_back(damaged)


def _has_bounds(inspected: msgspec.inspect.Type) -> bool:
    text = repr(inspected)
    return any(re.search(rf"\b{name}=(?!None)", text) for name in ("ge", "le", "min_length", "max_length", "pattern"))


def test_no_field_that_an_agent_reads_back_has_a_bound() -> None:
    assert _has_bounds(msgspec.inspect.type_info(wire.Batch))
    assert not _has_bounds(msgspec.inspect.type_info(type(wire.read_back(GOLDEN_BYTES))))


@given(st.binary(max_size=300), st.sampled_from([wire.JSON_TYPE, wire.MESSAGEPACK_TYPE]))
def test_no_bytes_crash_the_decoder(body: bytes, content_type: str) -> None:
    with suppress(wire.WireError):
        wire.decode(body, wire.Batch, content_type)


def test_retry_after_is_read_in_both_forms() -> None:
    now = datetime(2026, 9, 21, 12, tzinfo=UTC)
    later = format_datetime(now + timedelta(seconds=100), usegmt=True)
    assert wire.retry_after_seconds("120", now.timestamp()) == 120
    assert wire.retry_after_seconds(later, now.timestamp()) == 100
    assert wire.retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT", now.timestamp()) == 0
    for value in (None, "", "soon", "-5", "1.5"):
        assert wire.retry_after_seconds(value, now.timestamp()) is None
