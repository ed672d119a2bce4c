"""The log: what happens again and again takes a line a minute."""

import logging
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.store.database import migrate, open_engine
from gradwatch_server.telemetry import logs
from gradwatch_server.telemetry.logs import RepetitionFilter
from tests.postgres import started_server
from tests.processes import GradwatchServer, sample, wait_for


@pytest.fixture
def clock() -> list[float]:
    """The time of the filter's clock."""
    return [0.0]


def _record(text: str, level: int = logging.WARNING, error: Exception | None = None) -> logging.LogRecord:
    told = None if error is None else (type(error), error, None)
    return logging.LogRecord("server", level, "here", 1, text, (), told)


def test_a_message_that_comes_again_is_written_once_a_minute_with_how_often(clock: list[float]) -> None:
    quiet = RepetitionFilter(lambda: clock[0])
    written = []
    for clock[0] in range(0, 130, 2):
        for text in ("away", "other"):
            record = _record(text)
            if quiet.filter(record):
                written.append(record.getMessage())
    again = " (29 times more in the last 60 s)"
    assert written == [text + tail for tail in ("", again, again) for text in ("away", "other")]
    assert all(quiet.filter(_record("started", logging.INFO)) for _ in range(3))


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_REMEMBERED", 10)
    quiet = RepetitionFilter()
    assert all(quiet.filter(_record(f"delivery {number} failed")) for number in range(100))
    assert [quiet.filter(_record(f"delivery {number} failed")) for number in (0, 99)] == [True, False]


def test_a_database_out_of_reach_has_a_line_and_no_traceback() -> None:
    reason = sa.exc.OperationalError("SELECT 1", {}, Exception("connection refused\nIs it running?"))
    record = _record("claiming failed", logging.ERROR, reason)
    assert RepetitionFilter().filter(record)
    assert logs.LogFormatter("%(message)s").format(record) == (
        "claiming failed: the database is out of reach: connection refused"
    )


def test_while_postgresql_is_away_the_log_has_some_lines(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text('[[receivers]]\nname = "h"\ntype = "webhook"\nurl = "http://127.0.0.1:9/hook"\n')
    with ExitStack() as running:
        url = running.enter_context(started_server())
        engine = open_engine(url)
        migrate(engine)
        engine.dispose()
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config), url=url) as server:
            run = server.register(["a"])
            running.close()
            wait_for(server.log, "recording and claiming deliveries failed")
            for number in range(20):
                assert server.store(run, wire.Batch(id=str(number), samples=[sample(number, 1.0)])).status_code == 503
            lines = server.log.read_text().splitlines()
            server.kill()
    assert len(lines) < 30, "\n".join(lines)
    assert not any("Traceback" in line for line in lines)
