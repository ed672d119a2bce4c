"""A gradient that no optimizer steps is a state of its own in the store, in roll-ups and in what the server shows."""

import struct

import msgspec
import numpy as np
import pytest

from gradwatch import wire
from tests.processes import GradwatchServer, sample

STATES = [float("nan"), 0.0, -1.0, -1.0]
"""Not finite, exactly zero, no gradient, a gradient that no optimizer steps."""


def with_state(step: int, norms: list[float], unstepped: list[int]) -> wire.Sample:
    return msgspec.structs.replace(sample(step, *norms), unstepped=unstepped)


def planes(body: bytes, rows: int) -> np.ndarray:
    """Return max, min and last of a tile, shape (3, buckets, rows)."""
    (length,) = struct.unpack_from("<I", body)
    cells = len(msgspec.json.decode(body[4 : 4 + length])["steps"]) * rows
    return np.frombuffer(body, "<f4", 3 * cells, 4 + length).reshape(3, -1, rows)


@pytest.mark.parametrize(("samples", "points"), [(1, 500), (200, 3)])
@pytest.mark.parametrize("statistic", ["grad_norm", "ratio"])
def test_each_state_comes_back_as_it_was_sent(
    server: GradwatchServer, samples: int, points: int, statistic: str
) -> None:
    run = server.register(["bad", "zero", "none", "unstepped"])
    batch = wire.Batch(id="b", samples=[with_state(step, STATES, [3]) for step in range(1, samples + 1)])
    assert server.store(run, batch).status_code == 200
    body = server.http.get(f"/api/v1/runs/{run}/tile", params={"statistic": statistic, "points": points}).content
    for plane in planes(body, 4):
        for bucket in plane:
            assert bucket.tolist() == pytest.approx([float("nan"), 0.0, -1.0, -2.0], nan_ok=True)
    shown = server.get(f"/api/v1/runs/{run}/map", statistic=statistic, points=points)
    assert shown["last"][0] == ["NaN", 0.0, None, None]


def test_a_number_wins_over_the_state_within_a_bucket(server: GradwatchServer) -> None:
    run = server.register(["a"])
    listed = [with_state(step, [-1.0], [0]) if step % 2 else sample(step, 7.0) for step in range(1, 201)]
    assert server.store(run, wire.Batch(id="b", samples=listed)).status_code == 200
    body = server.http.get(f"/api/v1/runs/{run}/tile", params={"statistic": "grad_norm", "points": 3}).content
    assert np.unique(planes(body, 1)).tolist() == [7.0]


def test_a_place_beyond_the_parameters_is_refused(server: GradwatchServer) -> None:
    run = server.register(["a"])
    answer = server.store(run, wire.Batch(id="b", samples=[with_state(1, [1.0], [1])]))
    assert answer.status_code == 422
    assert "samples[0].unstepped holds 1: the sample has 1 parameters" in answer.text
