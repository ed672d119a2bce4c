"""The rules within ingest: a run is judged by its past only, in whatever batches it comes."""

import msgspec
import numpy as np
import pytest

from gradwatch import wire
from tests.processes import GradwatchServer, sample


def _explosion() -> list[wire.Sample]:
    """Forty calm steps, then a loss and gradients that grow twentyfold a step."""
    calm = [sample(step, 0.1, 0.1, loss=2.0 * 0.97**step) for step in range(1, 41)]
    loud = [sample(40 + index, 0.1 * 20**index, 0.1 * 20**index, loss=10.0 * 3**index) for index in range(1, 13)]
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
