"""Reads wait for one another; writes and probes do not wait for them."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import orjson
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.api import number_json
from tests.postgres import migrated_database
from tests.processes import PATIENCE_SECONDS, GradwatchServer, sample


def _reads(server: GradwatchServer, path: str, count: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: httpx.get(server.url + path, timeout=PATIENCE_SECONDS), range(count)))


def _until_two_wait(url: str) -> None:
    """Wait until two transactions wait for a lock."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    deadline = time.monotonic() + PATIENCE_SECONDS
    with engine.connect() as connection:
        while connection.execute(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar_one() < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    engine.dispose()


def test_reads_beyond_their_number_are_refused_and_nobody_else_waits_for_them(postgres: str, tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[limits]\nreads_at_once = 2\nread_wait_seconds = 0.2\n")
    with (
        migrated_database(postgres) as url,
        GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config), url=url) as server,
        ThreadPoolExecutor(2) as threads,
    ):
        run = server.register(["a"])
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
        path = f"/api/v1/runs/{run}"
        with engine.begin() as connection:
            connection.execute(sa.text("LOCK TABLE events IN ACCESS EXCLUSIVE MODE"))
            slow = [threads.submit(_reads, server, path, 1) for _ in range(2)]
            _until_two_wait(url)
            refused = _reads(server, path, 4)
            assert [answer.status_code for answer in refused] == [429] * 4
            assert "limits.reads_at_once" in refused[0].json()["detail"]
            assert refused[0].headers["retry-after"] == "1"
            assert server.http.get("/readyz").status_code == 200
            assert server.http.get("/metrics").status_code == 200
            assert server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0)])).status_code == 200
        answers = [answer for one in slow for answer in one.result(PATIENCE_SECONDS)]
        assert [answer.status_code for answer in answers] == [200] * 2
        assert server.http.get(path).status_code == 200
        engine.dispose()


def test_a_matrix_that_is_encoded_in_pieces_is_the_same() -> None:
    matrix = np.random.default_rng(0).random((500, 300), np.float32)
    matrix[7, 3], matrix[8, 5], matrix[9, 1] = np.nan, np.inf, wire.MISSING
    content = {"names": ["a", 'b"'], "steps": np.arange(500), "last": number_json.serialise(matrix)}
    content |= {"none": [], "empty": np.zeros((0, 3), np.float32), "one": 1.5, "nested": {"a": [[1, 2], [3]]}}
    expected = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    assert number_json.json_response(content).body == expected
