"""Clients that are slow, wide or greedy, and a database that is away: the others are served, and each is told why."""

import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import wire
from gradwatch.wire import Trail
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.settings import Configuration
from gradwatch_server.store.batch_store import _stretches, _trail_between
from gradwatch_server.store.rollups.series import TRAIL_STEPS
from tests.postgres import migrated_database
from tests.processes import PATIENCE_SECONDS, GradwatchServer, sample, wait_for

READERS = 20
"""More than the connections that a server opens."""


def _fill(server: GradwatchServer, names: list[str], count: int) -> str:
    run = server.register(names)
    for begin in range(0, count, 100):
        stored = [
            wire.Sample(step=step, at=1.0, statistics={"grad_norm": np.full(len(names), step, np.float32)})
            for step in range(begin, min(begin + 100, count))
        ]
        assert server.store(run, wire.Batch(id=f"b{begin}", samples=stored)).status_code == 200
    return run


def _connected(server: GradwatchServer, buffer_bytes: int | None = None) -> socket.socket:
    address = urlsplit(server.url)
    opened = socket.socket()
    opened.settimeout(60)
    if buffer_bytes is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    assert address.port is not None
    opened.connect((address.hostname, address.port))
    return opened


def _wait_until_held(server: GradwatchServer, count: int) -> None:
    """Wait until the server has received that many bytes of bodies: what comes before them would take their room."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while f"\ngradwatch_held_bytes {float(count)}\n" not in server.http.get("/metrics").text:
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def test_clients_that_take_their_answers_slowly_keep_nobody_else_waiting(server: GradwatchServer) -> None:
    run = _fill(server, [f"p{index}" for index in range(1_000)], 400)
    ask = f"GET /api/v1/runs/{run}/tile?statistic=grad_norm HTTP/1.1\r\nHost: [::1]\r\n\r\n".encode()
    with ExitStack() as opened:
        readers = [opened.enter_context(_connected(server, 4_096)) for _ in range(READERS)]
        for reader in readers:
            reader.sendall(ask)
        for reader in readers:
            assert reader.recv(12) == b"HTTP/1.1 200"
        batch = wire.encode(wire.Batch(id="w", samples=[sample(400, *[1.0] * 1_000)]))
        headers = {"content-type": wire.MESSAGEPACK_TYPE}
        address = f"{server.url}/api/v1/runs/{run}/samples"
        with httpx.Client(headers=headers, timeout=PATIENCE_SECONDS, trust_env=False) as other:
            assert other.post(address, content=batch).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    room = "body_bytes = 1000000\ndecoded_bytes = 1000000\nheld_bytes = 1000000\n"
    config.write_text(f"[limits]\nbody_seconds = 5\n{room}")
    with GradwatchServer(tmp_path / "g.db", "--config", str(config)) as server, _connected(server) as stuck:
        run = server.register([f"p{index}" for index in range(1_000)])
        head = f"POST /api/v1/runs/{run}/samples HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {wire.MESSAGEPACK_TYPE}\r\n"
        stuck.sendall(f"{head}Content-Length: 990000\r\n\r\n".encode() + bytes(900_000))
        told = b""
        while piece := stuck.recv(4_096):  # until the server closes it
            told += piece
        assert told.startswith(b"HTTP/1.1 408")
        assert b"limits.body_seconds" in told
        large = [sample(step, *[1.0] * 1_000) for step in range(100)]
        assert server.store(run, wire.Batch(id="b", samples=large)).status_code == 200


def test_a_slow_body_gives_way_to_others(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[limits]\nbody_bytes = 1000000\ndecoded_bytes = 1000000\nheld_bytes = 1000000\n")
    with GradwatchServer(tmp_path / "g.db", "--config", str(config)) as server, _connected(server) as slow:
        run = server.register([f"p{index}" for index in range(1_000)])
        head = f"POST /api/v1/runs/{run}/samples HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {wire.MESSAGEPACK_TYPE}\r\n"
        slow.sendall(f"{head}Content-Length: 990000\r\n\r\n".encode() + bytes(900_000))
        _wait_until_held(server, 900_000)
        large = wire.Batch(id="b", samples=[sample(step, *[1.0] * 1_000) for step in range(100)])
        started = time.monotonic()
        while server.store(run, large).status_code == 503:
            assert time.monotonic() - started < 50, "a minute is what a body may take where nobody waits for it"
            threading.Event().wait(0.3)
        assert slow.recv(12) == b"HTTP/1.1 408"


def test_a_database_that_is_away_is_told_as_such(postgres: str, tmp_path: Path) -> None:
    with migrated_database(postgres) as url, GradwatchServer(tmp_path / "server.db", url=url) as server:
        run = server.register(["a"])
        paths = ["/api/v1/runs", f"/api/v1/runs/{run}/map", "/metrics", "/readyz"]
        name = sa.make_url(url).database
        admin = sa.create_engine(sa.make_url(postgres).set(drivername="postgresql+psycopg"))
        with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
            connection.execute(sa.text(ended), {"name": name})
            answers = [server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0)]))]
            end = time.monotonic() + 3.0  # tokens are read again meanwhile
            while time.monotonic() < end:
                answers += [server.http.get(path) for path in paths]
            connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        admin.dispose()
        for answer in answers:
            assert answer.status_code == 503, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) >= 1
        assert server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0)])).status_code == 200


def test_limits_that_are_read_again_are_in_force_at_once(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[limits]\nbody_bytes = 200000\ndecoded_bytes = 200000\nheld_bytes = 200000\n")
    with GradwatchServer(tmp_path / "g.db", "--config", str(config)) as server:
        run = server.register([f"p{index}" for index in range(1_000)])
        large = wire.Batch(id="b", samples=[sample(step, *[1.0] * 1_000) for step in range(100)])
        assert server.store(run, large).status_code == 413
        config.write_text("[limits]\nqueued_batches = 7\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(server.log, "configuration reloaded")
        assert server.store(run, large).status_code == 200
        assert server.get("/api/v1/server")["queue_capacity"] == 7
        assert "\ngradwatch_queue_limit_batches 7.0" in server.http.get("/metrics").text


def test_a_map_of_very_many_parameters_has_fewer_points(server: GradwatchServer) -> None:
    run = _fill(server, [f"p{index}" for index in range(10_000)], 300)
    seen = server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=10_000)
    assert 200 / 3 <= len(seen["steps"]) <= 200
    assert (seen["min"][0][0], seen["max"][-1][0]) == (0.0, 299.0)


@pytest.mark.parametrize(
    ("limit", "bound"),
    [
        ("parameters = -1", "at least 1"),
        ("queued_batches = 0", "at least 1"),
        ("body_bytes = 0", "at least 1"),
        ("body_seconds = nan", "at least 0.001"),
        ("drain_seconds = -1.0", "at least 0"),
        ("samples_per_batch = 20000", "at most 10,000"),
        ("name_characters = 2000", "at most 512"),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused_at_the_start(tmp_path: Path, limit: str, bound: str) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text(f"[limits]\n{limit}\n")
    with pytest.raises(ConfigurationError) as refused:
        Configuration.load(config)
    assert f"{limit} is not allowed: it is {bound}" in str(refused.value)


def test_every_name_that_is_taken_can_be_read(shared_server: GradwatchServer) -> None:
    longest = "\U0001f525" * 512
    run = shared_server.register([longest])
    assert shared_server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0, **{longest: 2.0})])).status_code == 200
    series = shared_server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter=longest)
    assert series["last"] == [1.0]
    assert shared_server.get(f"/api/v1/runs/{run}/series", statistic=longest)["last"] == [2.0]


def test_names_of_scalars_are_counted_over_the_batch(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[limits]\nscalar_names = 3\n")
    with GradwatchServer(tmp_path / "g.db", "--config", str(config)) as server:
        run = server.register(["a"])
        samples = [sample(1, 1.0, x=1.0, y=1.0), sample(2, 1.0, y=1.0, z=1.0)]
        assert server.store(run, wire.Batch(id="1", samples=samples)).status_code == 200
        trail = {name: Trail(steps=[3], values=[1.0]) for name in ("x", "w")}
        refused = server.store(run, wire.Batch(id="2", samples=samples, trail=trail))
        assert (refused.status_code, "4 names of scalars" in refused.text) == (422, True)
        assert "limits.scalar_names (3)" in refused.text


def test_a_run_has_only_so_many_scalar_names(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[limits]\nscalar_names_per_run = 3\n")
    with GradwatchServer(tmp_path / "g.db", "--config", str(config)) as server:
        run = server.register(["a"])
        assert server.store(run, wire.Batch(id="1", samples=[sample(1, 1.0, x=1.0, y=2.0)])).status_code == 200
        refused = server.store(run, wire.Batch(id="2", samples=[sample(2, 1.0, v=1.0, w=1.0)]))
        assert (refused.status_code, "limits.scalar_names_per_run" in refused.text) == (422, True)
        trail = {"x": Trail(steps=[3], values=[1.0]), "z": Trail(steps=[3], values=[1.0])}
        assert server.store(run, wire.Batch(id="3", trail=trail)).status_code == 200
        assert server.get(f"/api/v1/runs/{run}")["sample_count"] == 1


_steps = st.lists(st.integers(0, 5 * TRAIL_STEPS), min_size=1, max_size=20)


@given(st.dictionaries(st.sampled_from("abc"), _steps, max_size=3))
def test_a_trail_falls_into_its_stretches(steps: dict[str, list[int]]) -> None:
    trail = {name: Trail(steps=listed, values=[float(step) for step in listed]) for name, listed in steps.items()}
    found = _stretches(trail)
    assert found == {
        stretch: _trail_between(trail, stretch * TRAIL_STEPS, (stretch + 1) * TRAIL_STEPS - 1)
        for stretch in {step // TRAIL_STEPS for listed in steps.values() for step in listed}
    }
