"""Deliveries that survive everything: kill -9 at each point, receivers that are down, slow, gone or busy."""

import asyncio
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.notify import outbox
from gradwatch_server.notify.http_client import DeliveryResult
from gradwatch_server.notify.notifier import CircuitBreaker, DeliveryWorker
from gradwatch_server.notify.receivers import Webhook
from gradwatch_server.store import schema
from gradwatch_server.store.database import open_engine, prepare, writing
from gradwatch_server.store.group_commit import Writer
from tests.postgres import migrated_database
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, run_apart, sample
from tests.server.hook import Hook, configuration, fill, full, outcomes_locked, settled

NAN = float("nan")
MIXED = ["healthy", *["slow", "down", "slow"] * 3] * 1_000
KILLS = 15
"""On each engine, each of them at three points: 30 kills and 90 interrupted deliveries in all."""


def test_kill_9_before_while_and_after_sending_loses_no_transition(tmp_path: Path, own_database_url: str) -> None:
    """Each kill hits three receivers at three points: connecting, asked but not answered, answered but not recorded."""
    connecting, asked, answered = hooks = Hook(), Hook(), Hook()
    with full() as port:
        connecting.port = port
    with asked.open(), answered.open():
        config = tmp_path / "gradwatch.toml"
        pace = f"lease_seconds = 1.5\ntimeout_seconds = 1.4\nretry_seconds = {[0.1] * 50}"
        urls = {"connecting": connecting.url, "asked": asked.url, "answered": answered.url}
        config.write_text(configuration(pace, **urls))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config), url=own_database_url) as server:
            run = server.register(["a"])
            for kill in range(KILLS):
                _kill_midway(server, run, kill, own_database_url, connecting, asked, answered)
                with connecting.open():
                    server.start()
                    for hook in hooks:
                        hook.wait(kill + 1)
                    settled(server)
    for hook in hooks:
        _all_in_order(hook)
    assert len(asked.seen) >= 2 * KILLS
    assert len(answered.seen) >= 2 * KILLS


def _kill_midway(
    server: GradwatchServer, run: str, kill: int, database_url: str, connecting: Hook, asked: Hook, answered: Hook
) -> None:
    reached = [threading.Event(), threading.Event()]
    released = threading.Event()
    with full(connecting.port), outcomes_locked(database_url) as lock:

        def hang() -> None:
            reached[0].set()
            released.wait(30)

        def lock_and_answer() -> None:
            if not reached[1].is_set():
                reached[0].wait(30)
                lock()
                reached[1].set()

        asked.before, answered.before = hang, lock_and_answer
        first = 1_000 * kill + 1
        ill = [sample(first, NAN)]
        well = [sample(step, 1.0) for step in range(first, first + 20)]
        server.store(run, wire.Batch(id=f"b{kill}", samples=well if kill % 2 else ill))
        for event in reached:
            assert event.wait(30), server.log.read_text()[-3000:]
        server.kill()
        released.set()
        asked.before = answered.before = lambda: None


def _all_in_order(hook: Hook) -> None:
    """Every transition arrived; what arrived twice has the same id; firing and resolved alternate."""
    first_seen = list(dict.fromkeys(hook.seen))
    assert len(first_seen) == len(hook.ids) == KILLS
    assert [state for _, _, state in first_seen] == (["firing", "resolved"] * KILLS)[:KILLS]
    for firing, resolved in zip(first_seen[::2], first_seen[1::2], strict=False):
        assert firing[1] == resolved[1]


def test_10000_due_at_once_with_one_receiver_down_and_one_slow_do_not_delay_the_healthy_one(
    tmp_path: Path, own_database_url: str
) -> None:
    """The healthy receiver gets 1,000 on its own first, then 1,000 beside 9,000 for the two others."""
    healthy, slow = Hook(), Hook(before=lambda: time.sleep(3))
    with healthy.open(), slow.open(), full() as down:
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("", healthy=healthy.url, slow=slow.url, down=f"http://127.0.0.1:{down}"))
        options = ("--config", str(config))
        with GradwatchServer(tmp_path / "gradwatch.db", *options, url=own_database_url) as server:
            run = server.register(["a"])
            alone = _seconds(server, own_database_url, run, healthy, ["healthy"] * 1_000)
            beside = _seconds(server, own_database_url, run, healthy, MIXED)
            print(f"1,000 to the healthy receiver: {alone:.1f} s alone, {beside:.1f} s beside 9,000 to the others")
            assert len(slow.ids) < 2_000, "one after the other, half of the slow ones would be through"
            started, count = time.monotonic(), len(healthy.ids)
            server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
            healthy.wait(count + 1)
            print(f"a new alert arrived after {time.monotonic() - started:.3f} s")
            assert len(server.get("/api/v1/deliveries", state="due", limit=10_000)) > 8_000


def _seconds(server: GradwatchServer, url: str, run: str, healthy: Hook, receivers: list[str]) -> float:
    """Return how long a server that is started on these due deliveries takes for those of the healthy receiver."""
    assert server.stop() == 0
    fill(url, run, receivers)
    started, count = time.monotonic(), len(healthy.ids)
    server.start()
    healthy.wait(count + receivers.count("healthy"))
    return time.monotonic() - started


def test_two_servers_share_the_outbox_and_a_dead_ones_claims_return(tmp_path: Path, postgres: str) -> None:
    """Both hold as many claims as they may when one of them is killed; the other one delivers everything."""
    hook, released = Hook(), threading.Event()

    def hold() -> None:
        released.wait(30)

    hook.before = hold
    config = tmp_path / "gradwatch.toml"
    with hook.open(), migrated_database(postgres) as url:
        pace = "at_once = 4\nlease_seconds = 4\ntimeout_seconds = 3.5\ncircuit_failures = 100\n"
        pace += f"retry_seconds = {[0.1] * 20}"
        config.write_text(configuration(pace, hook=hook.url))
        options = ("--config", str(config))
        with (
            GradwatchServer(tmp_path / "a.db", *options, url=url) as doomed,
            GradwatchServer(tmp_path / "b.db", *options, url=url) as other,
        ):
            for number in range(20):
                server = (doomed, other)[number % 2]
                run = server.register(["a"])
                server.store(run, wire.Batch(id="ill", samples=[sample(1, NAN)]))
                (other, doomed)[number % 2].store(run, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
            hook.wait(8)
            doomed.kill()
            released.set()
            hook.wait(40)
            settled(other)
            delivered = other.get("/api/v1/deliveries", state="delivered")
            assert {entry["id"] for entry in delivered} == set(hook.ids)
    _firing_before_resolved(hook, 20)
    assert len(hook.seen) >= 44


def _firing_before_resolved(hook: Hook, alerts: int) -> None:
    """Every transition arrived, each with one id however often, and no resolved before its firing was answered."""
    first_seen = list(dict.fromkeys(hook.seen))
    assert len(first_seen) == len(hook.ids) == 2 * alerts
    states: dict[str, list[str]] = {}
    for _, alert, state in first_seen:
        states.setdefault(alert, []).append(state)
    assert list(states.values()) == [["firing", "resolved"]] * alerts


def test_a_replayed_delivery_is_tried_as_often_as_a_new_one(tmp_path: Path) -> None:
    with WebhookReceiver(statuses=[500]) as failing:
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("retry_seconds = [0.1]\ncircuit_failures = 100", failing=failing.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            server.store(server.register(["a"]), wire.Batch(id="b", samples=[sample(1, NAN)]))
            for attempts in (2, 4, 6):
                settled(server)
                (dead,) = server.get("/api/v1/deliveries", state="dead")
                assert dead["attempts"] == attempts == len(failing.requests)
                assert server.http.post(f"/api/v1/deliveries/{dead['id']}/replay").json() == {"deliveries": 1}


def test_a_redirect_is_retried_a_400_is_dead_and_a_410_disables_the_receiver(tmp_path: Path) -> None:
    with (
        WebhookReceiver(statuses=[410]) as gone,
        WebhookReceiver(statuses=[400]) as wrong,
        WebhookReceiver(statuses=[302, 204]) as moved,
    ):
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("retry_seconds = [0.2]", gone=gone.url, wrong=wrong.url, moved=moved.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            for count, name in enumerate(("one", "two"), 1):
                run = server.register(["a"], name=name)
                server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
                wrong.wait(count)
                gone.wait(1)
                moved.wait(count + 1)
                _until_disabled(server, "gone")
            settled(server)
            assert len(gone.requests) == 1
            assert len(wrong.requests) == 2
            ids = [headers["webhook-id"] for headers, _ in moved.requests]
            assert ids[0] == ids[1] != ids[2]
            assert len(server.get("/api/v1/deliveries", state="dead")) == 4
            metrics = server.http.get("/metrics").text
            assert 'gradwatch_deliveries{receiver="wrong",state="dead"} 2.0' in metrics
            assert 'gradwatch_deliveries{receiver="moved",state="dead"} 0.0' in metrics
            states = {entry["name"]: entry["disabled"] for entry in server.get("/api/v1/receivers")}
            assert states == {"gone": "it answered 410 Gone", "wrong": None, "moved": None}
            _bring_back(server, gone)


def _bring_back(server: GradwatchServer, gone: WebhookReceiver) -> None:
    """Enable the receiver and send again what was given up: with the ids it had."""
    dead = {entry["id"] for entry in server.get("/api/v1/deliveries", receiver="gone", state="dead")}
    assert len(dead) == 2
    gone.statuses = [204]
    assert server.http.post("/api/v1/receivers/gone/enable").status_code == 204
    assert server.http.post("/api/v1/receivers/gone/replay").json() == {"deliveries": 2}
    assert {headers["webhook-id"] for headers, _ in gone.wait(3)[1:]} <= dead
    gone.wait(3)
    settled(server)
    shown = server.get(f"/api/v1/deliveries/{gone.requests[0][0]['webhook-id']}")
    assert (shown["state"], [entry["status"] for entry in shown["log"]]) == ("delivered", [410, 204])
    assert shown["payload"]["type"] == "alert.firing"


def test_a_replay_sends_the_later_deliveries_of_the_alert_again(tmp_path: Path, own_database_url: str) -> None:
    """The receiver responds 410 to firing and takes resolved; when firing is replayed, resolved comes last again."""
    with WebhookReceiver(statuses=[410, 204]) as gone:
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("", gone=gone.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config), url=own_database_url) as server:
            run = server.register(["a"])
            server.store(run, wire.Batch(id="ill", samples=[sample(1, NAN)]))
            settled(server)
            assert server.http.post("/api/v1/receivers/gone/enable").status_code == 204
            server.store(run, wire.Batch(id="well", samples=[sample(step, 1.0) for step in range(2, 21)]))
            gone.wait(2)
            settled(server)
            assert server.http.post("/api/v1/receivers/gone/replay").json() == {"deliveries": 2}
            gone.wait(4)
            settled(server)
            (delivery,) = {headers["webhook-id"] for headers, body in gone.requests if b'"alert.firing"' in body}
            assert server.http.post(f"/api/v1/deliveries/{delivery}/replay").json() == {"deliveries": 2}
            gone.wait(6)
            settled(server)
        types = [json.loads(body)["type"] for _, body in gone.requests]
        assert types == ["alert.firing", "alert.resolved"] * 3


def test_a_delivery_under_way_during_a_replay_is_sent_once_more(tmp_path: Path, own_database_url: str) -> None:
    hook, arrived, released = Hook(), threading.Event(), threading.Event()

    def hold() -> None:
        if hook.seen[-1][2] == "resolved" and not arrived.is_set():
            arrived.set()
            released.wait(30)

    hook.before = hold
    with hook.open():
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("", hook=hook.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config), url=own_database_url) as server:
            run = server.register(["a"])
            server.store(run, wire.Batch(id="ill", samples=[sample(1, NAN)]))
            hook.wait(1)
            settled(server)
            server.store(run, wire.Batch(id="well", samples=[sample(step, 1.0) for step in range(2, 21)]))
            assert arrived.wait(30)
            assert server.http.post(f"/api/v1/deliveries/{hook.seen[0][0]}/replay").json() == {"deliveries": 1}
            released.set()
            settled(server)
        assert [state for _, _, state in hook.seen] in (
            ["firing", "resolved", "firing", "resolved"],
            ["firing", "resolved", "firing", "resolved", "resolved"],
        )


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(tmp_path: Path, status: int) -> None:
    with WebhookReceiver(statuses=[status, 204], headers={"retry-after": "2"}) as receiver:
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration("retry_seconds = [0.1]", busy=receiver.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            run = server.register(["a"])
            server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
            receiver.wait(2)
            settled(server)
            first, second = server.get(f"/api/v1/deliveries/{receiver.requests[0][0]['webhook-id']}")["log"]
            assert [(entry["number"], entry["status"]) for entry in (first, second)] == [(1, status), (2, 204)]
            assert first["error"] == f"HTTP {status}"
            assert second["at"] - first["at"] >= 2


def _until_disabled(server: GradwatchServer, name: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(each["name"] == name and each["disabled"] for each in server.get("/api/v1/receivers")):
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_a_server_that_stood_still_sends_nothing_once_its_lease_is_over(tmp_path: Path) -> None:
    """It stands still after the commit of a claim; another server takes the delivery over meanwhile."""
    url, hook = f"sqlite:///{tmp_path / 'gradwatch.db'}", Hook()
    engine = open_engine(url)
    prepare(engine)
    fill(url, None, ["hook"])
    settings = outbox.DeliverySettings(lease_seconds=0.1, timeout_seconds=0.09)
    writer = Writer(engine, 10, 10)

    def stand_still() -> None:
        taken: list[outbox.ClaimedDelivery] = []
        while not taken:
            with writing(engine) as connection:
                taken = outbox.claim(connection, "hook", time.time(), 1, 60.0)
        with writing(engine) as connection:
            outbox.record(connection, [outbox.Attempt(taken[0], DeliveryResult(204), time.time(), 0.0)], settings)

    async def deliver() -> None:
        loop, claimed = asyncio.get_running_loop(), asyncio.Event()

        def after_claim(_: sa.Connection) -> None:
            loop.call_soon_threadsafe(stand_still)
            loop.call_soon_threadsafe(claimed.set)

        sa.event.listen(engine, "commit", after_claim, once=True)
        receiver = Webhook(name="hook", url=hook.url, allow_networks=["127.0.0.0/8"])
        worker = DeliveryWorker(writer, receiver, settings, Counter())
        running = asyncio.create_task(worker.run())
        await claimed.wait()
        worker.close()
        await running

    with hook.open():
        run_apart(deliver())
    writer.close(PATIENCE_SECONDS)
    engine.dispose()
    assert hook.seen == []


def test_what_is_sent_under_a_lost_lease_is_followed_by_the_last_word_again(own_database_url: str) -> None:
    engine, settings = open_engine(own_database_url), outbox.DeliverySettings()
    prepare(engine)
    fill(own_database_url, None, ["hook"] * 3)
    table = schema.deliveries

    def sent(connection: sa.Connection, claimed: outbox.ClaimedDelivery) -> str:
        (state,) = outbox.record(connection, [outbox.Attempt(claimed, DeliveryResult(204), 5.0, 0.0)], settings)
        return state

    with writing(engine) as connection:
        ids = sorted(connection.scalars(sa.select(table.c.id)))
        for sequence, each in enumerate(ids):
            mine = sa.update(table).where(table.c.id == each)
            connection.execute(mine.values(fingerprint="one", sequence=sequence))
        (stale,) = outbox.claim(connection, "hook", 0.0, 10, 1.0)
        for expected in ids:
            (claimed,) = outbox.claim(connection, "hook", 2.0, 10, 1.0)
            assert claimed.id == expected
            assert sent(connection, claimed) == "delivered"
        assert sent(connection, stale) == "delivered"
        (again,) = outbox.claim(connection, "hook", 5.0, 10, 1.0)
        assert again.id == ids[-1]
        assert sent(connection, again) == "delivered"
        assert outbox.claim(connection, "hook", 9.0, 10, 1.0) == []
    engine.dispose()


def test_the_next_alert_of_a_rule_does_not_overtake_the_end_of_the_last(tmp_path: Path) -> None:
    """The end is tried again at once, though its next attempt was ten minutes away: the next alert waits for it."""
    with WebhookReceiver(statuses=[204, 500, 204]) as hook:
        config = tmp_path / "gradwatch.toml"
        rules = "[rules.nonfinite]\nclear_samples = 1\n"
        config.write_text(configuration("retry_seconds = [600]", hook=hook.url) + rules)
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            run = server.register(["a"])
            for step, value in enumerate((NAN, 1.0, NAN)):
                server.store(run, wire.Batch(id=str(step), samples=[sample(step, value)]))
                if step < 2:
                    hook.wait(step + 1)
                    _until_attempted(server, step + 1)
            bodies = [json.loads(body)["data"] for _, body in hook.wait(4)]
            settled(server)
    assert [body["state"] for body in bodies] == ["firing", "resolved", "resolved", "firing"]
    assert len({body["fingerprint"] for body in bodies}) == 1


def _until_attempted(server: GradwatchServer, attempts: int) -> None:
    """Wait until so many attempts are recorded."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sum(entry["attempts"] for entry in server.get("/api/v1/deliveries")) < attempts:
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_a_redirect_is_a_failure_and_is_not_followed(tmp_path: Path) -> None:
    """Whoever controls a receiver must not send the server anywhere else."""
    with WebhookReceiver() as inside, WebhookReceiver(statuses=[302, 307, 308, 301, 303]) as moved:
        moved.headers = {"location": inside.url}
        config = tmp_path / "gradwatch.toml"
        config.write_text(configuration(f"retry_seconds = {[0.05] * 4}\ncircuit_failures = 9", moved=moved.url))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            run = server.register(["a"])
            server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
            settled(server)
            (delivery,) = server.get("/api/v1/deliveries")
            log = server.get(f"/api/v1/deliveries/{delivery['id']}")["log"]
            assert (delivery["state"], [entry["status"] for entry in log]) == ("dead", [302, 307, 308, 301, 303])
            assert inside.requests == []


def test_deliveries_to_unknown_receivers_are_given_up_after_an_hour(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'gradwatch.db'}"
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        run = server.register(["a"])
    fill(url, run, ["known", "unknown", "disabled"])
    engine = open_engine(url)
    with writing(engine) as connection:
        outbox.disable(connection, "disabled", "it answered 410 Gone", 0.0)
        assert outbox.give_up(connection, ["known", "disabled"], 3_599.0) == 1
        assert outbox.give_up(connection, ["known", "disabled"], 3_600.0) == 1
        rows = connection.execute(sa.select(*schema.deliveries.c["receiver", "state"])).all()
    engine.dispose()
    assert {row.receiver: row.state for row in rows} == {"known": "due", "unknown": "dead", "disabled": "dead"}


def test_a_circuit_breaker_opens_probes_and_closes() -> None:
    breaker, failed = CircuitBreaker(opens_after=2, open_seconds=10), DeliveryResult(500)
    breaker.record(failed, 0)
    assert breaker.allowed(0, 32) == 32
    breaker.record(failed, 0)
    assert (breaker.allowed(9, 32), breaker.allowed(10, 32)) == (0, 1)
    breaker.record(failed, 10)
    assert (breaker.allowed(29, 32), breaker.allowed(30, 32)) == (0, 1)
    breaker.record(DeliveryResult(204), 30)
    assert breaker.allowed(30, 32) == 32
    breaker.record(DeliveryResult(429, retry_after_seconds=7), 40)
    assert (breaker.allowed(46, 32), breaker.allowed(47, 32)) == (0, 32)
    for _ in range(9):
        breaker.record(DeliveryResult(422), 50)
    assert breaker.allowed(50, 32) == 32
