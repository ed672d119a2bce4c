"""Exploding: surge, blow-up, out of proportion, amplification; spikes that recover, and overflow."""

import math

import pytest

from gradwatch_server.alerting.lifecycle import Alert, advance
from tests.diagnosis.ticks import LAYERS, Watch, fading, held, network


def test_a_surge_with_a_rising_loss() -> None:
    watch = Watch()
    watch.learn(30)
    found = [
        watch.tick(0.1 * 20 ** (1 + index), weights=6.0 * 2**index, loss=2.3 * 3 ** (index + 1)) for index in range(4)
    ]
    assert all("exploding" in each for each in found)
    assert found[-1]["exploding"].first_step == 31


def test_a_loss_that_switches_multiplies_the_gradient_and_leaves_the_weights() -> None:
    """Another loss, or a sum over more, raises loss and gradient alike; the weights go on as before."""
    watch = Watch()
    watch.learn(40)
    for index in range(60):
        found = watch.tick(100.0, weights=3.0 + 0.02 * index, loss=2300.0 * 0.99**index, update=0.05)
        assert not found, found


def test_an_update_out_of_proportion_shows_before_the_weights_do() -> None:
    watch = Watch()
    watch.learn(40)
    found = [watch.tick(100.0, loss=2300.0, update=5.0) for _ in range(3)]
    assert held(found, "exploding") == [True] * 3


def test_a_growing_gradient_with_a_falling_loss_leaves_a_saddle() -> None:
    watch = Watch()
    for index in range(100):
        assert not watch.tick(1e-4 * 1.1**index, loss=2.3 - 0.02 * index)


def test_a_spike_that_recovers_does_not_fire() -> None:
    watch = Watch()
    watch.learn(40)
    alert: Alert | None = None
    pattern = [(8.0, 9.0), (3.0, 5.0), (0.5, 0.9), (0.1, 0.7), (0.1, 0.7)]
    for gradient, loss in pattern:
        found = watch.tick(gradient, loss=loss)
        alert, transition = advance(alert, found.get("exploding"), watch.step, 0.0)
        assert transition is None
    assert alert is None


def test_a_run_that_does_not_recover_goes_on_holding() -> None:
    watch = Watch()
    watch.learn(40)
    watch.tick(500.0, loss=900.0, update=9.0)
    found = [watch.tick(0.1, weights=12.0, loss=40.0) for _ in range(30)]
    assert all("exploding" in each for each in found)
    assert not watch.tick(0.1, weights=12.0, loss=0.7)


def test_a_warm_restart_is_not_an_explosion() -> None:
    """After convergence to 1e-3, gradient and loss jump by two decades, but not above where the run began."""
    watch = Watch()
    watch.learn(250, rate=0.97)
    for loss in (0.3, 0.5, 0.6, 0.4, 0.3, 0.2):
        assert not watch.tick(0.2, loss=loss)


def test_out_of_proportion_from_the_first_sample() -> None:
    finding = Watch().tick(3e5, weights=30.0, loss=3e5)["exploding"]
    assert finding.evidence["median_leverage"] == pytest.approx(30.0, rel=1e-3)
    assert finding.evidence["median_ratio"] == pytest.approx(1e4, rel=1e-3)


def test_a_loss_that_is_a_sum_is_in_proportion() -> None:
    """A thousand times the loss and the gradient: the ratio is large, the leverage as it was."""
    assert not Watch().tick(100.0, loss=2300.0)


def test_gradients_that_grow_towards_the_input() -> None:
    gradients = fading(-0.4, first=1.0)
    assert "exploding" in Watch().tick(gradients, weights=30.0, loss=4.0)


def test_weights_that_multiply() -> None:
    watch = Watch()
    for index in range(4):
        found = watch.tick(0.1, weights=3.0 * 2.0**index, loss=2.4)
    assert "exploding" in found


def test_weights_that_multiply_while_the_loss_falls_are_fine() -> None:
    watch = Watch()
    for index in range(40):
        assert not watch.tick(0.1, weights=3.0 * 1.1**index, loss=2.3 * 0.95**index)


def test_an_explosion_that_overflows_fires_at_once() -> None:
    watch = Watch()
    watch.learn(20)
    watch.tick(1e4, loss=1e5, update=100.0)
    found = watch.tick(math.nan, loss=math.nan)
    assert found["exploding"].hold_samples == 1
    assert "step 21" in found["nonfinite"].cause


def test_losses_between_samples_tell_an_explosion_from_a_faulty_operation() -> None:
    for between, expected in (([1.0, 30.0, 5e6, math.nan], True), ([1.0, 0.9, math.nan, math.nan], False)):
        watch = Watch(every=4)
        watch.learn(20)
        losses = [(watch.step + 1 + index, loss) for index, loss in enumerate(between)]
        found = watch.tick(math.nan, loss=math.nan, losses=losses)
        assert ("exploding" in found) is expected
        assert found["nonfinite"].first_step == next(step for step, loss in losses if math.isnan(loss))


def test_clipping_to_nothing_is_an_explosion() -> None:
    found = Watch().tick(0.0, loss=1e18, clip_norm=math.inf)
    assert found["exploding"].hold_samples == 1


def test_an_explosion_is_not_its_own_yardstick() -> None:
    watch = Watch()
    watch.learn(20)
    for _ in range(200):
        found = watch.tick(1e4, weights=100.0, loss=1e5)
    assert "exploding" in found
    assert watch.history.usual_log_gradient == pytest.approx(math.log10(0.1 * (2 * LAYERS) ** 0.5), abs=1e-6)


def _backward(decades_a_layer: float) -> list[float]:
    """Return even gradients of weights, and biases whose gradients grow towards the input."""
    return [0.1 if index % 2 == 0 else 0.1 * 10 ** (decades_a_layer * (LAYERS - index // 2)) for index in range(16)]


def test_what_flows_back_may_not_grow_by_decades_even_where_the_loss_falls() -> None:
    watch, steady = Watch(), Watch()
    found = [watch.tick(_backward(1.0), loss=1e7 * 0.8**index) for index in range(4)]
    assert held(found, "exploding") == [True] * 4
    assert found[0]["exploding"].evidence["swelling_decades"] == pytest.approx(6.0, abs=0.01)
    assert not held([steady.tick(_backward(0.3), loss=2.3 * 0.98**index) for index in range(4)], "exploding")[-1]


def test_a_loss_that_is_high_by_design_moves_the_weights_no_further() -> None:
    watch = Watch(every=10)
    watch.learn(5)
    for first in range(51, 400, 10):
        losses = [(step, 9.0) for step in range(first, first + 10)]
        assert not watch.tick(0.1, weights=3.0 + first / 100, loss=9.0, losses=losses)


@pytest.mark.parametrize("initial", [0.03, 1e-3])
def test_weights_that_begin_small_are_meant_to_grow(initial: float) -> None:
    watch = Watch()
    for index in range(40):
        assert not watch.tick(0.1, weights=min(5.0, initial * 1.5**index), loss=2.3)


def test_a_loss_that_passes_through_zero_says_nothing_of_proportion() -> None:
    """Losses of policies and critics are near zero by construction: the leverage is as large as one likes."""
    watch = Watch()
    watch.tick(50.0, loss=1e-3)
    for index in range(60):
        assert not watch.tick(50.0, loss=-1e-3 * (-1) ** index)


def test_a_loss_that_stays_high_with_grown_weights_has_diverged() -> None:
    watch = Watch(every=10)
    watch.learn(5)
    weights = [3.0] * (2 * LAYERS)
    high = [(step, 9.0) for step in range(51, 111)]
    calm = watch.tick(0.1, weights=weights, loss=9.0, losses=high[:10])
    assert "exploding" not in calm
    grown = [watch.tick(0.1, weights=16.0, loss=9.0, losses=high[first : first + 10]) for first in (10, 20, 30)]
    assert held(grown, "exploding")[-1]
    assert grown[-1]["exploding"].hold_samples == 1


def test_an_explosion_between_two_samples_is_seen_in_the_losses() -> None:
    watch = Watch(every=7)
    watch.tick(0.1, loss=2.3)
    wild = [(2, 2.3), (3, 1e4), (4, 1e6), (5, 1e5), (6, 2.4), (7, 2.3), (8, 2.3)]
    assert watch.tick(0.1, loss=2.3, losses=wild)["exploding"].evidence["largest_loss"] == 1e6
    once = Watch(every=7)
    once.tick(0.1, loss=2.3)
    single = [(step, 1e6 if step == 4 else 2.3) for step in range(2, 9)]
    assert "exploding" not in once.tick(0.1, loss=2.3, losses=single)


def test_a_spike_at_the_sample_itself_is_judged_by_its_neighbours() -> None:
    watch = Watch(every=25)
    watch.learn(20)
    for first in range(501, 700, 25):
        losses = [(step, 20.0 if step == first + 24 else 1.0) for step in range(first, first + 25)]
        assert "exploding" not in watch.tick(20.0, loss=20.0, losses=losses)


@pytest.mark.parametrize("every", [1, 40])
def test_weights_that_grow_at_their_own_pace_under_a_sum_that_grows_are_no_explosion(every: int) -> None:
    """A summed loss of episodes that grow longer as the policy learns, whose weights began small."""
    watch = Watch(every=every)
    for index in range(600 // every):
        share = index * every / 600
        lately = [(watch.step + 1 + at, 20.0 + 200.0 * share) for at in range(every - 1)]
        found = watch.tick(0.1, weights=3.0 * 10**share, loss=20.0 + 200.0 * share, losses=lately)
        assert "exploding" not in found


def test_weights_that_jump_while_the_loss_rises_between_two_samples_are_one() -> None:
    watch = Watch(every=40)
    for index in range(10):
        lately = [(watch.step + 1 + at, 2.0) for at in range(39)]
        watch.tick(0.1, weights=3.0 * 1.02**index, loss=2.0, losses=lately)
    for _ in range(2):
        risen = [(watch.step + 1 + at, 9.0) for at in range(39)]
        found = watch.tick(0.1, weights=18.0, loss=9.0, losses=risen)
    assert found["exploding"].severity == "critical"


def test_two_matrices_may_grow_fast() -> None:
    """Layers that are trained one at a time, by an optimizer whose steps are as large as their first weights."""
    watch = Watch(network(2))
    for weight in (3.0, 4.5, 7.0, 10.0, 14.0, 15.0, 14.0, 13.0):
        assert "exploding" not in watch.tick(0.1, weights=weight, loss=1.1)
