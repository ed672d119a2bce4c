"""Unmoved: gradients without a change of the weight, whoever is to blame, and what only looks like it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gradwatch.wire import MISSING, UNSTEPPED
from gradwatch_server.diagnosis import Finding
from tests.diagnosis.ticks import LAYERS, Watch, held, network

SIZE = 2 * LAYERS
MOVED = 0.01


class Weights:
    """The weights of a network, of which each sample moves some."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.norms = np.full(SIZE, 3.0)

    def tick(
        self, moves: Sequence[bool] | bool, gradients: float | Sequence[float] = 0.1, **known: Any
    ) -> dict[str, Finding]:
        """Look at a sample; after it the weights move that are told to, by a hundredth."""
        flags = np.broadcast_to(np.array(moves), SIZE)
        known.setdefault("update", np.where(flags, MOVED, 0.0))
        found = self.watch.tick(gradients, weights=self.norms.tolist(), **known)
        self.norms = self.norms * np.where(flags, 1.001, 1.0)
        return found


def states(layers: int, value: float = UNSTEPPED) -> list[float]:
    """Return gradients of which those of the first layers have a state instead."""
    return [value] * (2 * layers) + [0.1] * (SIZE - 2 * layers)


def moving(first: int) -> list[bool]:
    """Return which parameters move: those of all layers from one on."""
    return [index >= 2 * first for index in range(SIZE)]


def test_what_no_optimizer_holds_is_told_within_five_samples() -> None:
    weights = Weights(Watch())
    found = [weights.tick(moving(6), states(6), loss=2.0) for _ in range(60)]
    assert held(found, "unmoved").index(True) == 5
    finding = found[5]["unmoved"]
    assert {each["unmoved"].severity for each in found[5:]} == {"warning"}, "a head may be trained before the body"
    assert [blame.name for blame in finding.parameters[:6]] == [f"{layer}.weight" for layer in range(6)]
    assert finding.summary == "12 parameters, 0.weight first, have gradients, but no optimizer steps them"
    assert finding.first_step == 1
    assert not any("dead" in each for each in found)


def test_an_optimizer_over_nothing_of_the_network_is_critical() -> None:
    weights = Weights(Watch())
    found = [weights.tick(False, states(LAYERS), loss=2.0) for _ in range(21)]
    assert [each["unmoved"].severity for each in found[5:]] == ["warning"] * 15 + ["critical"]


def test_a_single_layer_is_a_warning() -> None:
    weights = Weights(Watch())
    found = [weights.tick(moving(1), states(1), loss=2.0) for _ in range(7)]
    assert found[-1]["unmoved"].severity == "warning"


def test_what_something_else_moves_is_silent() -> None:
    weights = Weights(Watch())
    assert not any(weights.tick(True, states(6), loss=2.0) for _ in range(30))


def test_a_network_behind_all_that_is_trained_makes_the_loss() -> None:
    parameters = network()
    named = [
        parameter.__class__(f"{'net' if index < SIZE // 2 else 'judge'}.{parameter.name}", parameter.shape, units=32)
        for index, parameter in enumerate(parameters)
    ]
    weights = Weights(Watch(named))
    behind = [0.1] * (SIZE // 2) + [UNSTEPPED] * (SIZE // 2)
    assert not any(weights.tick(moving(0)[: SIZE // 2] + [False] * (SIZE // 2), behind, loss=2.0) for _ in range(30))
    before = Weights(Watch(named))
    found = [before.tick(moving(LAYERS // 2), behind[::-1], loss=2.0) for _ in range(8)]
    assert "unmoved" in found[-1]


@pytest.mark.parametrize(
    ("scalars", "clipped", "cause"),
    [
        ({"learning_rate": 0.0, "learning_rate.1": 0.0}, 0.1, "has been since the run began"),
        ({"learning_rate": 1e-3}, 1e-12, "Clipping leaves nothing"),
        ({"learning_rate": 1e-3}, 0.1, "rounded away"),
    ],
)
def test_a_network_that_never_moves_has_a_cause(scalars: dict[str, float], clipped: float, cause: str) -> None:
    weights = Weights(Watch())
    found = [weights.tick(False, loss=2.3, clipped=clipped, **scalars) for _ in range(30)]
    assert held(found, "unmoved").index(True) == 20
    assert cause in found[-1]["unmoved"].cause
    assert found[-1]["unmoved"].severity == "critical"


def test_a_schedule_that_has_run_out() -> None:
    weights = Weights(Watch())
    assert not any(weights.tick(True, loss=2.0 * 0.97**index, learning_rate=1e-3) for index in range(20))
    found = [weights.tick(False, loss=1.0, learning_rate=0.0) for _ in range(22)]
    assert held(found, "unmoved").index(True) == 20
    assert "has run out" in found[-1]["unmoved"].cause
    assert found[20]["unmoved"].first_step == 21


def test_a_warm_up_of_a_resumed_attempt_is_none() -> None:
    weights = Weights(Watch())
    weights.tick(False, loss=2.0, learning_rate=0.0)
    weights.watch.history = weights.watch.history.resumed()
    assert not any("unmoved" in weights.tick(False, loss=2.0, learning_rate=0.0) for _ in range(12))


def test_an_optimizer_that_sums_up_gradients_of_some_steps_moves_now_and_then() -> None:
    weights = Weights(Watch())
    assert not any("unmoved" in weights.tick(step % 16 == 0, loss=2.0) for step in range(100))


def test_a_rate_that_begins_at_zero_or_ends_there_is_silent() -> None:
    weights = Weights(Watch())
    assert not any(weights.tick(False, loss=2.3, learning_rate=0.0) for _ in range(15))
    assert not any(weights.tick(True, loss=2.3 * 0.97**index, learning_rate=1e-3) for index in range(30))
    assert not any(weights.tick(False, loss=1.0, learning_rate=0.0) for _ in range(4))


def test_a_part_may_wait_for_its_turn() -> None:
    weights = Weights(Watch())
    found = [weights.tick(moving(6), loss=2.0 * 0.99**index) for index in range(120)]
    assert held(found, "unmoved").index(True) == 100
    again = Weights(Watch())
    turns = [again.tick(moving(6) if index // 60 % 2 else True, loss=2.0 * 0.99**index) for index in range(240)]
    assert not any(turns)


def test_samples_without_a_gradient_neither_count_nor_end_the_time() -> None:
    weights = Weights(Watch())
    found = [weights.tick(moving(6), states(6, MISSING if index % 2 else UNSTEPPED), loss=2.0) for index in range(12)]
    assert held(found, "unmoved").index(True) == 10


def test_what_is_put_back_is_told_only_where_nothing_is_learned() -> None:
    weights = Weights(Watch())
    found = [weights.tick(False, loss=2.3, update=0.01) for _ in range(110)]
    assert held(found, "unmoved").index(True) == 100
    assert "they are again what they were" in found[-1]["unmoved"].cause
    sphere = Weights(Watch())
    assert not any(sphere.tick(False, loss=2.3 * 0.99**index, update=0.01) for index in range(150))


def test_faded_gradients_pruned_and_frozen_weights_are_left_out() -> None:
    weights = Weights(Watch())
    assert not any("unmoved" in weights.tick(False, 1e-7, loss=2.3) for _ in range(120))
    pruned = Weights(Watch())
    pruned.norms[:] = 0.0
    assert not any("unmoved" in pruned.tick(False, loss=2.3) for _ in range(120))
    frozen = [type(one)(one.name, one.shape, units=32, trainable=False) for one in network()]
    assert not any("unmoved" in each for each in (Weights(Watch(frozen)).tick(False, loss=2.3) for _ in range(2)))


def test_a_new_attempt_begins_anew() -> None:
    weights = Weights(Watch())
    for _ in range(4):
        weights.tick(moving(6), states(6), loss=2.0)
    weights.watch.history = weights.watch.history.resumed()
    found = [weights.tick(moving(6), states(6), loss=2.0) for _ in range(7)]
    assert held(found, "unmoved").index(True) == 5
