"""Ingest from the outside: what is acknowledged is stored once, what is refused changes nothing."""

import gzip
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import zstandard

from gradwatch import wire
from gradwatch_server.store import schema
from tests.processes import GradwatchServer, sample

NAN, INF = float("nan"), float("inf")
_SKIPPED = bytes.fromhex("502a4d1804000000") + b"skip"
"""A frame of zstd that carries no content."""


def test_a_sample_comes_back_as_it_was_sent(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a", "b", "c", "d"])
    sent = wire.Batch(id="b", samples=[sample(1, NAN, INF, wire.MISSING, 0.1, loss=NAN)])
    assert shared_server.store(run, sent).json() == {"id": "b", "samples": 1, "duplicate": False, "left_out": 0}
    seen = shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm")
    assert seen["last"] == [["NaN", "Infinity", None, 0.1]]
    assert seen["nonfinite"] == [[1, 1, 0, 0]]
    loss = shared_server.get(f"/api/v1/runs/{run}/series", statistic="loss")
    assert loss["steps"] == [1]
    assert loss["last"] == ["NaN"]


def test_json_and_messagepack_store_the_same(shared_server: GradwatchServer) -> None:
    maps = []
    for content_type, encode in ((wire.JSON_TYPE, wire.encode_json), (wire.MESSAGEPACK_TYPE, wire.encode)):
        run = shared_server.register(["a", "b"])
        body = encode(wire.Batch(id="b", samples=[sample(3, 0.25, NAN)]))
        answer = shared_server.http.post(
            f"/api/v1/runs/{run}/samples", content=body, headers={"content-type": content_type}
        )
        assert answer.status_code == 200
        maps.append(shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm") | {"run": ""})
    assert maps[0] == maps[1]


def test_a_compressed_body_is_read(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    answer = shared_server.http.post(
        f"/api/v1/runs/{run}/samples",
        content=gzip.compress(wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0)]))),
        headers={"content-type": wire.MESSAGEPACK_TYPE, "content-encoding": "gzip"},
    )
    assert answer.json()["samples"] == 1


def test_a_body_of_several_zstd_frames_is_read_whole(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    content = wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0)]))
    answer = shared_server.http.post(
        f"/api/v1/runs/{run}/samples",
        content=_SKIPPED + zstandard.compress(content[:9]) + zstandard.compress(b"") + zstandard.compress(content[9:]),
        headers={"content-type": wire.MESSAGEPACK_TYPE, "content-encoding": "zstd"},
    )
    assert answer.json()["samples"] == 1


@pytest.mark.parametrize("count", [10, 400])
def test_a_statistic_that_was_not_measured_has_no_profile(shared_server: GradwatchServer, count: int) -> None:
    run = shared_server.register(["a"])
    shared_server.store(run, wire.Batch(id="b", samples=[sample(step, 1.0) for step in range(count)]))
    profile = shared_server.http.get(f"/api/v1/runs/{run}/profile", params={"statistic": "update_norm"})
    assert profile.status_code == 404
    assert "'update_norm'" in profile.json()["detail"]
    assert shared_server.get(f"/api/v1/runs/{run}/map", statistic="update_norm", points=3)["steps"] == []


def test_a_scalar_named_like_a_statistic_is_read_without_a_parameter(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    trail = {"grad_norm": wire.Trail(steps=[1, 2], values=[-5.0, "NaN"])}
    shared_server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0, ratio=-1.0)], trail=trail))
    series = f"/api/v1/runs/{run}/series"
    scalar = shared_server.get(series, statistic="grad_norm")
    assert (scalar["steps"], scalar["last"], scalar["parameter"]) == ([1, 2], [-5.0, "NaN"], None)
    assert shared_server.get(series, statistic="ratio")["last"] == [-1.0]
    assert shared_server.get(series, statistic="grad_norm", from_step=3)["steps"] == []
    assert shared_server.get(series, statistic="grad_norm", parameter="a")["last"] == [1.0]
    missing = shared_server.http.get(series, params={"statistic": "weight_norm"})
    assert (missing.status_code, missing.json()["title"]) == (404, "Parameter missing")


def test_replaying_a_batch_changes_nothing(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    batch = wire.Batch(id="b", samples=[sample(1, 1.0), sample(2, 2.0)])
    assert not shared_server.store(run, batch).json()["duplicate"]
    before = shared_server.get(f"/api/v1/runs/{run}")
    assert shared_server.store(run, batch).json() == {"id": "b", "samples": 0, "duplicate": True, "left_out": 0}
    after = shared_server.get(f"/api/v1/runs/{run}")
    assert before == after
    assert after["sample_count"] == 2


def test_batches_out_of_order_end_in_order(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    for step in (5, 1, 3):
        shared_server.store(run, wire.Batch(id=f"b{step}", samples=[sample(step, float(step))]))
    series = shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a")
    assert series["steps"] == [1, 3, 5]
    assert series["last"] == [1.0, 3.0, 5.0]
    assert shared_server.get(f"/api/v1/runs/{run}")["last_step"] == 5


def test_a_trail_need_not_be_in_order(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    trail = {"loss": wire.Trail(steps=[9, 3], values=[1.0, 2.0])}
    assert shared_server.store(run, wire.Batch(id="b", trail=trail)).status_code == 200
    described = shared_server.get(f"/api/v1/runs/{run}")
    assert (described["last_step"], described["scalars"]) == (9, {"loss": 1.0})
    loss = shared_server.get(f"/api/v1/runs/{run}/series", statistic="loss")
    assert (loss["steps"], loss["last"]) == ([3, 9], [2.0, 1.0])


def test_a_scalar_told_twice_of_a_step_is_the_samples(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    trail = {"loss": wire.Trail(steps=[1, 2], values=[7.0, NAN])}
    batch = wire.Batch(id="b", samples=[sample(step, 1.0, loss=1.0) for step in (1, 2)], trail=trail)
    assert shared_server.store(run, batch).status_code == 200
    assert shared_server.get(f"/api/v1/runs/{run}/series", statistic="loss")["last"] == [1.0, 1.0]
    assert shared_server.get(f"/api/v1/runs/{run}/latest")["scalars"] == {"loss": 1.0}
    assert shared_server.get(f"/api/v1/runs/{run}")["scalars"] == {"loss": 1.0}
    assert shared_server.get("/api/v1/alerts", run=run) == []


def test_the_latest_attempt_wins_from_its_first_step_on(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"], attempt=1)
    shared_server.store(run, wire.Batch(id="b1", attempt=1, samples=[sample(step, 1.0) for step in range(1, 11)]))
    shared_server.register(["a"], id=run, attempt=2)
    shared_server.store(run, wire.Batch(id="b2", attempt=2, samples=[sample(step, 2.0) for step in (6, 8)]))
    shared_server.store(run, wire.Batch(id="late", attempt=1, samples=[sample(6, 9.0)]))
    series = shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a")
    assert series["steps"] == [1, 2, 3, 4, 5, 6, 8]
    assert series["last"] == [1.0] * 5 + [2.0] * 2


def test_what_an_older_attempt_sends_too_late_is_not_counted_as_stored(tmp_path: Path) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        run = server.register(["a"], attempt=1)
        server.store(run, wire.Batch(id="b1", attempt=1, samples=[sample(0, 1.0)]))
        server.register(["a"], id=run, attempt=2)
        server.store(run, wire.Batch(id="b2", attempt=2, samples=[sample(5, 1.0)]))
        late = wire.Batch(id="late", attempt=1, samples=[sample(step, 2.0) for step in (12, 3, 2, 11, 10)])
        answer = server.store(run, late).json()
        assert answer == {"id": "late", "samples": 2, "duplicate": False, "left_out": 3}
        assert server.get(f"/api/v1/runs/{run}")["sample_count"] == 4
        counts = server.http.get("/metrics").text
    assert "gradwatch_ingest_samples_total 4.0\n" in counts
    assert "gradwatch_ingest_left_out_samples_total 3.0\n" in counts
    assert "gradwatch_ingest_values_total 8.0\n" in counts


def test_each_attempt_ends_where_any_later_one_begins(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"], attempt=1)
    identities = itertools.count()

    def send(attempt: int, steps: range) -> dict[int, float]:
        samples = [sample(step, float(attempt), loss=float(attempt)) for step in steps]
        batch = wire.Batch(id=str(next(identities)), attempt=attempt, samples=samples)
        assert shared_server.store(run, batch).status_code == 200
        of_a = shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a")
        loss = shared_server.get(f"/api/v1/runs/{run}/series", statistic="loss")
        assert (of_a["steps"], of_a["last"]) == (loss["steps"], loss["last"])
        return dict(zip(of_a["steps"], of_a["last"], strict=True))

    send(1, range(55))
    shared_server.register(["a"], id=run, attempt=2)
    two = send(2, range(50, 100, 5))
    assert two == dict.fromkeys(range(50), 1.0) | dict.fromkeys(range(50, 100, 5), 2.0)
    assert send(1, range(55, 70)) == two
    shared_server.register(["a"], id=run, attempt=3)
    assert send(1, range(55, 70)) == two
    three = send(3, range(80, 100, 5))
    assert three == two | dict.fromkeys(range(80, 100, 5), 3.0)
    assert send(1, range(71, 79)) == three
    late = send(2, range(76, 86))
    assert late == three | dict.fromkeys(range(76, 80), 2.0)
    earlier = send(2, range(45, 46))
    assert earlier == {step: value for step, value in late.items() if not 45 <= step < 50} | {45: 2.0}
    assert send(1, range(44, 50)) == earlier
    coarse = shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=6)
    assert [values[0] for values in coarse["last"]] == [earlier[step] for step in coarse["last_steps"]]


def test_many_attempts_take_little_room_and_are_not_mixed(shared_server: GradwatchServer, engine: sa.Engine) -> None:
    run = shared_server.register(["a"], attempt=1)
    for attempt in range(1, 121):
        shared_server.register(["a"], id=run, attempt=attempt)
        samples = [sample(step, float(attempt)) for step in (10 * attempt, 10 * attempt + 5)]
        shared_server.store(run, wire.Batch(id=str(attempt), attempt=attempt, samples=samples))
    for attempt in (1, 15, 60):
        samples = [sample(step, float(attempt)) for step in range(10 * attempt, 1_300)]
        shared_server.store(run, wire.Batch(id=f"late-{attempt}", attempt=attempt, samples=samples))
    seen = shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a")
    steps = [step for attempt in range(1, 121) for step in (10 * attempt, 10 * attempt + 5)]
    assert seen["steps"] == sorted({*steps, *range(600, 610)})
    assert seen["last"] == [float(step // 10) for step in seen["steps"]]
    with engine.connect() as connection:
        kept = sa.select(schema.runs.c.first_steps).where(schema.runs.c.id == run)
        assert len(connection.execute(kept).scalar_one()) == 100


def test_attempts_are_ordered_by_the_servers_clock(shared_server: GradwatchServer) -> None:
    def register(run: str, started_at: float, clock: float) -> None:
        document = wire.Registration(id=run, attempt=round(1e3 * started_at), parameters=[wire.Parameter("a", [1])])
        headers = {"content-type": wire.MESSAGEPACK_TYPE, wire.CLOCK_HEADER: str(clock)}
        assert shared_server.http.post("/api/v1/runs", content=wire.encode(document), headers=headers).status_code < 300

    def store(run: str, started_at: float, identity: str, *steps: int) -> None:
        samples = [sample(step, NAN if identity == "ill" else 1.0) for step in steps]
        batch = wire.Batch(id=identity, attempt=round(1e3 * started_at), samples=samples)
        assert shared_server.store(run, batch).status_code == 200

    now = time.time()
    first, second = now + 3_600 - 60, now  # an hour ahead, a minute before the second
    run = "two-hosts"
    register(run, first, now + 3_600)
    store(run, first, "b1", *range(1, 11))
    register(run, second, now)
    store(run, second, "b2", *range(6, 9))
    store(run, first, "late", 9, 10)  # of the attempt that is over
    assert shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a")["steps"] == [
        *range(1, 9)
    ]
    store(run, second, "ill", 9)
    assert [alert["rule"] for alert in shared_server.get("/api/v1/alerts", run=run)] == ["nonfinite"]

    run = "delivered-by-another"  # the spool of the first attempt, by a host whose clock is five minutes behind
    register(run, now - 60, now)
    store(run, now - 60, "b1", 1)
    register(run, now, now)
    register(run, now - 60, now - 300)
    store(run, now, "b2", 2)
    end = wire.Batch(id="end", attempt=round(1e3 * now), end=wire.End(at=now + 1))
    assert shared_server.store(run, end).status_code == 200
    assert shared_server.get(f"/api/v1/runs/{run}")["state"] == "finished"

    run = "left-behind"  # the first attempt's measurements come after the second has begun
    register(run, second, now)
    store(run, second, "b2", *range(6, 9))
    register(run, first, now + 3_600)
    store(run, first, "b1", *range(1, 11))
    assert shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a")["steps"] == [
        *range(1, 9)
    ]


@pytest.mark.parametrize("clock", ["1e306", "-1e300", "-1e16", "1e16", "-1", "inf", "nan", "noon", "0", "1e11"])
@pytest.mark.parametrize("attempt", [1, 2**53])
def test_whatever_a_clock_tells_an_attempt_is_taken(shared_server: GradwatchServer, clock: str, attempt: int) -> None:
    document = wire.Registration(attempt=attempt, parameters=[wire.Parameter("a", [1])])
    headers = {"content-type": wire.MESSAGEPACK_TYPE, wire.CLOCK_HEADER: clock}
    answer = shared_server.http.post("/api/v1/runs", content=wire.encode(document), headers=headers)
    assert answer.status_code == 201, answer.text
    run = answer.json()["id"]
    stored = shared_server.store(run, wire.Batch(id="b", attempt=attempt, samples=[sample(1, 1.0)]))
    assert stored.status_code == 200, stored.text
    assert shared_server.get(f"/api/v1/runs/{run}")["last_step"] == 1


def test_the_state_of_a_run_is_that_of_its_latest_steps(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"], attempt=1)

    def send(name: str, attempt: int, steps: range, dropped: int, **scalars: float) -> tuple[Any, Any]:
        told = wire.Dropped(samples=dropped)
        samples = [sample(step, 1.0, **scalars) for step in steps]
        trail = {"accuracy": wire.Trail(steps=[steps[0]], values=[float(steps[0])])}
        batch = wire.Batch(id=name, attempt=attempt, samples=samples, trail=trail, dropped=told)
        assert shared_server.store(run, batch).status_code == 200
        described = shared_server.get(f"/api/v1/runs/{run}")
        return described["scalars"], described["dropped"]["samples"]

    assert send("a", 1, range(1, 11), 1, loss=1.0) == ({"loss": 1.0, "accuracy": 1.0}, 1)
    assert send("c", 1, range(21, 31), 3, loss=0.5) == ({"loss": 0.5, "accuracy": 21.0}, 3)
    late = {"loss": 0.5, "accuracy": 21.0, "rare": 7.0}
    assert send("b", 1, range(11, 21), 2, loss=9.0, rare=7.0) == (late, 3)
    shared_server.register(["a"], id=run, attempt=2)
    resumed = {"loss": 0.4, "accuracy": 5.0, "rare": 7.0}
    assert send("d", 2, range(5, 15), 0, loss=0.4) == (resumed, 0)
    assert send("e", 1, range(31, 33), 500, loss=77.0) == (resumed, 0)


def test_a_run_may_gain_parameters(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    first = wire.Batch(id="b1", samples=[sample(1, 1.0)])
    shared_server.store(run, first)
    shared_server.register(["a", "b"], id=run)
    shared_server.store(run, wire.Batch(id="b2", samples=[sample(2, 1.0, 2.0)]))
    again = shared_server.store(run, first)  # its answer was lost on the way
    assert (again.status_code, again.json()["duplicate"]) == (200, True)
    seen = shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm")
    assert seen["parameters"] == ["a", "b"]
    assert seen["last"] == [[1.0, None], [1.0, 2.0]]


def test_what_an_older_attempt_measured_is_kept_though_the_run_has_gained_parameters(
    shared_server: GradwatchServer,
) -> None:
    run = shared_server.register(["a"], attempt=1)
    shared_server.store(run, wire.Batch(id="b1", attempt=1, samples=[sample(1, 1.0)]))
    shared_server.register(["a", "b"], id=run, attempt=2)
    early = [sample(step, {20: 50.0, 30: NAN}.get(step, 1.0)) for step in range(2, 50)]
    late = wire.Batch(id="b2", attempt=1, samples=early)
    assert shared_server.store(run, late).json()["samples"] == 48
    assert shared_server.get(f"/api/v1/runs/{run}/latest")["statistics"]["grad_norm"] == [1.0, None]
    wide = [sample(step, 1.0, 2.0) for step in range(50, 80)]
    assert shared_server.store(run, wire.Batch(id="c1", attempt=2, samples=wide)).status_code == 200
    later = wire.Batch(id="b3", attempt=1, samples=[sample(12, 70.0)])
    assert shared_server.store(run, later).status_code == 200
    each = shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=100)
    assert each["steps"] == list(range(1, 80))
    assert [values[1] for values in each["last"]] == [None] * 49 + [2.0] * 30
    coarse = shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=6)
    assert len(coarse["steps"]) <= 6
    assert max(values[0] for values in coarse["max"]) == 70.0
    assert [sum(counts) for counts in zip(*coarse["nonfinite"], strict=True)] == [1, 0]
    one = shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="b", points=6)
    assert one["last"] == [values[1] for values in coarse["last"]]
    assert shared_server.get("/api/v1/alerts", run=run) == []
    for attempt, values in ((1, (1.0, 1.0, 1.0)), (2, (1.0,))):
        unfit = wire.Batch(id=f"unfit-{attempt}", attempt=attempt, samples=[sample(3, *values)])
        assert shared_server.store(run, unfit).status_code == 422


def test_a_registration_from_before_the_run_gained_parameters_may_come_again(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"], attempt=1)
    shared_server.register(["a", "b"], id=run, attempt=2)
    shared_server.register(["a", "b", "c"], id=run, attempt=2)
    before = shared_server.get(f"/api/v1/runs/{run}")
    for attempt, names in ((1, ["a"]), (2, ["a", "b"])):
        shared_server.register(names, id=run, attempt=attempt)
        assert shared_server.get(f"/api/v1/runs/{run}") == before
    listed = [wire.Parameter("z", [4, 4], units=4)]
    refused = shared_server.post("/api/v1/runs", wire.Registration(id=run, attempt=1, parameters=listed))
    assert (refused.status_code, "'a'" in refused.json()["detail"]) == (409, True)


def test_parameters_are_shown_in_the_order_of_depth(shared_server: GradwatchServer) -> None:
    parameters = [wire.Parameter("head", [2, 2], depth=1), wire.Parameter("stem", [2, 2], depth=0)]
    run = shared_server.post("/api/v1/runs", wire.Registration(parameters=parameters)).json()["id"]
    shared_server.store(run, wire.Batch(id="b", samples=[sample(1, 7.0, 1.0)]))
    seen = shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm")
    assert seen["parameters"] == ["stem", "head"]
    assert seen["last"] == [[1.0, 7.0]]


def test_runs_are_listed_by_project_and_state(shared_server: GradwatchServer) -> None:
    running = shared_server.register(["a"], project="listing", name="one")
    finished = shared_server.register(["a"], project="listing", name="two")
    end = wire.End(at=1_790_000_000.0, status="failed", exit_code=3)
    shared_server.store(finished, wire.Batch(id="end", end=end))
    assert {run["id"] for run in shared_server.get("/api/v1/runs", project="listing")} == {running, finished}
    (only,) = shared_server.get("/api/v1/runs", project="listing", state="finished")
    assert (only["id"], only["name"], only["status"], only["exit_code"]) == (finished, "two", "failed", 3)


MESSAGEPACK = {"content-type": wire.MESSAGEPACK_TYPE}
JSON = {"content-type": wire.JSON_TYPE}
_NORMS = b'{"step": 1, "at": 1, "statistics": {"grad_norm": [%s, 1]}}'
GOOD = wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0, 2.0)]))
_FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD)
_RAW = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(range(256)))


@pytest.mark.parametrize(
    ("headers", "body", "status", "reason"),
    [
        (JSON, b'{"version": 2, "id": "b"}', 400, "version 2 is unknown"),
        (JSON, b"{", 400, "truncated"),
        (JSON, b'{"id": "b", "samples": [%s]}' % (_NORMS % (b"1" + b"0" * 399)), 400, "beyond its range"),
        (JSON, b'{"id": "b", "samples": [%s]}' % (_NORMS % b"1e39"), 400, "1e+39 is beyond its range"),
        (MESSAGEPACK, b"\xc1", 400, "malformed"),
        (MESSAGEPACK | {"content-encoding": "gzip"}, b"not gzip", 400, "not gzip"),
        (MESSAGEPACK | {"content-encoding": "gzip"}, gzip.compress(GOOD)[:-4], 400, "cut off"),
        (MESSAGEPACK | {"content-encoding": "zstd"}, _FRAME[:-4], 400, "zstd"),
        (MESSAGEPACK | {"content-encoding": "zstd"}, _FRAME + _FRAME[:-1], 400, "zstd"),
        (MESSAGEPACK | {"content-encoding": "zstd"}, _FRAME + _FRAME[:2], 400, "zstd"),
        (MESSAGEPACK | {"content-encoding": "zstd"}, _RAW[:-100], 400, "zstd stream is cut off"),
        (MESSAGEPACK | {"content-encoding": "br"}, GOOD, 415, "'br'"),
        ({"content-type": "text/plain"}, GOOD, 415, "'text/plain'"),
        ({}, GOOD, 415, "''"),
        (MESSAGEPACK, b"\x00" * (8 * 1024 * 1024 + 1), 413, "limits.body_bytes"),
        (
            MESSAGEPACK | {"content-encoding": "gzip"},
            gzip.compress(b"\x00" * 33 * 1024**2),
            413,
            "limits.decoded_bytes",
        ),
        (MESSAGEPACK, wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0)])), 422, "has 1 values, the run has 2"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0, -2.0)])), 422, "-2.0"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="b", samples=[sample(1, float("nan"), -2.0)])), 422, "-2.0"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="b", samples=[sample(-1, 1.0, 2.0)])), 422, "samples[0].step -1"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="")), 422, "id is empty"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="x" * 600)), 422, "id has 600 characters"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="b", rank=-1)), 422, "rank -1"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="b", trail={"loss": wire.Trail(steps=[1], values=[])})), 422, "loss"),
        (MESSAGEPACK, wire.encode(wire.Batch(id="b", end=wire.End(at=NAN))), 422, "end.at nan"),
    ],
)
def test_bad_input_is_refused_with_its_reason_and_changes_nothing(
    shared_server: GradwatchServer, headers: dict[str, str], body: bytes, status: int, reason: str
) -> None:
    run = shared_server.register(["a", "b"])
    before = shared_server.get(f"/api/v1/runs/{run}")
    answer = shared_server.http.post(f"/api/v1/runs/{run}/samples", content=body, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert reason in answer.json()["detail"]
    assert answer.json()["status"] == status
    assert shared_server.get(f"/api/v1/runs/{run}") == before
    assert shared_server.http.post(f"/api/v1/runs/{run}/samples", content=GOOD, headers=MESSAGEPACK).json()["samples"]


def test_an_unknown_run_is_refused(shared_server: GradwatchServer) -> None:
    answer = shared_server.store("0123456789abcdef", wire.Batch(id="b"))
    assert answer.status_code == 404
    assert "0123456789abcdef" in answer.json()["detail"]
    for path in ("", "/map", "/series?statistic=loss"):
        assert shared_server.http.get(f"/api/v1/runs/0123456789abcdef{path}").status_code == 404


@pytest.mark.parametrize(
    ("registration", "status", "reason"),
    [
        ({"parameters": [{"name": "a", "shape": [1]}, {"name": "a", "shape": [1]}]}, 409, "'a' stands twice"),
        ({"parameters": [], "project": ""}, 422, "project is empty"),
        ({"parameters": [], "id": "no spaces"}, 422, "expected the id of a run: 3 to 64 letters"),
        ({"parameters": [{"name": "a", "shape": [-1]}]}, 422, "parameters[0].shape[0] -1"),
        ({"parameters": [{"name": "a\0", "shape": [1]}]}, 422, "NUL"),
        ({"parameters": [], "attributes": {"a": "x" * 4_097}}, 422, "limits.attribute_characters (4096)"),
        ({}, 400, "parameters"),
        ({"parameters": [], "version": 99}, 400, "version 99"),
    ],
)
def test_a_bad_registration_is_refused_and_registers_nothing(
    shared_server: GradwatchServer, registration: dict[str, Any], status: int, reason: str
) -> None:
    before = shared_server.get("/api/v1/runs")
    answer = shared_server.http.post("/api/v1/runs", content=json.dumps(registration), headers=JSON)
    assert answer.status_code == status
    assert reason in answer.json()["detail"]
    assert shared_server.get("/api/v1/runs") == before


def test_a_run_id_cannot_be_taken_over_by_another_network(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a", "b"])
    other = [wire.Parameter("z", [1]), wire.Parameter("b", [1])]
    answer = shared_server.post("/api/v1/runs", wire.Registration(id=run, parameters=other))
    assert answer.status_code == 409
    assert "'a'" in answer.json()["detail"]
    assert [parameter["name"] for parameter in shared_server.get(f"/api/v1/runs/{run}")["parameters"]] == ["a", "b"]


def test_the_openapi_document_describes_what_agents_send(shared_server: GradwatchServer) -> None:
    described = shared_server.get("/openapi.json")
    schemas = described["components"]["schemas"]
    body = described["paths"]["/api/v1/runs/{run_id}/samples"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["$ref"].rpartition("/")[2] in schemas
    assert {"Registration", "Batch", "Sample", "Trail"} <= schemas.keys()


def test_the_last_event_of_each_kind_is_shown(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"])
    assert shared_server.get(f"/api/v1/runs/{run}")["events"] == []
    told = [("skipped_step", 1), ("disarmed", 2), ("skipped_step", 3)]
    events = [wire.Event(step=step, at=float(step), kind=kind, message=f"at {step}") for kind, step in told]
    assert shared_server.store(run, wire.Batch(id="b", events=events)).status_code == 200
    assert shared_server.get(f"/api/v1/runs/{run}")["events"] == [
        {"kind": "skipped_step", "count": 2, "step": 3, "at": 3.0, "message": "at 3", "parameter": None},
        {"kind": "disarmed", "count": 1, "step": 2, "at": 2.0, "message": "at 2", "parameter": None},
    ]
