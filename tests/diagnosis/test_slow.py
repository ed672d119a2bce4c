"""Slow: weights that hardly move while the loss does not fall, and what only looks like it."""

from collections.abc import Iterator
from itertools import count

import pytest

from gradwatch_server.diagnosis import Finding, History
from tests.diagnosis.ticks import Watch, held

SIZE = 3.0


def ticks(watch: Watch, share: float, steps: int, loss: float = 2.3, rate: float = 1e-8) -> list[dict[str, Finding]]:
    """Look at samples at which each weight moves by this share of itself."""
    return [
        watch.tick(0.1, weights=SIZE * (1 + 3e-7 * index), update=share * SIZE, loss=loss, learning_rate=rate)
        for index in range(steps)
    ]


@pytest.mark.parametrize("every", [1, 10])
def test_a_rate_that_is_far_too_small_is_told_after_fifty_steps(every: int) -> None:
    watch = Watch(every=every)
    found = ticks(watch, 1e-8, 70 // every)
    first = held(found, "slow").index(True)
    assert first * every == 50
    finding = found[first]["slow"]
    assert finding.severity == "warning"
    assert finding.first_step == every
    assert "a factor of about 100,000" in finding.cause
    assert len(finding.parameters) == 8


def test_it_survives_being_written_down() -> None:
    watch = Watch()
    ticks(watch, 1e-8, 30)
    watch.history = History.from_bytes(watch.history.to_bytes())
    assert held(ticks(watch, 1e-8, 30), "slow").index(True) == 20


def test_weights_that_move_are_not_slow() -> None:
    assert not any("slow" in found for found in ticks(Watch(), 2e-6, 200))


def test_a_loss_that_falls_is_not_slow() -> None:
    watch = Watch()
    found = [ticks(watch, 1e-7, 1, loss=2.3 * 0.99**index)[0] for index in range(200)]
    assert not any("slow" in each for each in found)


def test_the_end_of_a_schedule_is_not_slow() -> None:
    watch = Watch()
    ticks(watch, 1e-3, 60, loss=2.3)
    ticks(watch, 1e-3, 60, loss=0.4)
    assert not any("slow" in found for found in ticks(watch, 1e-9, 200, loss=0.4))


def test_a_warm_up_is_not_slow_until_it_stays_where_it_is() -> None:
    watch = Watch()
    rates: Iterator[float] = (1e-12 * 1.1**number for number in count())
    assert not any("slow" in ticks(watch, 1e-8, 1, rate=next(rates))[0] for _ in range(100))
    assert held(ticks(watch, 1e-8, 70, rate=1e-9), "slow").index(True) == 49


def test_a_warm_up_that_ends_between_samples_is_not_slow() -> None:
    """Where nothing of the matrices' changes was measured at a sample, rate and norms tell."""
    for size, rate in (SIZE, 0.2), (1.1 * SIZE, 1e-8):
        watch = Watch(every=5)
        ticks(watch, 1e-8, 4)
        found = [watch.tick(0.1, weights=size, update=-1.0, loss=2.3, learning_rate=rate) for _ in range(40)]
        assert not any("slow" in each for each in found)


def test_a_head_that_is_trained_above_a_body_at_rest_is_not_slow() -> None:
    watch = Watch()
    updates = [1e-9 * SIZE] * 14 + [1e-3 * SIZE] * 2
    for index in range(100):
        assert "slow" not in watch.tick(0.1, weights=SIZE * (1 + 3e-7 * index), update=updates, loss=2.3)
