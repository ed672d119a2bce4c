"""Muting: silences, inhibition and acknowledgement; damping of alerts that flap."""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.alerting import silences
from gradwatch_server.alerting.silences import Silence, mute_reason
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.database import migrate, open_engine, writing
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, sample

NAN = float("nan")


def ill(step: int) -> wire.Batch:
    return wire.Batch(id=f"ill{step}", samples=[sample(step, NAN)])


def notified(receiver: WebhookReceiver, count: int) -> list[tuple[str, str]]:
    data = [json.loads(body)["data"] for _, body in receiver.wait(count)]
    return [(entry["run"]["name"], entry["state"]) for entry in data]


def _silence(**changes: Any) -> Silence:
    fields = {"id": "s", "project": "*", "run": "*", "rule": "*", "author": "kim", "comment": ""}
    return Silence(**{**fields, **changes}, created_at=0.0, ends_at=1.0)


@pytest.mark.parametrize(
    ("silences", "firing", "rule", "why"),
    [
        ([], [], "exploding", None),
        ([], ["nonfinite"], "exploding", "inhibited by nonfinite"),
        ([], ["nonfinite"], "vanishing", "inhibited by nonfinite"),
        ([], ["nonfinite"], "dead", None),
        ([], ["dead", "exploding"], "slow", "inhibited by exploding"),
        ([], ["nonfinite"], "slow", "inhibited by nonfinite"),
        ([], ["unmoved"], "slow", "inhibited by unmoved"),
        ([], ["slow"], "unmoved", None),
        ([], ["stalled"], "exploding", None),
        ([], ["exploding"], "nonfinite", None),
        ([_silence()], [], "dead", "silence s by kim"),
        ([_silence(rule="dead")], [], "exploding", None),
        ([_silence(rule="ex*")], [], "exploding", "silence s by kim"),
        ([_silence(project="audio")], [], "exploding", None),
        ([_silence(run="r1", project="vis?on")], [], "exploding", "silence s by kim"),
    ],
)
def test_mute_reasons_of_silences_and_inhibition(
    silences: list[Silence], firing: list[str], rule: str, why: str | None
) -> None:
    assert mute_reason(silences, firing, "vision", "r1", rule) == why


def test_an_acknowledged_alert_is_muted() -> None:
    assert mute_reason([], [], "vision", "r1", "dead", "kim") == "acknowledged by kim"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("author", "kim\0"),
        ("author", ""),
        ("project", "\0"),
        ("rule", "x" * 513),
        ("ends_at", "NaN"),
        ("ends_at", 1e300),
        ("ends_at", "soon"),
    ],
)
def test_an_invalid_silence_is_refused(shared_server: GradwatchServer, field: str, value: Any) -> None:
    silence = {"author": "kim", "ends_at": time.time() + 3600, field: value}
    answer = shared_server.http.post("/api/v1/silences", json=silence)
    assert answer.status_code == 422
    assert f"body.{field}" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["alerts?run=%00", "alerts?before=%00", "alerts/%00", "deliveries/%00"])
def test_an_id_with_a_nul_character_is_unknown(shared_server: GradwatchServer, path: str) -> None:
    answer = shared_server.http.get(f"/api/v1/{path}")
    assert answer.status_code in (200, 404, 422)
    assert answer.status_code != 200 or answer.json() == []


def test_a_silenced_alert_is_kept_and_notified_when_the_silence_is_removed(
    tmp_path: Path, own_database_url: str
) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url, url=own_database_url) as server,
    ):
        silence = {"project": "vision", "author": "kim", "comment": "known", "ends_at": time.time() + 3600}
        added = server.http.post("/api/v1/silences", json=silence)
        assert added.status_code == 201
        assert [entry["id"] for entry in server.get("/api/v1/silences")] == [added.json()["id"]]
        quiet = server.register(["a"], project="vision", name="quiet")
        loud = server.register(["a"], project="audio", name="loud")
        for run in (quiet, loud):
            server.store(run, ill(1))
        assert notified(receiver, 1) == [("loud", "firing")]
        (alert,) = server.get("/api/v1/alerts", run=quiet)
        assert (alert["state"], alert["muted"]) == ("firing", f"silence {added.json()['id']} by kim")
        assert server.http.delete(f"/api/v1/silences/{added.json()['id']}").status_code == 204
        assert server.http.delete(f"/api/v1/silences/{added.json()['id']}").status_code == 404
        assert notified(receiver, 2)[1] == ("quiet", "firing")
        assert server.get("/api/v1/alerts", run=quiet)[0]["muted"] is None
        server.store(quiet, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
        assert notified(receiver, 3)[2] == ("quiet", "resolved")


def test_a_firing_alert_is_notified_without_a_sample_when_its_silence_ends(tmp_path: Path) -> None:
    """No sample arrives after the silence has ended; an alert that has resolved meanwhile is not notified."""
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        silence = {"author": "kim", "ends_at": time.time() + 3600}
        assert server.http.post("/api/v1/silences", json=silence).status_code == 201
        sick, well = server.register(["a"], name="sick"), server.register(["a"], name="well")
        for run in (sick, well):
            server.store(run, ill(1))
        server.store(well, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
        ends_at = time.time()
        with closing(sqlite3.connect(server.database, timeout=PATIENCE_SECONDS)) as connection, connection:
            connection.execute("UPDATE silences SET ends_at = ?", (ends_at,))
        assert notified(receiver, 1) == [("sick", "firing")]
        (delivery,) = server.get("/api/v1/deliveries")
        assert delivery["created_at"] >= ends_at


def test_exploding_is_muted_while_nonfinite_fires_and_notified_afterwards(tmp_path: Path) -> None:
    """An explosion that overflows for one sample; after it the numbers are finite again, and the loss still bad."""
    calm = [sample(step, *[1.0] * 4, loss=1.0) for step in range(1, 31)]
    grown = [sample(step, *[1e4] * 4, weight_norm=100.0, loss=50.0) for step in (31, 32)]
    overflown = sample(33, *[NAN] * 4, loss=NAN)
    finite = [sample(step, *[1e4] * 4, weight_norm=100.0, loss=50.0) for step in range(34, 40)]
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        run = server.register([f"layer{number}.weight" for number in range(4)])
        server.store(run, wire.Batch(id="b1", samples=[*calm, *grown, overflown]))
        muted_by = {alert["rule"]: (alert["state"], alert["muted"]) for alert in server.get("/api/v1/alerts")}
        assert muted_by == {"nonfinite": ("firing", None), "exploding": ("firing", "inhibited by nonfinite")}
        receiver.wait(1)
        assert len(server.get("/api/v1/deliveries")) == 1
        server.store(run, wire.Batch(id="b2", samples=finite))
        data = [json.loads(body)["data"] for _, body in receiver.wait(3)]
        assert (data[0]["rule"], data[0]["state"]) == ("nonfinite", "firing")
        assert {(entry["rule"], entry["state"]) for entry in data[1:]} == {
            ("nonfinite", "resolved"),
            ("exploding", "firing"),
        }
        server.store(run, wire.Batch(id="b3", end=wire.End(at=1_790_000_100.0, status="failed")))
        last = json.loads(receiver.wait(4)[3][1])["data"]
        assert (last["rule"], last["state"], last["resolution"]) == (
            *("exploding", "resolved", "the run has ended: failed"),
        )


def test_only_receivers_that_were_notified_of_firing_are_notified_of_resolved(tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        server.http.post("/api/v1/silences", json={"run": "q*", "author": "kim", "ends_at": time.time() + 3600})
        quiet, loud = server.register(["a"], id="quiet", name="quiet"), server.register(["a"], name="loud")
        for run in (quiet, loud):
            server.store(run, ill(1))
            server.store(run, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
        assert notified(receiver, 2) == [("loud", "firing"), ("loud", "resolved")]
        assert len(server.get("/api/v1/deliveries")) == 2
        assert server.get("/api/v1/alerts", run=quiet)[0]["state"] == "resolved"


def worrying(step: int) -> wire.Batch:
    """A loss that is not finite beside gradients that are: a warning, which a gradient makes critical."""
    return wire.Batch(id=f"worrying{step}", samples=[sample(step, 1.0, loss=NAN)])


def severities(receiver: WebhookReceiver, count: int) -> list[tuple[str, str]]:
    data = [json.loads(body)["data"] for _, body in receiver.wait(count)]
    return [(entry["state"], entry["severity"]) for entry in data]


def test_becoming_critical_is_notified_unless_the_alert_is_acknowledged(tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        run = server.register(["a"], name="alone")
        server.store(run, worrying(1))
        server.store(run, ill(2))
        assert severities(receiver, 2) == [("firing", "warning"), ("firing", "critical")]
        server.store(run, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
        receiver.wait(3)
        run = server.register(["a"], name="cared")
        server.store(run, worrying(1))
        assert severities(receiver, 4)[3] == ("firing", "warning")
        (alert,) = server.get("/api/v1/alerts", run=run)
        path = f"/api/v1/alerts/{alert['id']}/acknowledge"
        assert server.http.post(path, json={"author": "kim"}).status_code == 200
        server.store(run, ill(2))
        (alert,) = server.get("/api/v1/alerts", run=run)
        assert (alert["severity"], alert["muted"]) == ("critical", "acknowledged by kim")
        server.store(run, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
        assert severities(receiver, 5)[4] == ("resolved", "critical")
        assert len(server.get("/api/v1/deliveries")) == 5


def test_the_mute_reason_is_kept_after_an_alert_resolved(server: GradwatchServer) -> None:
    run = server.register([f"layer{number}.weight" for number in range(4)])
    calm = [sample(step, *[1.0] * 4, loss=1.0) for step in range(1, 31)]
    grown = [sample(step, *[1e4] * 4, weight_norm=100.0, loss=50.0) for step in (31, 32)]
    server.store(run, wire.Batch(id="b1", samples=[*calm, *grown, sample(33, *[NAN] * 4, loss=NAN)]))
    server.store(run, wire.Batch(id="b2", end=wire.End(at=1_790_000_100.0)))
    muted_by = {alert["rule"]: (alert["state"], alert["muted"]) for alert in server.get("/api/v1/alerts")}
    assert muted_by == {"nonfinite": ("resolved", None), "exploding": ("resolved", "inhibited by nonfinite")}


def test_becoming_critical_just_as_the_silence_ends_is_notified_once(own_database_url: str) -> None:
    """No server runs, so no periodic check can notify of the end of the silence before the sample does."""
    engine, ingest = open_engine(own_database_url), Ingest(Configuration(), "http://localhost")
    migrate(engine)
    everything = {"project": "*", "run": "*", "rule": "*", "author": "kim", "comment": ""}
    with writing(engine) as connection:
        ingest.register(connection, "r", wire.Registration(parameters=[wire.Parameter("a", [4, 4], units=4)]))
        added = silences.add(connection, time.time(), **everything, ends_at=time.time() + 3600)
        ingest.store(connection, "r", worrying(1))
        silences.end(connection, added.id, time.time())
        ingest.store(connection, "r", ill(2))
        ingest.store(connection, "r", wire.Batch(id="well", samples=[sample(3, 1.0)]))
        transitions = connection.execute(sa.select(*schema.transitions.c["state", "severity", "step"])).all()
        muted = connection.execute(sa.select(schema.alerts.c.muted)).scalars().all()
    engine.dispose()
    assert transitions == [("firing", "critical", 2)]
    assert muted == [None]


def test_what_was_muted_by_an_acknowledgement_is_notified_when_it_is_withdrawn(tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        run = server.register(["a"])
        server.store(run, worrying(1))
        assert severities(receiver, 1) == [("firing", "warning")]
        (alert,) = server.get("/api/v1/alerts", run=run)
        path = f"/api/v1/alerts/{alert['id']}/acknowledge"
        assert server.http.delete(path).status_code == 409
        server.http.post(path, json={"author": "kim"})
        server.store(run, ill(2))
        withdrawn = server.http.delete(path).json()
        assert (withdrawn["acknowledged_by"], withdrawn["acknowledged_at"]) == (None, None)
        assert severities(receiver, 2)[1] == ("firing", "critical")


def test_an_acknowledgement_stays_until_the_alert_resolves(server: GradwatchServer) -> None:
    run = server.register(["a"])
    server.store(run, ill(1))
    (alert,) = server.get("/api/v1/alerts", run=run)
    path = f"/api/v1/alerts/{alert['id']}/acknowledge"
    assert server.http.post(path, json={"author": "kim"}).json()["acknowledged_by"] == "kim"
    assert server.get(f"/api/v1/alerts/{alert['id']}")["acknowledged_by"] == "kim"
    server.store(run, ill(2))
    assert server.get(f"/api/v1/alerts/{alert['id']}")["acknowledged_by"] == "kim"
    server.store(run, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
    assert server.http.post(path, json={"author": "kim"}).status_code == 409
    assert server.http.post("/api/v1/alerts/none/acknowledge", json={"author": "kim"}).status_code == 404


def test_an_alert_that_comes_back_soon_takes_longer_to_resolve(server: GradwatchServer) -> None:
    run = server.register(["a"])
    for time_around, first in enumerate((1, 101)):
        server.store(run, ill(first))
        server.store(run, wire.Batch(id=f"well{first}", samples=[sample(first + 1 + at, 1.0) for at in range(30)]))
        alert = server.get("/api/v1/alerts", run=run)[0]
        assert (alert["flaps"], alert["resolved_step"] - first) == ((0, 5), (1, 10))[time_around]
