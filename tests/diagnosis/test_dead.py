"""Dead: cut off, beside the path, idle; and what is only quiet for a while."""

import numpy as np
import pytest

from gradwatch.wire import MISSING, Parameter
from tests.diagnosis.ticks import LAYERS, Watch, held, network

ALIVE = 0.1


def gradients(**changes: float) -> list[float]:
    """Return gradients that are alive but for those named, as ``w0`` or ``b3``."""
    values = [ALIVE] * (2 * LAYERS)
    for name, value in changes.items():
        values[2 * int(name[1:]) + (name[0] == "b")] = value
    return values


LOWER = {"w0": 0.0, "b0": 0.0, "w1": 0.0, "b1": 0.0}
"""The two layers nearest to the input get no gradient."""


@pytest.mark.parametrize(("value", "first"), [(0.0, 3), (MISSING, 11)])
def test_what_is_cut_off_midway_is_dead_the_layer_nearest_to_the_output_first(value: float, first: int) -> None:
    watch = Watch()
    watch.learn(20)
    found = [watch.tick(gradients(**dict.fromkeys(LOWER, value)), loss=2.3) for _ in range(12)]
    assert [blame.name for blame in found[-1]["dead"].parameters] == ["1.bias", "1.weight", "0.bias", "0.weight"]
    assert held(found, "dead").index(True) == first


def test_dead_units_are_found_at_once() -> None:
    """The next layer gets nothing but zeros: its weight has no gradient, its bias has one."""
    watch = Watch()
    found = [watch.tick(gradients(**LOWER, w2=0.0), loss=2.3) for _ in range(5)]
    assert held(found, "dead") == [False] * 3 + [True] * 2


@pytest.mark.parametrize("value", [0.0, MISSING])
def test_what_was_never_trained_may_be_meant_to_be_trained_later(value: float) -> None:
    """After a hundred steps it gets a warning, and after a thousand a critical alert."""
    watch = Watch()
    lower = gradients(**dict.fromkeys(LOWER, value), w2=value, b2=value)
    found = [watch.tick(lower, loss=2.3).get("dead") for _ in range(1_010)]
    alerts = [step for step, finding in enumerate(found, 1) if finding is not None]
    assert alerts[0] == 101
    severities = [finding.severity for finding in found if finding is not None]
    assert [severities.index(name) + alerts[0] for name in ("warning", "critical")] == [101, 1_001]


def test_what_no_optimizer_holds_is_not_dead() -> None:
    """The agent reports a change of 0 where an optimizer holds a parameter that had no gradient."""
    target, cut = Watch(), Watch()
    lower = gradients(**dict.fromkeys(LOWER, MISSING))
    held_by_none = [MISSING if value == MISSING else 0.01 for value in lower]
    held_by_one = [0.0 if value == MISSING else 0.01 for value in lower]
    for _ in range(300):
        assert "dead" not in target.tick(lower, loss=2.3, update=held_by_none)
    found = [cut.tick(lower, loss=2.3, update=held_by_one) for _ in range(110)]
    assert "dead" in found[-1]


def test_tasks_that_take_turns_by_epochs_rest_for_as_long_as_they_are_trained() -> None:
    watch = Watch()
    for index in range(400):
        resting = "67"[index // 40 % 2]
        values = gradients(**{f"w{resting}": MISSING, f"b{resting}": MISSING})
        assert not watch.tick(values, loss=2.3 * 0.999**index)


def test_a_bias_of_a_parametrized_layer_belongs_to_its_weight() -> None:
    names = ["0.bias", "0.parametrizations.weight.original", "1.bias", "1.parametrizations.weight.original"]
    watch = Watch([Parameter(name, [32] if "bias" in name else [32, 32], units=32) for name in names])
    for index in range(200):
        assert not watch.tick([ALIVE, ALIVE, 0.0, ALIVE], loss=2.3 * 0.99**index)


def test_a_raw_table_has_rows_not_units() -> None:
    table = Parameter("tables.0", [2048, 2], units=2048, kind="ParameterList")
    watch = Watch([table, *network(3)])
    for index in range(60):
        assert not watch.tick(ALIVE, loss=2.3 * 0.99**index, zero_unit_share=[0.99, *[0.0] * 6])


def test_a_head_that_takes_turns_is_alive() -> None:
    watch = Watch()
    for index in range(100):
        value = ALIVE if index % 2 else MISSING
        assert not watch.tick(gradients(w7=value, b7=value), loss=2.3 * 0.99**index)


def test_patience_follows_what_has_been_seen() -> None:
    """Quiet for 8 of 9 samples is usual here; quiet for more than four times that, and longer than trained, is not."""
    watch = Watch()
    for index in range(90):
        value = ALIVE if index % 9 == 8 else 0.0
        assert not watch.tick(gradients(w3=value, b3=value), loss=2.3 * 0.99**index)
    found = [watch.tick(gradients(w3=0.0, b3=0.0), loss=0.9) for _ in range(110)]
    assert held(found, "dead").index(True) == 100 - 1


def test_a_parameter_whose_weight_moves_between_samples_is_alive() -> None:
    watch = Watch()
    for index in range(60):
        weights = np.full(2 * LAYERS, 3.0)
        weights[6:8] += 0.01 * index
        assert not watch.tick(gradients(w3=MISSING, b3=MISSING), weights=list(weights), loss=2.3 * 0.99**index)


def test_samples_without_any_gradient_do_not_count() -> None:
    watch = Watch()
    watch.learn(10)
    for _ in range(50):
        assert "dead" not in watch.tick(0.0, loss=0.0)


def test_a_bias_before_a_norm_is_not_dead() -> None:
    watch = Watch()
    for index in range(60):
        assert not watch.tick(gradients(b3=0.0), loss=2.3 * 0.99**index)


def test_frozen_is_not_dead() -> None:
    parameters = network()
    frozen = [type(entry)(entry.name, entry.shape, units=entry.units, trainable=False) for entry in parameters[:8]]
    watch = Watch([*frozen, *parameters[8:]])
    for index in range(60):
        assert not watch.tick([MISSING] * 8 + [ALIVE] * 8, loss=2.3 * 0.99**index)


def test_a_layer_with_hardly_a_unit_left_is_idle() -> None:
    watch = Watch()
    share = [0.0] * (2 * LAYERS)
    share[4] = 31 / 32
    found = [watch.tick(ALIVE, loss=2.3, zero_unit_share=share) for _ in range(6)]
    assert held(found, "dead") == [False] * 4 + [True] * 2
    assert found[-1]["dead"].parameters[0].name == "2.weight"


@pytest.mark.parametrize("position", [14])
def test_the_last_layer_may_choose_its_rows(position: int) -> None:
    share = [0.0] * (2 * LAYERS)
    share[position] = 1.0 - 1e-3
    watch = Watch()
    for index in range(30):
        assert not watch.tick(ALIVE, loss=2.3 * 0.99**index, zero_unit_share=share)


def _mixture(name: str, count: int = 6) -> list[Parameter]:
    experts = [Parameter(f"{name}.{index}.weight", [32, 32], units=32) for index in range(count)]
    stem, head = Parameter("stem.weight", [32, 32], units=32), Parameter("head.weight", [32, 32], units=32)
    return [stem, *experts, head]


def test_an_expert_that_is_never_chosen_gets_a_warning_late() -> None:
    watch = Watch(_mixture("experts"))
    found = [watch.tick([ALIVE, MISSING, *[ALIVE] * 6], loss=2.3 * 0.99**index) for index in range(110)]
    assert held(found, "dead").index(True) == 100
    assert found[-1]["dead"].severity == "warning"
    assert [blame.name for blame in found[-1]["dead"].parameters] == ["experts.0.weight"]


def test_experts_before_all_that_lives_are_not_cut_off() -> None:
    """An expert that was trained and is not chosen for a while may be the first layer of the model."""
    experts = [Parameter(f"experts.{index}.weight", [32, 32], units=32) for index in range(6)]
    watch = Watch([*experts, Parameter("head.weight", [32, 32], units=32)])
    watch.learn(50)
    for index in range(40):
        assert not watch.tick([MISSING, *[ALIVE] * 6], loss=0.5 * 0.99**index)


def test_those_that_take_turns_go_by_the_rhythm_of_their_peers() -> None:
    watch = Watch(_mixture("branches"))
    for index in range(60):
        chosen = [ALIVE if index % 5 == place else MISSING for place in range(5)]
        rarely = ALIVE if index == 15 else MISSING
        assert not watch.tick([ALIVE, *chosen, rarely, ALIVE], loss=2.3 * 0.99**index)


def test_what_has_not_moved_between_samples_has_been_quiet_there_too() -> None:
    watch = Watch(every=7)
    watch.learn(1)
    lower = gradients(**dict.fromkeys(LOWER, MISSING))
    found = [watch.tick(lower, loss=2.3) for _ in range(6)]
    assert held(found, "dead").index(True) == 3
