"""The rules within ingest: a run is judged by its past only, in whatever batches it comes."""

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
