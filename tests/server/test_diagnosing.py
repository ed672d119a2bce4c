"""The rules within ingest: a run is judged by its past only, in whatever batches it comes."""

import msgspec
import numpy as np
import pytest

from gradwatch import wire
from tests.processes import GradwatchServer, sample


def _explosion() -> list[wire.Sample]:
    """Forty calm steps, then a loss, weights, and gradients that grow twentyfold a step."""
    calm = [sample(step, 0.1, 0.1, loss=2.0 * 0.97**step) for step in range(1, 41)]
    loud = [
        sample(40 + index, 0.1 * 20**index, 0.1 * 20**index, weight_norm=2.0**index, loss=10.0 * 3**index)
        for index in range(1, 13)
    ]
    return [*calm, *loud]


@pytest.mark.parametrize("size", [52, 7, 1])
def test_an_explosion_fires_after_its_onset_however_it_is_sent(shared_server: GradwatchServer, size: int) -> None:
    parameters = [wire.Parameter(f"{name}.weight", [4, 4], units=4) for name in ("first", "second")]
    run = shared_server.post("/api/v1/runs", wire.Registration(parameters=parameters)).json()["id"]
    samples = _explosion()
    for first in range(0, len(samples), size):
        batch = wire.Batch(id=f"b{first}", samples=samples[first : first + size])
        assert shared_server.store(run, batch).status_code == 200
    (alert,) = [entry for entry in shared_server.get("/api/v1/alerts", run=run) if entry["rule"] == "exploding"]
    assert alert["state"] == "firing"
    assert (alert["first_step"], alert["fired_step"]) == (41, 43)


def _clipped(step: int, share: float) -> wire.Sample:
    """A calm sample whose loss stands still; the last parameter, the classifier, is never clipped."""
    plain = sample(step, 0.1, 0.1, loss=2.0)
    shares = np.array([share, 0.0], np.float32)
    return msgspec.structs.replace(plain, statistics={**plain.statistics, "clipped_unit_share": shares})


@pytest.mark.parametrize(("share", "fires_at"), [(1.0, 101), (0.5, None), (0.0, 1001)])
def test_clipping_that_decides_everything_or_nothing_is_told(
    shared_server: GradwatchServer, share: float, fires_at: int | None
) -> None:
    names = ["first.weight", "classifier.weight"]
    run = shared_server.register(names)
    for first in range(1, 1101, 100):
        samples = [_clipped(step, share) for step in range(first, first + 100)]
        assert shared_server.store(run, wire.Batch(id=f"b{first}", samples=samples)).status_code == 200
    alerts = shared_server.get("/api/v1/alerts", run=run)
    assert [(alert["rule"], alert["severity"], alert["fired_step"]) for alert in alerts] == (
        [] if fires_at is None else [("throttled", "warning", fires_at)]
    )
    if fires_at == 101:
        assert alerts[0]["parameters"][0] == {"name": "first.weight", "value": 1.0, "limit": 0.95}
        assert alerts[0]["state"] == "firing"
        assert alerts[0]["remedy"].startswith("Double the threshold")
        better = [_clipped(step, 0.3) for step in range(1101, 1111)]
        shared_server.store(run, wire.Batch(id="better", samples=better))
        assert shared_server.get("/api/v1/alerts", run=run)[0]["state"] == "resolved"


NAN = float("nan")
NAMED = wire.Event(step=4, at=1_790_000_004.0, kind="nonfinite_module", parameter="inner.norm", message="0/0")


@pytest.mark.parametrize("order", ["with the sample", "before the sample", "after the alert"])
def test_the_module_that_the_agent_names_is_blamed_whenever_the_event_comes(
    shared_server: GradwatchServer, order: str
) -> None:
    run = shared_server.register(["stem.weight", "inner.linear.weight", "head.weight"])
    calm = wire.Batch(id="calm", samples=[sample(step, 0.1, 0.1, 0.1, loss=2.0) for step in (1, 2)])
    ill = wire.Batch(id="ill", samples=[sample(4, NAN, NAN, NAN, loss=NAN)])
    event = wire.Batch(id="event", events=[NAMED])
    batches = {
        "with the sample": [calm, msgspec.structs.replace(ill, events=[NAMED])],
        "before the sample": [calm, event, ill],
        "after the alert": [calm, ill, event],
    }
    for batch in batches[order]:
        assert shared_server.store(run, batch).status_code == 200
    later = wire.Batch(id="later", samples=[sample(step, NAN, NAN, NAN, loss=NAN) for step in (5, 6)])
    shared_server.store(run, later)
    (alert,) = shared_server.get("/api/v1/alerts", run=run)
    assert (alert["rule"], alert["first_step"], alert["fired_step"]) == ("nonfinite", 4, 4)
    assert [entry["name"] for entry in alert["parameters"]] == ["inner.linear.weight", "head.weight", "stem.weight"]
    assert alert["cause"] == "The first result that was not finite came out of module inner.norm: 0/0."


def test_where_it_began_stays_blamed_when_all_is_bad(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["stem.weight", "inner.weight", "head.weight"])
    first = wire.Batch(id="first", samples=[sample(1, NAN, NAN, 0.1, loss=2.0)])
    for batch in (first, wire.Batch(id="second", samples=[sample(2, NAN, NAN, NAN, weight_norm=NAN, loss=NAN)])):
        shared_server.store(run, batch)
    (alert,) = shared_server.get("/api/v1/alerts", run=run)
    assert [entry["name"] for entry in alert["parameters"]] == ["inner.weight", "stem.weight", "head.weight"]
    assert alert["evidence"]["nonfinite_gradients"] == 2.0
    assert "just after inner.weight" in alert["cause"]


LAYERS = ("0.weight", "1.weight", "2.weight", "head.weight")


def _listed(frozen: int) -> list[wire.Parameter]:
    """Return the layers, the first of them frozen."""
    return [wire.Parameter(name, [4, 4], units=4, trainable=place >= frozen) for place, name in enumerate(LAYERS)]


def _layered(step: int, *first: float) -> wire.Sample:
    """A sample of a run that learns; ``first``: gradients of its first layers, the others have one."""
    return sample(step, *first, *[0.1] * (len(LAYERS) - len(first)), loss=3.0 * 0.99**step)


@pytest.mark.parametrize("attempt", [1, 2])
def test_frozen_layers_are_not_judged_and_unfrozen_ones_are_again(shared_server: GradwatchServer, attempt: int) -> None:
    none = (wire.MISSING, wire.MISSING)
    run = shared_server.post("/api/v1/runs", wire.Registration(parameters=_listed(0), attempt=1)).json()["id"]

    def send(name: str, attempt: int, samples: list[wire.Sample]) -> list[tuple[str, int]]:
        assert shared_server.store(run, wire.Batch(id=name, attempt=attempt, samples=samples)).status_code == 200
        found = shared_server.get("/api/v1/alerts", run=run)
        return [(alert["rule"], alert["fired_step"]) for alert in found]

    assert send("all", 1, [_layered(step) for step in range(1, 31)]) == []
    frozen = wire.Registration(id=run, parameters=_listed(2), attempt=attempt)
    assert shared_server.post("/api/v1/runs", frozen).status_code == 200
    described = shared_server.get(f"/api/v1/runs/{run}")["parameters"]
    assert [parameter["trainable"] for parameter in described] == [False, False, True, True]
    assert send("frozen", attempt, [_layered(step, *none) for step in range(31, 91)]) == []
    thawed = wire.Registration(id=run, parameters=_listed(0), attempt=attempt)
    assert shared_server.post("/api/v1/runs", thawed).status_code == 200
    assert send("thawed", attempt, [_layered(step) for step in range(91, 101)]) == []
    assert send("cut", attempt, [_layered(step, 0.0, 0.0) for step in range(101, 106)]) == [("dead", 104)]


def test_what_an_older_attempt_registers_late_freezes_nothing(shared_server: GradwatchServer) -> None:
    attributes = {"host": "second"}
    run = shared_server.post("/api/v1/runs", wire.Registration(parameters=_listed(2), attempt=1)).json()["id"]
    resumed = wire.Registration(id=run, parameters=_listed(0), attempt=2, attributes=attributes)
    assert shared_server.post("/api/v1/runs", resumed).status_code == 200
    assert shared_server.get(f"/api/v1/runs/{run}")["attributes"] == attributes
    late = wire.Registration(id=run, parameters=_listed(2), attempt=1, attributes={"host": "first"})
    assert shared_server.post("/api/v1/runs", late).status_code == 200
    described = shared_server.get(f"/api/v1/runs/{run}")
    assert all(parameter["trainable"] for parameter in described["parameters"])
    assert described["attributes"] == attributes


def test_metrics_take_an_unfrozen_layer_into_account(shared_server: GradwatchServer) -> None:
    run = shared_server.post("/api/v1/runs", wire.Registration(parameters=_listed(3))).json()["id"]
    batch = wire.Batch(id="b", samples=[sample(1, 0.001, 0.01, 0.1, 1.0, loss=1.0)])
    assert shared_server.store(run, batch).status_code == 200

    def slopes() -> list[str]:
        lines = shared_server.http.get("/metrics").text.splitlines()
        return [
            line.split()[-1]
            for line in lines
            if line.startswith("gradwatch_run_attenuation_decades_per_layer{") and run in line
        ]

    assert slopes() == ["NaN"]
    thawed = wire.Registration(id=run, parameters=_listed(0))
    assert shared_server.post("/api/v1/runs", thawed).status_code == 200
    assert [round(float(slope), 3) for slope in slopes()] == [1.0]


def _bad(steps: range) -> list[wire.Sample]:
    return [sample(step, NAN, NAN, loss=9.0) for step in steps]


def _good(steps: range, loss: float = 1.0) -> list[wire.Sample]:
    return [sample(step, 0.1, 0.1, loss=loss) for step in steps]


def test_a_late_sample_that_is_not_finite_is_told_once(shared_server: GradwatchServer) -> None:
    run = shared_server.register()
    parts = [_good(range(1, 11)), _good(range(21, 31)), _bad(range(11, 15)), _bad(range(15, 18)), _good(range(31, 46))]
    seen = []
    for name, samples in enumerate([*parts, _bad(range(18, 21))]):
        assert shared_server.store(run, wire.Batch(id=str(name), samples=samples)).status_code == 200
        alerts = shared_server.get("/api/v1/alerts", run=run)
        seen.append([(alert["state"], alert["first_step"], alert["fired_step"]) for alert in alerts])
    assert seen == [[], [], [("firing", 11, 11)], [("firing", 11, 11)], [("resolved", 11, 11)], [("resolved", 11, 11)]]


def test_a_late_sample_ends_no_other_alert(shared_server: GradwatchServer) -> None:
    run = shared_server.register()
    for name, samples in enumerate(
        [_good(range(1, 11)), _bad(range(21, 31)), _good(range(11, 21)), _bad(range(11, 21))]
    ):
        assert shared_server.store(run, wire.Batch(id=str(name), samples=samples)).status_code == 200
    (alert,) = shared_server.get("/api/v1/alerts", run=run)
    assert (alert["state"], alert["fired_step"]) == ("firing", 21)


@pytest.mark.parametrize("step", [5, 20])
def test_what_a_sample_raises_after_the_end_is_over_at_once(shared_server: GradwatchServer, step: int) -> None:
    run = shared_server.register()
    ended = wire.Batch(id="a", samples=_good(range(6, 11)), end=wire.End(at=1_790_000_011.0))
    assert shared_server.store(run, ended).status_code == 200
    assert shared_server.store(run, wire.Batch(id="b", samples=_bad(range(step, step + 1)))).status_code == 200
    (alert,) = shared_server.get("/api/v1/alerts", run=run)
    assert (alert["rule"], alert["state"], alert["fired_step"]) == ("nonfinite", "resolved", step)
    assert alert["resolution"] == "the run has ended: completed"
    assert shared_server.get(f"/api/v1/runs/{run}")["state"] == "finished"
