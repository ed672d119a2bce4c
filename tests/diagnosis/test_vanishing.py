"""Vanishing: fading with depth, starved everywhere, collapsed; and what only looks like it."""

import numpy as np
import pytest

from gradwatch.wire import Parameter
from tests.diagnosis.ticks import LAYERS, Watch, fading, network


@pytest.mark.parametrize(("decades", "expected"), [(0.3, False), (0.7, True), (1.5, True)])
def test_fading_is_measured_between_the_outer_thirds(decades: float, expected: bool) -> None:
    watch = Watch()
    found = [watch.tick(fading(decades), loss=2.3) for _ in range(5)]
    assert all(("vanishing" in each) is expected for each in found)


def test_evidence_is_the_attenuation_a_layer() -> None:
    finding = Watch().tick(fading(1.0), loss=2.3)["vanishing"]
    assert finding.evidence["decades_per_layer"] == pytest.approx(1.0, rel=1e-5)
    assert finding.severity == "critical"
    assert finding.parameters[0].name in ("0.weight", "0.bias")
    assert "0.1 of the gradient" in finding.cause


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_of_loss_and_gradient_changes_nothing(scale: float) -> None:
    watch = Watch()
    sick = watch.tick([scale * value for value in fading(1.0)], loss=2.3 * scale)
    assert "vanishing" in sick
    healthy = Watch()
    assert not healthy.tick([scale * value for value in fading(0.1)], loss=2.3 * scale)


def test_converged_is_not_vanished() -> None:
    """Loss and gradients go to nothing together: that is what training is for."""
    watch = Watch()
    for index in range(300):
        share = 0.93**index
        assert not watch.tick(0.1 * share, loss=2.3 * share)


def test_converged_to_a_floor_is_not_vanished() -> None:
    watch = Watch()
    for index in range(300):
        share = 0.93**index
        assert not watch.tick(0.1 * share, loss=1.0 + 1.3 * share)


def test_tiny_from_the_start_with_a_high_loss_is_starved() -> None:
    found = [Watch().tick(1e-9, loss=2.3) for _ in range(3)]
    assert all("vanishing" in each for each in found)


def test_saturated_midway_is_starved() -> None:
    watch = Watch()
    watch.learn(60)
    found = [watch.tick(1e-9, loss=3.0) for _ in range(6)]
    assert all("vanishing" in each for each in found[3:])


def test_layers_that_lose_what_they_had_have_collapsed() -> None:
    watch = Watch()
    watch.learn(30, rate=0.995)
    gradients = [1e-8] * (2 * LAYERS - 2) + [0.1, 0.1]
    found = [watch.tick(gradients, loss=2.2) for _ in range(4)]
    assert all("vanishing" in each for each in found)


def test_branches_that_start_at_a_tiny_gain_are_not_vanished() -> None:
    """LayerScale: all but the stem and the head have a hundred-thousandth of the gradient, and gain on them."""
    watch = Watch()
    for index in range(60):
        branch = 1e-6 * 1.2**index
        gradients = [0.1, 0.1, *[min(branch, 0.1)] * (2 * LAYERS - 4), 0.1, 0.1]
        assert not watch.tick(gradients, loss=2.3 * 0.99**index)


def test_a_head_that_starts_at_zero_is_not_vanishing() -> None:
    watch = Watch()
    for index in range(20):
        behind = 0.0 if index == 0 else 1e-3 * index
        found = watch.tick([behind] * (2 * LAYERS - 2) + [0.1, 0.1], loss=2.3 * 0.98**index)
        finding = found.get("vanishing")
        assert finding is None or (index == 0 and finding.hold_samples > 1)


def test_a_cut_is_not_vanishing() -> None:
    """Half of the gradients end at once at a layer whose successor has an input of zero: dead."""
    watch = Watch()
    watch.learn(20)
    gradients = np.full(2 * LAYERS, 0.1)
    gradients[:9] = 0.0  # layers 0 to 3 wholly, and the weight, not the bias, of layer 4
    found = [watch.tick(list(gradients), loss=2.3) for _ in range(6)]
    assert not any("vanishing" in each for each in found)
    assert found[-1]["dead"].parameters[0].name == "3.bias"


def test_few_layers_count_only_while_nothing_is_learned_and_have_to_last() -> None:
    sick, learning = Watch(network(3)), Watch(network(3))
    assert sick.tick(fading(3.0, layers=3), loss=2.3)["vanishing"].hold_samples == 20
    learning.learn(20)
    for index in range(10):
        assert not learning.tick(fading(3.0, layers=3), loss=1.2 * 0.99**index)


def _actor_and_critic() -> list[Parameter]:
    return [
        Parameter(f"{part}.{entry.name}", entry.shape, units=entry.units, kind=entry.kind)
        for part in ("actor", "critic")
        for entry in network(3, bias=False)
    ]


def test_networks_side_by_side_are_not_one_chain() -> None:
    """The actor's gradients are six decades smaller than the critic's, and do not fade within it."""
    watch = Watch(_actor_and_critic())
    for _ in range(60):
        assert not watch.tick([1e-7, 2e-7, 3e-7, 0.1, 0.2, 0.3], loss=2.3)
    assert "vanishing" in watch.tick([1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2], loss=2.3)


def test_two_chains_side_by_side_are_seen_each_by_itself() -> None:
    """A gate's gradient is far smaller than its layer's, so that all together are in no order."""
    parameters = [
        Parameter(f"{part}.{index}.weight", [32, 32], depth=2 * index + (part == "made"), units=32)
        for part in ("gates", "made")
        for index in range(8)
    ]
    watch = Watch(parameters)
    gradients = [10.0 ** (index - 14) for index in range(8)] + [10.0 ** (index - 8) for index in range(8)]
    assert "vanishing" in watch.tick(gradients, loss=2.3)


def test_a_loss_of_zero_by_construction_is_not_starved() -> None:
    """Group-relative policies have a loss of zero, and no gradient once everything is solved."""
    watch = Watch()
    for index in range(40):
        assert not watch.tick(0.1, loss=1e-8 * (-1) ** index)
    for index in range(40):
        assert not watch.tick(1e-12, loss=1e-9 * (-1) ** index)


def test_a_collapse_to_chance_is_told_from_convergence_by_losses_that_vary() -> None:
    """At a minimum of the mean, the gradients of single batches differ from zero unless each batch is fitted."""
    collapsed, converged = Watch(), Watch()
    for watch in (collapsed, converged):
        watch.learn(60, loss=300.0, rate=0.92)
    for index in range(30):
        found = collapsed.tick(1e-11, loss=2.3 + 0.01 * (index % 5))
        fitted = converged.tick(1e-11, loss=2.3)
        assert index < 5 or not fitted
    assert found["vanishing"].hold_samples == 20
