"""Runs go when they are deleted or their time is over, and nothing of them stays."""

import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server import schema
from gradwatch_server.database import open_engine
from tests.processes import GradwatchServer, environment, sample


def _filled(server: GradwatchServer, **fields: str) -> str:
    run = server.register(["a", "b"], **fields)
    listed = [sample(step, float("nan"), 1.0, loss=1.0) for step in range(1, 71)]
    assert server.store(run, wire.Batch(id="b", samples=listed)).status_code == 200
    return run


def _rows(url: str, run: str) -> dict[str, int]:
    """Return how many rows each table holds of a run, where it holds any."""
    engine = open_engine(url)
    found = {}
    with engine.connect() as connection:
        for table in schema.metadata.tables.values():
            column = table.c.get("run")
            if column is not None:
                found[table.name] = connection.execute(sa.select(sa.func.count()).where(column == run)).scalar_one()
    engine.dispose()
    return {name: count for name, count in found.items() if count}


def test_a_deleted_run_leaves_nothing(shared_server: GradwatchServer, database_url: str) -> None:
    run, other = _filled(shared_server), _filled(shared_server)
    assert {"samples", "rollups", "scalars", "trails", "alerts"} <= _rows(database_url, run).keys()
    assert shared_server.http.delete(f"/api/v1/runs/{run}").status_code == 204
    assert _rows(database_url, run) == {}
    assert shared_server.http.delete(f"/api/v1/runs/{run}").status_code == 404
    assert shared_server.get(f"/api/v1/runs/{other}")["sample_count"] == 70
    assert shared_server.store(run, wire.Batch(id="c", samples=[sample(99, 1.0, 1.0)])).status_code == 404


def test_prune_removes_what_is_over_its_time_and_nothing_else(tmp_path: Path) -> None:
    database = tmp_path / "gradwatch.db"
    with GradwatchServer(database) as server:
        old, kept, brief = _filled(server), _filled(server, project="kept"), _filled(server, project="brief")
    url = f"sqlite:///{database}"
    engine = open_engine(url)
    with engine.begin() as connection:
        for run, days in ((old, 31), (kept, 31), (brief, 2)):
            earlier = sa.update(schema.runs).where(schema.runs.c.id == run)
            connection.execute(earlier.values(last_seen_at=schema.runs.c.last_seen_at - 86_400 * days))
    engine.dispose()
    (tmp_path / "gradwatch.toml").write_text("[retention]\ndays = 30\nprojects = { kept = 60, brief = 1 }\n")
    command = [sys.executable, "-m", "gradwatch", "prune", "--database-url", url, "--config", "gradwatch.toml"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "removed 2 runs\n"
    assert _rows(url, old) == _rows(url, brief) == {}
    assert _rows(url, kept)["samples"] > 70


def test_the_profile_and_the_latest_sample(shared_server: GradwatchServer) -> None:
    run = _filled(shared_server)
    whole = shared_server.get(f"/api/v1/runs/{run}/profile", statistic="grad_norm")
    assert (whole["first_step"], whole["last_step"]) == (1, 70)
    assert (whole["mean"], whole["nonfinite"]) == (["NaN", 1.0], [70, 0])
    one = shared_server.get(f"/api/v1/runs/{run}/profile", statistic="grad_norm", from_step=7, to_step=7)
    assert (one["first_step"], one["last_step"], one["last"]) == (7, 7, ["NaN", 1.0])
    latest = shared_server.get(f"/api/v1/runs/{run}/latest")
    assert (latest["step"], latest["statistics"]["grad_norm"], latest["scalars"]) == (70, ["NaN", 1.0], {"loss": 1.0})
