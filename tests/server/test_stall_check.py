"""The stall check: fires for runs that stop reporting, does not count the server's own downtime, and resolves."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.alerting.periodic_checks import StallCheck
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.database import open_engine, prepare
from gradwatch_server.store.group_commit import Writer
from tests.processes import GradwatchServer, WebhookReceiver, run_apart, sample

QUICK = """
[rules.stalled]
intervals = 1.0
least_seconds = 0.5
[projects.patient.rules.stalled]
enabled = false
"""


def reports(first: int) -> wire.Batch:
    """Two samples, a second apart by their own clock."""
    return wire.Batch(id=f"b{first}", samples=[sample(first, 1.0, 1.0), sample(first + 1, 1.0, 1.0)])


def notified(receiver: WebhookReceiver, count: int) -> list[dict[str, Any]]:
    return [json.loads(body)["data"] for _, body in receiver.wait(count)]


def test_a_run_that_stops_reporting_fires_and_resolves_when_it_reports_again(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("")
    options = ("--config", str(config))
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", *options, "--webhook", receiver.url) as server,
    ):
        done, patient, silent = (server.register(name=name, project=name) for name in ("done", "patient", "silent"))
        server.store(done, wire.Batch(id="b", samples=reports(1).samples, end=wire.End(at=1_790_000_003.0)))
        server.store(patient, reports(1))
        server.store(silent, reports(1))
        config.write_text(QUICK)
        server.process.send_signal(signal.SIGHUP)
        (fired,) = notified(receiver, 1)
        assert (fired["run"]["id"], fired["rule"], fired["severity"]) == (silent, "stalled", "warning")
        assert (fired["first_step"], fired["parameters"]) == (2, [])
        assert fired["evidence"]["silence_seconds"] > fired["evidence"]["limit_seconds"] == 1.0
        assert [run["id"] for run in server.get("/api/v1/runs", state="stalled")] == [silent]
        assert server.get(f"/api/v1/runs/{done}")["state"] == "finished"
        assert f'gradwatch_run_stalled{{name="silent",project="silent",run="{silent}"}} 1.0' in _metrics(server)
        server.store(silent, reports(3))
        resolved = notified(receiver, 2)[1]
        assert (resolved["id"], resolved["state"], resolved["resolved_step"]) == (fired["id"], "resolved", 3)
        assert resolved["resolved_at"] >= fired["fired_at"]
        assert {alert["run"] for alert in server.get("/api/v1/alerts")} == {silent}


def _metrics(server: GradwatchServer) -> str:
    return server.http.get("/metrics").text


def test_a_restarted_server_does_not_count_the_time_it_was_down(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("")
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config), "--webhook", receiver.url) as server,
    ):
        run = server.register()
        server.store(run, reports(1))
        server.kill()
        config.write_text(QUICK)
        down_until = time.time()
        server.start()
        (fired,) = notified(receiver, 1)
        assert fired["fired_at"] - down_until >= 1.0
        server.stop()
        config.write_text("")
        server.start()
        assert server.get(f"/api/v1/runs/{run}")["state"] == "stalled"
        server.store(run, reports(3))
        assert notified(receiver, 2)[1]["state"] == "resolved"
        assert server.get(f"/api/v1/runs/{run}")["state"] == "running"


class WatchedRun:
    """A database with one run that has reported, and a stall check whose clock the test moves."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        prepare(self.engine)
        self.writer = Writer(self.engine, 8, 8)
        configuration = Configuration()
        ingest = Ingest(configuration, "http://here")
        registration = wire.Registration(parameters=[wire.Parameter("w", [4, 4], units=4)])
        self.run = "run"
        self.writer.submit(lambda connection: ingest.register(connection, self.run, registration)).result()
        batch = wire.Batch(id="b", samples=[sample(1, 1.0), sample(2, 1.0)])
        self.writer.submit(lambda connection: ingest.store(connection, self.run, batch)).result()
        self.heard_at = time.time()
        self.stall_check = StallCheck(self.engine, self.writer, configuration, "http://here", self.heard_at)

    def check(self, seconds: float) -> bool:
        """Check so many seconds after the last sample; return whether the alert fires."""
        run_apart(self.stall_check.check(self.heard_at + seconds))
        with self.engine.connect() as connection:
            return connection.execute(sa.select(schema.alerts.c.state)).scalar_one_or_none() == "firing"

    def close(self) -> None:
        self.writer.close(5.0)
        self.engine.dispose()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[WatchedRun]:
    made = WatchedRun(f"sqlite:///{tmp_path / 'gradwatch.db'}")
    yield made
    made.close()


def test_time_without_reports_counts_while_the_server_runs(watched: WatchedRun) -> None:
    assert [watched.check(seconds) for seconds in range(5, 130, 5)] == [False] * 24 + [True]
    assert watched.check(500.0), "it goes on firing, though the server slept meanwhile"


def test_time_without_reports_does_not_count_while_the_server_slept(watched: WatchedRun) -> None:
    assert not watched.check(5.0)
    assert [watched.check(1000.0 + seconds) for seconds in range(0, 130, 5)] == [False] * 25 + [True]
