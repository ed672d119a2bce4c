"""Events of an agent have bounds: their texts, their kinds, their number."""

import sqlite3
from contextlib import closing

from gradwatch import wire
from gradwatch_server.store.runs import MOST_EVENTS, MOST_KINDS
from tests.processes import GradwatchServer, sample


def test_a_long_message_is_cut_and_marked_wherever_it_goes(server: GradwatchServer) -> None:
    run = server.register(["layers.0.weight"])
    message = "m" * 1_000_000
    event = wire.Event(step=1, at=1.0, kind="nonfinite_module", message=message, parameter="layers.0")
    batch = wire.Batch(id="b", samples=[sample(1, float("nan"))], events=[event])
    assert server.store(run, batch).status_code == 200
    (shown,) = server.get(f"/api/v1/runs/{run}")["events"]
    assert len(shown["message"]) == 4_096
    assert shown["message"].endswith("mm... (cut: 1,000,000 characters)")
    assert len(server.http.get("/api/v1/alerts").content) < 20_000


def test_kinds_and_events_of_a_run_have_a_number(server: GradwatchServer) -> None:
    run = server.register(["a"])
    for batch in range(3):
        events = [wire.Event(step=batch, at=1.0, kind=f"kind {one}") for one in range(8_000)]
        assert server.store(run, wire.Batch(id=f"b{batch}", events=events)).status_code == 200
    shown = {event["kind"]: event["count"] for event in server.get(f"/api/v1/runs/{run}")["events"]}
    assert len(shown) <= MOST_KINDS + 1
    assert shown["other"] > 1_000
    assert sum(shown.values()) == MOST_EVENTS
    with closing(sqlite3.connect(server.database)) as connection:
        assert connection.execute("SELECT count(*), min(step) FROM events").fetchone() == (MOST_EVENTS, 1)
