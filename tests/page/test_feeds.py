"""What the page draws from: tiles, the stream of changes, deliveries, the server's overview."""

import json
import struct
import time
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.store import schema
from tests.page import planted
from tests.page.conftest import Filled
from tests.processes import GradwatchServer, sample


def unpacked(body: bytes) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
    """Return the header and the planes max, min, last and nonfinite of a tile."""
    (length,) = struct.unpack("<I", body[:4])
    header = json.loads(body[4 : 4 + length])
    shape = (len(header["steps"]), len(header["parameters"]))
    cells, start = shape[0] * shape[1], 4 + length
    planes = [np.frombuffer(body, "<f4", cells, start + 4 * cells * index).reshape(shape) for index in range(3)]
    nonfinite = np.frombuffer(body, "<u2", cells, start + 12 * cells).reshape(shape)
    assert len(body) == start + 14 * cells
    return header, [*planes, nonfinite]


def _float32(value: Any) -> Any:
    """Return a number of a JSON answer as the float32 whose digits it is told in."""
    return float(np.float32(value)) if isinstance(value, float | int) else value


@pytest.mark.parametrize("points", [1, 7, 600, 5_000])
def test_a_tile_is_the_map_bit_for_bit(filled: Filled, points: int) -> None:
    run = filled.runs["resnet-nan"]
    query: dict[str, Any] = {"statistic": "grad_norm", "from_step": 100, "to_step": 450, "points": points}
    told = filled.server.get(f"/api/v1/runs/{run}/map", **query)
    answer = filled.server.http.get(f"/api/v1/runs/{run}/tile", params=query)

    header, (high, low, last, nonfinite) = unpacked(answer.content)

    assert answer.headers["content-type"] == "application/octet-stream"
    assert header["parameters"] == told["parameters"]
    assert (header["steps"], header["last_steps"]) == (told["steps"], told["last_steps"])
    for plane, name in ((high, "max"), (low, "min"), (last, "last")):
        assert wire.serialise_vector(plane) == [[_float32(value) for value in row] for row in told[name]]
    assert nonfinite.tolist() == told["nonfinite"]


def test_a_tile_of_a_run_without_samples_is_empty(server: GradwatchServer) -> None:
    run = server.register()

    header, planes = unpacked(server.http.get(f"/api/v1/runs/{run}/tile").content)

    assert header["steps"] == []
    assert all(plane.size == 0 for plane in planes)
    assert server.http.get("/api/v1/runs/unknown/tile").status_code == 404
    assert server.http.get(f"/api/v1/runs/{run}/tile", params={"statistic": "nonsense"}).status_code == 422


def test_the_stream_tells_of_a_commit_and_ends_with_the_server(server: GradwatchServer) -> None:
    run = server.register(("weight",))
    with server.http.stream("GET", "/api/v1/stream") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert next(lines) == "retry: 1000"
        assert server.store(run, wire.Batch(id="a", samples=[sample(5, 1.0)])).status_code == 200
        started = time.monotonic()

        told = next(line for line in lines if line.startswith("data: ") and '"last_step":5' in line)

        assert time.monotonic() - started < 30, "the next look at the database, not a time-out of any kind"
        assert json.loads(told.removeprefix("data: "))[0]["id"] == run
        started = time.monotonic()
        server.process.terminate()
        assert list(lines)[-1:] in ([], [""])
        assert server.stop() == 0
        assert time.monotonic() - started < 60, "an open stream does not hold the server up"


def test_the_stream_tells_of_an_alert_that_changed_while_its_run_was_silent(server: GradwatchServer) -> None:
    run = server.register(("weight",))
    alert = {
        **dict.fromkeys(("rule", "severity", "summary", "cause", "remedy"), "a"),
        **dict.fromkeys(("held", "clear", "hold_samples", "clear_samples", "first_step", "parameters_left_out"), 1),
        "id": "silent",
        "run": run,
        "state": "firing",
        "first_at": 0.0,
        "parameters": [],
        "evidence": {},
    }
    with server.http.stream("GET", "/api/v1/stream") as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: ["))
        assert run in next(lines)
        engine = sa.create_engine(f"sqlite:///{server.database}", connect_args={"timeout": 30})
        with engine.begin() as connection:
            connection.execute(sa.insert(schema.alerts).values({**alert, "fired_at": time.time()}))
        engine.dispose()

        assert run in next(lines)


def test_deliveries_of_an_unknown_alert_are_not_found(server: GradwatchServer) -> None:
    assert server.http.get("/api/v1/alerts/unknown/deliveries").status_code == 404


def test_the_overview_counts_what_was_taken_in(server: GradwatchServer) -> None:
    run = server.register(("weight",))
    batch = wire.Batch(id="a", samples=[sample(1, 1.0), sample(2, 1.0)])
    server.store(run, batch)
    server.store(run, batch)
    server.store(run, planted.dropped_batch(samples=3))

    told = server.get("/api/v1/server")

    assert (told["runs"], told["samples"], told["duplicate_batches"]) == (1, 2, 1)
    assert told["dropped"]["samples"] == 3
    assert told["database"] == "sqlite"
    assert told["receivers"] == []
