"""The finer levels of old samples go: what is left of them still shows every spike and NaN, once and in its place."""

import csv
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import example, given
from hypothesis import strategies as st

from gradwatch import wire
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.database import writing
from gradwatch_server.store.rollups import queries
from gradwatch_server.store.rollups.downsampling import (
    REPLAYED_FIRST_SAMPLES,
    REPLAYED_LAST_SAMPLES,
    downsample_chunk,
    expired_levels,
)
from gradwatch_server.store.rollups.retention import Retention
from tests.processes import GradwatchServer, environment, sample
from tests.server.test_levels import Store, agrees, numbered, rows, some_examples

NAN = float("nan")
DAY = 86_400.0
MEASURED = 1_790_000_000.0
"""Time of step 0 in these tests; each step takes a second."""


class FadingStore(Store):
    """A run of which old levels go; beside it what its buckets must hold."""

    def fade(self, *steps: int) -> int:
        """Remove each level, from the finest on, of what was measured before a step; return how many rows went."""
        gone = 0
        now = MEASURED + 10 * DAY
        retention = Retention(level_days=[(now - MEASURED - step) / DAY for step in steps])
        while pieces := self._overdue(retention, now):
            for piece in pieces:
                with writing(self.engine) as connection:
                    gone += downsample_chunk(connection, piece)
        return gone

    def _overdue(self, retention: Retention, now: float) -> list[Any]:
        return [piece for piece in expired_levels(self.engine, retention, now) if piece.run_id == self.run]

    def levels(self) -> list[list[int]]:
        """Return the first steps of what is stored of each level."""
        table = schema.samples
        with self.engine.connect() as connection:
            found = connection.execute(
                sa.select(table.c.level, table.c.step).where(table.c.run == self.run).order_by("level", "step")
            ).all()
        return [[row.step for row in found if row.level == level] for level in range(5)]

    def read(self, first: int | None, last: int | None, points: int) -> queries.Buckets:
        with self.engine.connect() as connection:
            columns = list(range(self.parameters))
            return queries.read_statistic(connection, self.run, "grad_norm", first, last, columns, points)

    def forget(self, before: int) -> list[int]:
        """Drop from what must be there what is in no bucket before a step any more; return these steps."""
        found = self.read(None, None, 10_000)
        lost = [
            step
            for step in self.kept
            if step < before and not ((found.first_steps <= step) & (step <= found.last_steps)).any()
        ]
        self.kept = {step: row for step, row in self.kept.items() if step not in lost}
        return lost

    def check(self, first: int | None, last: int | None, points: int) -> None:
        """Compare a range, and what its outermost buckets hold beyond it, with what was sent."""
        found = self.read(first, last, points)
        wanted = [step for step in self.kept if (first or 0) <= step <= (2**53 if last is None else last)]
        begin, end = (found.first_steps[0], found.last_steps[-1]) if len(found) else (0, -1)
        assert all(begin <= step <= end for step in wanted)
        within = sorted(step for step in self.kept if begin <= step <= end)
        values = np.array([self.kept[step] for step in within], np.float32).reshape(-1, self.parameters)
        assert len(found) <= points
        agrees(found, np.array(within, np.int64), values, points, wire.MISSING, fewest=0)


def _filled(engine: sa.Engine, last: int = 3_000, parameters: int = 2) -> FadingStore:
    store = FadingStore(engine, f"faded{next(numbered)}", parameters)
    for start in range(1, last + 1, 500):
        store.put({step: [float(step), 1.0] for step in range(start, min(start + 500, last + 1))})
    return store


def test_each_level_goes_up_to_its_own_time_and_the_ends_stay(engine: sa.Engine) -> None:
    store = _filled(engine)
    whole = store.levels()
    assert store.fade(2_000, 1_000) > 0
    samples, smallest, second, *coarser = store.levels()
    assert samples == [*whole[0][:REPLAYED_FIRST_SAMPLES], *range(1_985, 3_001)]
    assert smallest == [step for step in whole[1] if step > 960]
    assert [second, *coarser] == whole[2:]
    assert store.fade(2_000, 1_000) == 0
    assert store.fade(9_999) > 0
    assert store.levels()[0][REPLAYED_FIRST_SAMPLES:][-REPLAYED_LAST_SAMPLES:] == list(range(2_889, 3_001))
    for points in (1, 10, 100, 5_000):
        for first, last in ((None, None), (1, 1), (500, 700), (900, 2_100), (1_990, None), (2_950, None), (990, 991)):
            store.check(first, last, points)


def test_the_newest_stay_at_full_resolution_beside_coarser_ones(engine: sa.Engine) -> None:
    store = _filled(engine)
    store.fade(2_000, 1_000)
    found = store.read(None, None, 5_000)
    assert found.first_steps[found.first_steps > 1_984].tolist() == list(range(1_985, 3_001))
    assert np.diff(found.first_steps[found.first_steps < 960]).tolist() == [64] * 14
    assert set(np.diff(found.first_steps[(found.first_steps > 960) & (found.first_steps < 1_985)])) == {16}
    assert len(store.read(None, None, 20)) <= 20


@pytest.mark.parametrize("points", [1, 30, 1_000])
def test_a_spike_and_a_nan_outlive_the_samples_around_them(engine: sa.Engine, points: int) -> None:
    store = FadingStore(engine, f"planted{next(numbered)}")
    for start in range(1, 4_000, 500):
        store.put({s: [1e6 if s == 777 else 1.0, NAN if s == 1_234 else 1.0] for s in range(start, start + 500)})
    store.fade(3_000, 2_000, 1_000)
    found = store.read(None, None, points)
    assert found.nonfinite.sum(axis=0).tolist() == [0, 1]
    assert found.high.max() == np.float32(1e6)
    store.check(None, None, points)
    store.check(770, 780, points)


def test_late_samples_join_the_finest_buckets_that_are_left(engine: sa.Engine) -> None:
    store = FadingStore(engine, f"late{next(numbered)}")
    for start in range(0, 6_000, 1_000):
        store.put({step: [float(step), 1.0] for step in range(start, start + 1_000, 2)})
    store.fade(5_000, 3_000)
    store.put({101: [1e6, NAN], 103: [NAN, 1.0], 3_201: [0.5, 2.0], 5_501: [7.0, wire.MISSING]})
    assert 4_992 in store.levels()[0]
    assert 4_990 not in store.levels()[0]
    store.put({4_991: [NAN, 9.0], 2_943: [5.0, 5.0]})
    for points in (1, 10, 100, 5_000):
        store.check(None, None, points)
        store.check(100, 110, points)
    assert store.fade(5_000, 3_000) == 0
    store.fade(5_400, 5_000, 3_000)
    store.check(None, None, 5_000)


@pytest.mark.parametrize("first", [5, 333, 1_500, 2_500])
def test_a_new_attempt_loses_no_more_than_the_bucket_it_begins_in(engine: sa.Engine, first: int) -> None:
    store = _filled(engine)
    store.fade(2_000, 1_000)
    store.resume()
    store.put({step: [2.0, 3.0] for step in range(first, first + 400)})
    lost = store.forget(first)
    assert len(lost) < (64 if first < 1_000 else 16)
    for points in (1, 10, 5_000):
        store.check(None, None, points)
    store.put({step: [2.0, NAN] for step in range(first + 400, first + 1_300)})
    store.fade(9_999, 9_999)
    store.check(None, None, 5_000)


@pytest.mark.parametrize(("begun", "late"), [(1_500, 1_490), (10, 5)])
def test_a_batch_from_before_an_attempt_began_costs_nothing_of_what_came_later(
    engine: sa.Engine, begun: int, late: int
) -> None:
    store = _filled(engine)
    store.resume()
    for start in range(begun, 3_500, 500):
        store.put({step: [2.0, NAN if step == 2_222 else 3.0] for step in range(start, start + 500)})
    store.fade(3_000, 1_800)
    store.put({late: [5.0, 5.0]})
    for points in (1, 10, 5_000):
        store.check(1_600, None, points)
    assert store.read(None, None, 1).nonfinite.tolist() == [[0, 1]]


gaps = st.lists(st.tuples(st.integers(1, 5), rows), min_size=1, max_size=150)
sent = st.lists(st.tuples(st.sampled_from(["put", "put", "fade", "resume"]), st.integers(0, 700), gaps), max_size=8)


@some_examples
@given(sent, st.integers(0, 900), st.integers(0, 900), st.integers(1, 40))
@example([("fade", 900, [])], 10, 11, 3)
def test_whatever_comes_after_levels_went_is_in_one_bucket(
    engine: sa.Engine, acts: list[tuple[str, int, list[tuple[int, list[float]]]]], a: int, b: int, points: int
) -> None:
    store = FadingStore(engine, f"any{next(numbered)}")
    store.put({step: [float(step), 1.0] for step in range(0, 800, 2)})
    store.fade(500, 300, 200)
    ever = set(store.kept)
    for act, start, pairs in acts:
        if act == "fade":
            store.fade(start, start * 2 // 3, start // 2)
            continue
        if act == "resume":
            store.resume()
        steps = start + np.cumsum([gap for gap, _ in pairs])
        floor = 0 if store.first is None else store.first
        chosen = {
            int(step): row
            for step, (_, row) in zip(steps, pairs, strict=True)
            if step >= floor and (int(step) not in ever or store.first is None)
        }
        if not chosen:
            continue
        begins = store.first is None
        store.put(chosen)
        ever = set(store.kept)
        if begins:
            store.forget(min(chosen))
    store.check(None, None, 1)
    store.check(None, None, 10_000)
    store.check(min(a, b), max(a, b), points)


def _prune(url: str, folder: Path, retention: str) -> subprocess.CompletedProcess[str]:
    (folder / "gradwatch.toml").write_text(f"[retention]\n{retention}\n")
    command = [sys.executable, "-m", "gradwatch", "prune", "--database-url", url, "--config", "gradwatch.toml"]
    return subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, check=False)


def _sent(server: GradwatchServer, first_at: float, **fields: str) -> str:
    """Return a run of 1,000 samples, one a second, with a spike at step 300 and a NaN at 400."""
    run = server.register(["a", "b"], **fields)
    listed = []
    for step in range(1_000):
        one = sample(step, 1e6 if step == 300 else 1.0, NAN if step == 400 else 1.0, loss=float(step))
        listed.append(msgspec.structs.replace(one, at=first_at + step))
    assert server.store(run, wire.Batch(id="b", samples=listed)).status_code == 200
    return run


@pytest.fixture
def own_server(own_database_url: str, tmp_path: Path) -> Iterator[GradwatchServer]:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as started:
        yield started


def test_prune_fades_by_project_and_a_second_time_finds_nothing(
    own_server: GradwatchServer, own_database_url: str, tmp_path: Path
) -> None:
    http, url, old = own_server, own_database_url, time.time() - 10 * DAY
    plain, kept = _sent(http, old, project="plain"), _sent(http, old, project="kept")
    brief, new = _sent(http, old, project="brief"), _sent(http, time.time() - 1_000, project="brief")
    before = {run: http.get(f"/api/v1/runs/{run}/map", points=2_000) for run in (kept, new)}
    rules = "level_days = [7]\nproject_level_days = { kept = [], brief = [1, 2], none = [3] }"
    done = _prune(url, tmp_path, rules)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "removed 0 runs; 1,728 samples and 52 buckets of 2 runs\n"
    assert _prune(url, tmp_path, rules).stdout == "removed 0 runs\n"
    assert {run: http.get(f"/api/v1/runs/{run}/map", points=2_000) for run in (kept, new)} == before
    for run, size in ((plain, 16), (brief, 64)):
        found = http.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=2_000)
        assert found["steps"][0:3] == [0, size, 2 * size]
        assert found["steps"][-112:] == list(range(888, 1_000))
        spike = http.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="a", from_step=300, to_step=300)
        assert (spike["steps"], spike["max"]) == ([300 // size * size], [1e6])
        nan = http.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="b", points=3)
        assert sum(nan["nonfinite"]) == 1
        loss = http.get(f"/api/v1/runs/{run}/series", statistic="loss", points=2_000)
        assert loss["last"] == list(range(1_000))
        assert http.get(f"/api/v1/runs/{run}/latest")["step"] == 999


def test_late_samples_and_an_export_after_a_prune(
    shared_server: GradwatchServer, database_url: str, tmp_path: Path
) -> None:
    run = _sent(shared_server, time.time() - 10 * DAY, project="late")
    assert _prune(database_url, tmp_path, "project_level_days = { late = [1] }").returncode == 0
    stray = wire.Batch(id="c", samples=[sample(1_500, 1.0, 1.0)])
    assert shared_server.store(run, stray).status_code == 200
    command = [sys.executable, "-m", "gradwatch", "export", "--database-url", database_url, run]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
    steps = [int(row["step"]) for row in csv.DictReader(io.StringIO(done.stdout)) if row["parameter"] == "a"]
    assert steps == [*range(16), *range(880, 1_000), 1_500]
    assert "; others up to step 879 have been pruned" in done.stderr


def test_the_server_prunes_and_diagnoses_on_after_it(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[retention]\nlevel_days = [1]\n")
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        run = _sent(server, time.time() - 10 * DAY)
        alerts = server.get("/api/v1/alerts", run=run)
    with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
        end = time.monotonic() + 30
        while len(server.get(f"/api/v1/runs/{run}/map", points=2_000)["steps"]) > 500:
            assert time.monotonic() < end
            time.sleep(0.05)
        listed = [sample(step, 1.0, 1.0, loss=1.0) for step in range(1_000, 1_200)]
        assert server.store(run, wire.Batch(id="c", samples=listed)).status_code == 200
        assert server.get(f"/api/v1/runs/{run}")["sample_count"] == 1_200
        assert [alert["rule"] for alert in server.get("/api/v1/alerts", run=run)] == [alert["rule"] for alert in alerts]


@pytest.mark.parametrize(
    ("retention", "reason"),
    [
        ("level_days = [30, 7]", "level 1 goes after 7 days, level 0 after 30"),
        ("project_level_days = { scratch = [3, 4, 2] }", "project_level_days.scratch"),
        ("level_days = [0]", "> 0.0"),
        ("level_days = 7", "Expected `array`"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, retention: str, reason: str) -> None:
    (tmp_path / "gradwatch.toml").write_text(f"[retention]\n{retention}\n")
    with pytest.raises(ConfigurationError, match="retention") as raised:
        Configuration.load(tmp_path / "gradwatch.toml")
    assert reason in str(raised.value)
