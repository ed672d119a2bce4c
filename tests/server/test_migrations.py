"""Migrations: from every revision, on both engines, with data in it; and nothing else is needed to go on."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from gradwatch import wire
from gradwatch_server.store import schema
from gradwatch_server.store.database import alembic_config, migrate, open_engine
from tests.postgres import migrated_database, plain_owner, postgres_database
from tests.processes import GradwatchServer, sample

VALUES = np.array([0.5, float("nan"), float("inf"), wire.MISSING], np.float32)
HIGHEST = np.array([9.0, *VALUES[1:]], np.float32)
STEPS = range(1, 41)


def _revisions() -> list[str]:
    script = ScriptDirectory(str(Path(schema.__file__).parent / "migrations"))
    return [revision.revision for revision in script.walk_revisions()][::-1]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of each engine in turn, without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'gradwatch.db'}"
        return
    with postgres_database(request.getfixturevalue("postgres")) as url:
        yield url


@contextmanager
def _plainly(url: str) -> Iterator[tuple[sa.Engine, sa.MetaData]]:
    """Open a database without anything of ours, with the tables that are there."""
    parsed = sa.make_url(url)
    engine = sa.create_engine(parsed if url.startswith("sqlite") else parsed.set(drivername="postgresql+psycopg"))
    tables = sa.MetaData()
    tables.reflect(engine)
    yield engine, tables
    engine.dispose()


def _fill(engine: sa.Engine, tables: sa.MetaData) -> None:
    """Write a run as the first revision had it, by the tables that are there."""
    binary = engine.dialect.name == "sqlite"

    def packed(values: Iterable[float]) -> Any:
        vector = np.array(list(values), np.float32)
        return vector.tobytes() if binary else vector.tolist()

    planes = {"low": VALUES, "high": HIGHEST, "mean": VALUES, "last": VALUES}
    counts = {"finite": (16, 0, 0, 0), "nonfinite": (0, 16, 16, 0)}
    rows: dict[str, list[dict[str, Any]]] = {
        "runs": [
            {
                "id": "old",
                "project": "p",
                "name": "n",
                "attempt": 0,
                "started_at": 1.0,
                "last_seen_at": 2.0,
                "last_step": 40,
                "diagnosed_step": 40,
                "sample_count": 40,
                "parameter_count": 4,
                "statistics": ["grad_norm"],
                "coverage": {"samples": [[32, 8]]},
                "attributes": {},
                "dropped": {},
                "scalars": {},
            }
        ],
        "parameters": [
            {"run": "old", "position": place, "name": f"p{place}", "shape": [2], "dtype": "float32"}
            | {"depth": place, "units": 1, "trainable": True, "kind": ""}
            for place in range(4)
        ],
        "samples": [
            {"run": "old", "level": 0, "step": step, "attempt": 0, "at": float(step), "grad_norm": packed(VALUES)}
            | {"last_step": None}
            for step in STEPS
        ]
        + [
            {"run": "old", "level": 1, "step": first, "attempt": 0, "at": 0.0, "grad_norm": None}
            | {"last_step": first + 15}
            for first in (1, 17)
        ],
        "rollups": [
            {"run": "old", "statistic": "grad_norm", "level": 1, "step": first}
            | {name: packed(values) for name, values in (planes | counts).items()}
            for first in (1, 17)
        ],
        "batches": [{"run": "old", "rank": 0, "id": "b1", "at": 1.0}],
        "alerts": [
            {"id": "a1", "run": "old", "rule": "dead", "severity": "warning", "state": "firing", "parameters": []}
            | dict.fromkeys(("held", "clear", "hold_samples", "clear_samples", "first_step", "first_at"), 1)
            | {"parameters_left_out": 0, "evidence": {}, "summary": "", "cause": "", "remedy": ""}
        ],
        "transitions": [
            {"id": "t1", "alert": "a1", "number": 1, "state": "firing", "severity": "warning", "step": 1, "at": 1.0}
            | {"payload": "{}"}
        ],
        "deliveries": [
            {"id": "d1", "transition": "t1", "alert": "a1", "number": 1, "receiver": "hook", "state": "delivered"}
            | dict.fromkeys(("attempts", "due_at", "leased_until", "created_at", "delivered_at"), 1)
        ],
        "attempts": [{"delivery": "d1", "number": 1, "at": 1.0, "seconds": 0.1, "status": 204, "error": ""}],
    }
    with engine.begin() as connection:
        for name, listed in rows.items():
            connection.execute(sa.insert(tables.tables[name]), listed)


@pytest.mark.parametrize("revision", _revisions())
def test_data_of_every_revision_is_there_afterwards(empty_url: str, revision: str, tmp_path: Path) -> None:
    engine = open_engine(empty_url)
    command.upgrade(alembic_config(engine), revision)
    with _plainly(empty_url) as opened:
        _fill(*opened)
    migrate(engine)
    migrate(engine)
    engine.dispose()
    with GradwatchServer(tmp_path / "server.db", url=empty_url) as server:
        seen = server.get("/api/v1/runs/old/map", statistic="grad_norm", points=100)
        assert seen["steps"] == list(STEPS)
        assert seen["last"] == [[0.5, "NaN", "Infinity", None]] * len(STEPS)
        wide = server.get("/api/v1/runs/old/map", statistic="grad_norm", points=3)
        assert wide["steps"] == [1, 17, 33]
        assert wide["max"] == [[top, "NaN", "Infinity", None] for top in (9.0, 9.0, 0.5)]
        assert server.store("old", wire.Batch(id="b1", samples=[sample(99, 1, 1, 1, 1)])).json()["duplicate"]
        assert server.store("old", wire.Batch(id="b2", samples=[sample(41, 1, 1, 1, 1)])).status_code == 200
        assert server.get("/api/v1/runs/old")["sample_count"] == 41
        (alert,) = server.get("/api/v1/alerts/a1/deliveries")
        assert [attempt["status"] for attempt in alert["attempts"]] == [204]
        assert server.http.delete("/api/v1/runs/old").status_code == 204
        assert server.get("/api/v1/deliveries") == []


@pytest.mark.parametrize("first_step", [36, None])
def test_the_attempts_of_a_migrated_run_are_not_mixed(empty_url: str, first_step: int | None, tmp_path: Path) -> None:
    begun = {1: 1, 2: 21} | ({} if first_step is None else {3: first_step})
    engine = open_engine(empty_url)
    command.upgrade(alembic_config(engine), "0010_in_place")
    with _plainly(empty_url) as (plain, tables):
        _fill(plain, tables)
        runs, samples = tables.tables["runs"], tables.tables["samples"]
        with plain.begin() as connection:
            connection.execute(sa.update(runs).values(attempt=3, attempt_first_step=first_step))
            for attempt, step in begun.items():
                mine = samples.c.level == 0, samples.c.step >= step
                connection.execute(sa.update(samples).where(*mine).values(attempt=attempt))
    migrate(engine)
    engine.dispose()
    with GradwatchServer(tmp_path / "server.db", url=empty_url) as server:
        for attempt in (1, 2):
            late = [sample(step, *[float(attempt)] * 4) for step in range(15, 50)]
            batch = wire.Batch(id=f"late-{attempt}", attempt=attempt, samples=late[:10] if attempt == 2 else late)
            assert server.store("old", batch).status_code == 200
        seen = server.get("/api/v1/runs/old/series", statistic="grad_norm", parameter="p0")
        last = dict(zip(seen["steps"], seen["last"], strict=True))
    assert last == dict.fromkeys(range(1, 15), 0.5) | dict.fromkeys(range(15, 25), 2.0) | dict.fromkeys(
        range(25, 41), 0.5
    )


def test_remote_write_goes_on_after_a_migration_where_it_was(empty_url: str) -> None:
    engine = open_engine(empty_url)
    command.upgrade(alembic_config(engine), "0012_unanalysed")
    with _plainly(empty_url) as (plain, tables):
        _fill(plain, tables)
        with plain.begin() as connection:
            far = [{"store": "near", "step": 30}, {"store": "far", "step": 35}]
            connection.execute(sa.insert(tables.tables["written"]), [{"run": "old", "attempt": 0} | one for one in far])
    migrate(engine)
    samples = schema.samples
    with engine.connect() as connection:
        numbered = sa.select(*samples.c["step", "arrival"]).where(samples.c.arrival.is_not(None))
        assert sorted(map(tuple, connection.execute(numbered))) == [(step, step - 30) for step in range(31, 41)]
        assert connection.scalar(sa.select(schema.runs.c.arrivals)) == 10
        assert set(connection.scalars(sa.select(schema.remote_write_positions.c.arrival))) == {0}
        assert set(connection.scalars(sa.select(schema.remote_write_stores.c.store))) == {"near", "far"}
    engine.dispose()


def _partitions(engine: sa.Engine) -> set[str]:
    """Return the tables that hold a part of another one's rows."""
    if engine.dialect.name == "sqlite":
        return set()
    with engine.connect() as connection:
        found = connection.scalars(sa.text("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'"))
        return set(found)


def test_the_migrated_schema_is_the_one_that_the_code_has(empty_url: str) -> None:
    engine = open_engine(empty_url)
    migrate(engine)
    with _plainly(empty_url) as (plain, found):
        columns = {name: {column.name for column in table.c} for name, table in found.tables.items()}
        partitions = _partitions(plain)
    assert columns.pop("alembic_version")
    assert bool(partitions) == (plain.dialect.name == "postgresql")
    assert {name: columns.pop(name) for name in partitions} == {
        name: columns[name.split("_")[0]] for name in partitions
    }
    assert columns == {name: {column.name for column in table.c} for name, table in schema.metadata.tables.items()}
    with engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == _revisions()[-1]
    engine.dispose()


_ELSEWHERE = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE relname = 'samples_0'"


def test_a_sample_of_two_vectors_is_stored_in_one_piece(postgres: str, tmp_path: Path) -> None:
    with migrated_database(postgres) as url, GradwatchServer(tmp_path / "server.db", url=url) as server:
        run = server.register([f"p{place}" for place in range(300)])
        values = np.random.default_rng(1).random(300, np.float32)
        measured: dict[wire.Statistic, wire.Vector] = {"grad_norm": values, "weight_norm": values}
        listed = [wire.Sample(step=step, at=1.0, statistics=measured) for step in range(10)]
        assert server.store(run, wire.Batch(id="b1", samples=listed)).status_code == 200
        engine = open_engine(url)
        with engine.connect() as connection:
            assert connection.scalar(sa.text(_ELSEWHERE)) == 0
        engine.dispose()


_ANALYSED = "SELECT DISTINCT attname FROM pg_stats WHERE tablename ~ '^(samples|rollups)'"


def test_postgresql_analyses_the_keys_of_what_was_measured_and_no_value(postgres: str, tmp_path: Path) -> None:
    with migrated_database(postgres) as url, GradwatchServer(tmp_path / "server.db", url=url) as server:
        run = server.register(["weight"])
        for first in range(0, 2_000, 500):
            samples = [sample(step, 1.0, loss=0.5) for step in range(first, first + 500)]
            assert server.store(run, wire.Batch(id=str(first), samples=samples)).status_code == 200
        engine = open_engine(url)
        with engine.connect() as connection:
            connection.execute(sa.text("ANALYZE"))
            found = set(connection.scalars(sa.text(_ANALYSED)))
        engine.dispose()
    assert found == {"run", "level", "step", "last_step", "attempt", "at", "statistic", "arrival"}


_LANGUAGE = "SELECT lanname FROM pg_proc JOIN pg_language l ON l.oid = prolang WHERE proname = 'gradwatch_bytes'"


@pytest.mark.parametrize("form", ["internal", "sql"])
def test_vectors_read_the_same_whoever_owns_the_database(postgres: str, form: str, tmp_path: Path) -> None:
    shown = [0.5, "NaN", "Infinity", None]
    with postgres_database(postgres) as empty_url, plain_owner(empty_url) as plain_url:
        url = empty_url if form == "internal" else plain_url  # a superuser's migration declares the quick form
        engine = open_engine(url)
        migrate(engine)
        with engine.connect() as connection:
            assert connection.scalar(sa.text(_LANGUAGE)) == form
        engine.dispose()
        with GradwatchServer(tmp_path / "server.db", url=url) as server:
            run = server.register([f"p{place}" for place in range(4)])
            for step in STEPS:
                measured: dict[wire.Statistic, wire.Vector] = {"grad_norm": VALUES, "weight_norm": VALUES}
                batch = wire.Batch(id=str(step), samples=[wire.Sample(step=step, at=1.0, statistics=measured)])
                assert server.store(run, batch).status_code == 200
            seen = server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=100)
            assert seen["last"] == [shown] * len(STEPS)
            wide = server.get(f"/api/v1/runs/{run}/map", statistic="weight_norm", points=3)
            assert wide["max"] == [shown] * len(wide["steps"])
            assert [sum(column) for column in zip(*wide["nonfinite"], strict=True)] == [0, 40, 40, 0]
            one = server.get(f"/api/v1/runs/{run}/series", statistic="grad_norm", parameter="p1", points=3)
            assert one["last"] == ["NaN"] * len(one["steps"])
            assert server.get(f"/api/v1/runs/{run}/latest")["statistics"]["grad_norm"] == shown
