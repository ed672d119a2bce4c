"""The server's clock, with a machine's clock that is set at will; and a server whose machine's clock was set back."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from gradwatch import wire
from gradwatch_server.steady_clock import SteadyClock
from tests.processes import GradwatchServer, WebhookReceiver, sample
from tests.server.hook import configuration, settled

HOUR = 3_600.0


class _Machine:
    """A machine whose clock can be set."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.ahead = 0.0
        self.clock = SteadyClock(lambda: 1_000_000.0 + self.passed + self.ahead, lambda: self.passed)

    def seconds(self, passed: float) -> float:
        """Let time pass; return how much of it the clock shows."""
        before = self.clock.now()
        self.passed += passed
        return self.clock.now() - before


def test_the_clock_goes_as_the_machines() -> None:
    machine = _Machine()
    assert machine.seconds(10.0) == 10.0
    assert machine.clock.now() == 1_000_010.0


def test_set_back_it_goes_on_a_little_slower_until_the_other_has_caught_up() -> None:
    machine = _Machine()
    machine.ahead = -HOUR
    assert machine.seconds(100.0) == pytest.approx(95.0)
    machine.seconds(20 * HOUR)
    assert machine.clock.now() == pytest.approx(1_000_000.0 + machine.passed + machine.ahead)
    assert machine.seconds(100.0) == pytest.approx(100.0)


def test_set_forth_it_follows_at_once() -> None:
    machine = _Machine()
    machine.clock.now()
    machine.ahead = HOUR
    machine.passed += 1.0
    assert machine.clock.now() == 1_000_001.0 + HOUR


def test_it_follows_the_clock_of_a_database_and_no_other() -> None:
    machine = _Machine()
    machine.clock.follow(1_000_300.0)
    machine.ahead = HOUR
    machine.passed += 1.0
    assert machine.clock.now() == pytest.approx(1_000_301.0)


@pytest.mark.parametrize(("latest", "started"), [(500.0, 2_000.0), (5_000.0, 5_000.0), (2_000.0 + 25 * HOUR, 2_000.0)])
def test_a_server_that_starts_goes_on_where_the_last_one_was(latest: float, started: float) -> None:
    clock = SteadyClock(lambda: 2_000.0, lambda: 0.0)
    clock.start(2_000.0, latest)
    assert clock.now() == started


def test_a_retry_does_not_wait_until_a_clock_that_was_set_back_has_caught_up(tmp_path: Path) -> None:
    """The server is started anew with its clock an hour behind what it has stored."""
    with WebhookReceiver(statuses=[500, 204]) as hook:
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("retry_seconds = [1]\nlease_seconds = 2\ntimeout_seconds = 1", hook=hook.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            server.store(server.register(["a"]), wire.Batch(id="b", samples=[sample(1, float("nan"))]))
            hook.wait(1)
            server.kill()
            _set_forth(server.database, HOUR)
            server.start()
            hook.wait(2)
            settled(server)


def _set_forth(database: Path, seconds: float) -> None:
    """Have all that is stored look as if it was written later: as if the clock had been set back since."""
    changes = (
        "UPDATE runs SET last_seen_at = last_seen_at + ?",
        "UPDATE deliveries SET created_at = created_at + ?",
        "UPDATE deliveries SET due_at = due_at + ?",
        "UPDATE deliveries SET leased_until = leased_until + ? WHERE leased_until > 0",
    )
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for change in changes:
            connection.execute(change, (seconds,))
