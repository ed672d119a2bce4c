"""Runs go when they are deleted or their time is over, and nothing of them stays."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.alerting.run_alerts import resolve_deleted
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.notify import outbox
from gradwatch_server.notify.receivers import Webhook
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.database import migrate, open_engine, writing
from gradwatch_server.store.deletion import Remaining, delete_chunk
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, environment, sample
from tests.server.hook import configuration, settled

HOOK = Webhook(name="hook", url="https://example.com/")


def _resolver(*receivers: Webhook) -> Callable[[sa.Connection, sa.Row[Any]], None]:
    settings = Configuration(receivers=[*receivers])
    return partial(resolve_deleted, configuration=settings, public_url="http://localhost")


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


def test_a_run_goes_a_little_at_a_time(tmp_path: Path, own_database_url: str) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as server:
        run, other = _filled(server), _filled(server)
    engine, rows = open_engine(own_database_url), _rows(own_database_url, run)
    with writing(engine) as connection:  # as of a network so large that 16 of its samples are enough at once
        large = sa.update(schema.runs).where(schema.runs.c.id == run).values(parameter_count=100_000)
        connection.execute(large)
    remaining: Remaining = "some"
    counts = [rows["samples"] + rows["rollups"]]
    while remaining == "some":
        with writing(engine) as connection:
            remaining = delete_chunk(connection, run, _resolver(), seconds=0.0)
        found = _rows(own_database_url, run)
        counts.append(found.get("samples", 0) + found.get("rollups", 0))
    assert counts[0] > 70
    assert counts[-1] == 0
    assert all(0 <= before - after <= 16 for before, after in pairwise(counts)), counts
    with writing(engine) as connection:
        assert delete_chunk(connection, run, _resolver()) == "unknown"
        assert delete_chunk(connection, other, _resolver(), retention=Configuration().retention) == "unknown"
    engine.dispose()
    assert _rows(own_database_url, run) == {}
    assert _rows(own_database_url, other) == rows


def test_a_run_that_is_half_gone_goes_with_the_next_server(tmp_path: Path, own_database_url: str) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as server:
        run, other = _filled(server), _filled(server)
    engine, rows = open_engine(own_database_url), _rows(own_database_url, other)
    with writing(engine) as connection:
        assert delete_chunk(connection, run, _resolver(), seconds=0.0) == "some"
    engine.dispose()
    assert _rows(own_database_url, run)
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url):
        deadline = time.monotonic() + 2 * PATIENCE_SECONDS
        while _rows(own_database_url, run):
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
    assert _rows(own_database_url, other) == rows


def test_those_who_were_told_of_a_run_are_told_that_it_was_deleted(tmp_path: Path, own_database_url: str) -> None:
    """Although the receiver is away when it is deleted, and the server is killed before it is back."""
    with WebhookReceiver(statuses=[204, 503]) as receiver:
        config = tmp_path / "gradwatch.toml"
        pace = f"retry_seconds = {[0.2] * 50}\ncircuit_failures = 100\nlease_seconds = 3\ntimeout_seconds = 2"
        config.write_text(configuration(pace, hook=receiver.url))
        options = ("--config", str(config))
        with GradwatchServer(tmp_path / "gradwatch.db", *options, url=own_database_url) as server:
            run = _filled(server)
            receiver.wait(1)
            settled(server)
            assert server.http.delete(f"/api/v1/runs/{run}").status_code == 204
            receiver.wait(3)
            assert server.get("/api/v1/alerts") == []
            (alert,) = {each["alert"] for each in server.get("/api/v1/deliveries")}
            assert server.http.get(f"/api/v1/alerts/{alert}").status_code == 404
            server.kill()
            receiver.statuses = [204]
            server.start()
            settled(server)
            _until_forgotten(own_database_url)
        told = [json.loads(body)["data"] for _, body in receiver.requests]
        assert [(each["id"], each["state"], each["resolution"]) for each in (told[0], told[-1])] == [
            (alert, "firing", None),
            (alert, "resolved", "the run was deleted"),
        ]


def _until_forgotten(url: str) -> None:
    engine = open_engine(url)
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    tables = (schema.alerts, schema.transitions, schema.deliveries, schema.attempts)
    counts = [sa.select(sa.func.count()).select_from(table) for table in tables]
    with engine.connect() as connection:
        while any(connection.execute(count).scalar_one() for count in counts):
            assert time.monotonic() < deadline
            connection.rollback()
            time.sleep(0.1)
    engine.dispose()


def test_what_a_receiver_refused_of_a_deleted_run_can_be_sent_again_for_a_week(own_database_url: str) -> None:
    engine, ingest = open_engine(own_database_url), Ingest(Configuration(receivers=[HOOK]), "http://localhost")
    migrate(engine)
    with writing(engine) as connection:
        ingest.register(connection, "r", wire.Registration(parameters=[wire.Parameter("a", [4, 4], units=4)]))
        ingest.store(connection, "r", wire.Batch(id="ill", samples=[sample(1, float("nan"))]))
        assert delete_chunk(connection, "r", _resolver(HOOK), seconds=PATIENCE_SECONDS) == "nothing"
        now = time.time()
        connection.execute(sa.update(schema.deliveries).values(state="dead", due_at=now))
        outbox.delete_orphaned_alerts(connection, now + 7 * 86_400 - 1)
        assert outbox.replay(connection, schema.deliveries.c.state == "dead", now) == 2
        connection.execute(sa.update(schema.deliveries).values(state="dead", due_at=now))
        outbox.delete_orphaned_alerts(connection, now + 7 * 86_400)
        assert connection.execute(sa.select(schema.deliveries)).all() == []
    engine.dispose()


def test_prune_removes_what_is_over_its_time_and_nothing_else(tmp_path: Path) -> None:
    database = tmp_path / "gradwatch.db"
    receiver = WebhookReceiver()
    retention = "[retention]\ndays = 30\nprojects = { kept = 60, brief = 1 }\n"
    config = tmp_path / "gradwatch.toml"
    config.write_text(configuration("", hook=receiver.url))
    with receiver, GradwatchServer(database, "--config", str(config)) as server:
        old, kept, brief = _filled(server), _filled(server, project="kept"), _filled(server, project="brief")
        receiver.wait(3)
        settled(server)
    url = f"sqlite:///{database}"
    engine = open_engine(url)
    with engine.begin() as connection:
        for run, days in ((old, 31), (kept, 31), (brief, 2)):
            earlier = sa.update(schema.runs).where(schema.runs.c.id == run)
            connection.execute(earlier.values(last_seen_at=schema.runs.c.last_seen_at - 86_400 * days))
    engine.dispose()
    config.write_text(configuration("", hook=receiver.url) + retention)
    command = [sys.executable, "-m", "gradwatch", "prune", "--database-url", url, "--config", "gradwatch.toml"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "removed 2 runs\n"
    assert _rows(url, old) == _rows(url, brief) == {}
    assert _rows(url, kept)["samples"] > 70
    receiver = WebhookReceiver()
    config.write_text(configuration("", hook=receiver.url))
    with receiver, GradwatchServer(database, "--config", str(config)):
        told = [json.loads(body)["data"] for _, body in receiver.wait(2)]
    assert {(each["run"]["id"], each["state"]) for each in told} == {(old, "resolved"), (brief, "resolved")}


def test_the_profile_and_the_latest_sample(shared_server: GradwatchServer) -> None:
    run = _filled(shared_server)
    whole = shared_server.get(f"/api/v1/runs/{run}/profile", statistic="grad_norm")
    assert (whole["first_step"], whole["last_step"]) == (1, 70)
    assert (whole["mean"], whole["nonfinite"]) == (["NaN", 1.0], [70, 0])
    one = shared_server.get(f"/api/v1/runs/{run}/profile", statistic="grad_norm", from_step=7, to_step=7)
    assert (one["first_step"], one["last_step"], one["last"]) == (7, 7, ["NaN", 1.0])
    latest = shared_server.get(f"/api/v1/runs/{run}/latest")
    assert (latest["step"], latest["statistics"]["grad_norm"], latest["scalars"]) == (70, ["NaN", 1.0], {"loss": 1.0})
