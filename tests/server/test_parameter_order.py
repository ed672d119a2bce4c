"""A run that is resumed with its parameters in another order, with some of them, or with more."""

import numpy as np
import pytest

from gradwatch import wire
from gradwatch_server.ingest.parameter_order import order_of
from gradwatch_server.ingest.registration import _bounded
from tests.processes import GradwatchServer, sample


def _store(server: GradwatchServer, run: str, attempt: int, step: int, *values: float) -> None:
    batch = wire.Batch(id=f"{attempt}-{step}", attempt=attempt, samples=[sample(step, *values)])
    answer = server.store(run, batch)
    assert answer.status_code == 200, answer.text


def _measured(server: GradwatchServer, run: str) -> list[dict[str, float | None]]:
    seen = server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=100)
    return [dict(zip(seen["parameters"], values, strict=True)) for values in seen["last"]]


def test_an_attempt_may_list_the_parameters_in_another_order(shared_server: GradwatchServer) -> None:
    """A lazy layer is found last the first time, and in its place when the training is resumed."""
    run = shared_server.register(["head", "lazy"], attempt=1)
    _store(shared_server, run, 1, 1, 1.0, 2.0)
    shared_server.register(["lazy", "head"], id=run, attempt=2)
    _store(shared_server, run, 2, 2, 20.0, 10.0)
    _store(shared_server, run, 1, 0, 3.0, 4.0)  # of the first attempt, late
    assert _measured(shared_server, run) == [
        {"head": 3.0, "lazy": 4.0},
        {"head": 1.0, "lazy": 2.0},
        {"head": 10.0, "lazy": 20.0},
    ]


def test_an_attempt_may_find_its_parameters_one_after_the_other(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a", "b", "c"], attempt=1)
    _store(shared_server, run, 1, 1, 1.0, 2.0, 3.0)
    shared_server.register(["c"], id=run, attempt=2)
    _store(shared_server, run, 2, 2, 30.0)
    shared_server.register(["c", "d", "a", "b"], id=run, attempt=2)
    shared_server.register(["c"], id=run, attempt=2)  # sent again: it changes nothing
    _store(shared_server, run, 2, 3, 300.0, 400.0, 100.0, 200.0)
    assert _measured(shared_server, run) == [
        {"a": 1.0, "b": 2.0, "c": 3.0, "d": None},
        {"a": None, "b": None, "c": 30.0, "d": None},
        {"a": 100.0, "b": 200.0, "c": 300.0, "d": 400.0},
    ]
    short = wire.Batch(id="short", attempt=2, samples=[sample(4, 1.0)])
    assert shared_server.store(run, short).status_code == 422


def test_an_older_attempt_that_finds_more_leaves_the_latest_as_it_is(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a"], attempt=1)
    shared_server.register(["a"], id=run, attempt=2)
    shared_server.register(["a", "b"], id=run, attempt=1)
    _store(shared_server, run, 1, 1, 1.0, 2.0)
    _store(shared_server, run, 2, 2, 10.0)
    assert _measured(shared_server, run) == [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": None}]


def test_a_late_batch_of_an_attempt_that_found_more_since(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a", "b", "c"], attempt=1)
    shared_server.register(["c"], id=run, attempt=2)
    shared_server.register(["c", "a", "b"], id=run, attempt=2)
    shared_server.register(["a", "b", "c"], id=run, attempt=3)
    _store(shared_server, run, 2, 1, 7.0)
    assert _measured(shared_server, run) == [{"a": None, "b": None, "c": 7.0}]
    long = wire.Batch(id="long", attempt=2, samples=[sample(2, 1.0, 2.0, 3.0, 4.0)])
    assert shared_server.store(run, long).status_code == 422


def test_a_state_belongs_to_the_parameter_that_the_attempt_means(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a", "b", "c"], attempt=1)
    shared_server.register(["c", "a", "b"], id=run, attempt=2)
    told = wire.Sample(step=1, at=1.0, statistics={"grad_norm": np.array([-1, -1, 0.5], np.float32)}, unstepped=[1])
    assert shared_server.store(run, wire.Batch(id="1", attempt=2, samples=[told])).status_code == 200
    body = shared_server.http.get(f"/api/v1/runs/{run}/tile", params={"statistic": "grad_norm"}).content
    assert body.count(np.float32(wire.UNSTEPPED).tobytes()) > 0
    (kept,) = shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm", points=10)["last"]
    assert kept == [None, 0.5, None]


def test_orders_beyond_the_bound_are_forgotten_and_what_comes_of_them_is_refused() -> None:
    wide = [[2 * index, 1] for index in range(3_000)]
    kept = _bounded({"1": [[1, 1]], "2": wide, "3": wide, "4": wide})
    assert [(attempt, len(order)) for attempt, order in kept.items()] == [
        ("4", 3_000),
        ("3", 3_000),
        ("2", 0),
        ("1", 0),
    ]


def test_a_blamed_parameter_is_the_one_that_the_attempt_means(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["head", "lazy"], attempt=1)
    _store(shared_server, run, 1, 1, 1.0, 1.0)
    shared_server.register(["lazy", "head"], id=run, attempt=2)
    _store(shared_server, run, 2, 2, np.nan, 1.0)
    (alert,) = shared_server.get("/api/v1/alerts", run=run)
    assert [blamed["name"] for blamed in alert["parameters"]] == ["lazy"]


@pytest.mark.parametrize("names", [["a", "z"], ["z"], ["b", "z", "c"]])
def test_another_network_is_refused(shared_server: GradwatchServer, names: list[str]) -> None:
    run = shared_server.register(["a", "b"], attempt=1)
    listed = [wire.Parameter(name, [4, 4], units=4) for name in names]
    refused = shared_server.post("/api/v1/runs", wire.Registration(id=run, attempt=2, parameters=listed))
    assert refused.status_code == 409
    assert "'z'" in refused.json()["detail"]


def test_an_order_is_stored_in_segments() -> None:
    listed = [wire.Parameter(name, [1]) for name in ("c", "d", "a", "b")]
    assert order_of(["a", "b", "c", "d"], listed) == [[2, 2], [0, 2]]
