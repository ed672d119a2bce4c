"""Many losses between two samples: summed up, they still show whatever a rule looks for."""

import math
import random
from collections.abc import Iterator

import pytest

from gradwatch_server.diagnosis.loss_summary import MOST_LOSSES, Loss, summed_up
from gradwatch_server.diagnosis.sample import median

MANY = 50_000


def losses(planted: dict[int, float]) -> list[Loss]:
    noise = random.Random(0)
    return [
        (step, planted.get(step, 2.3 * math.exp(-step / 20_000) + 0.2 * noise.random())) for step in range(1, MANY + 1)
    ]


def handed_over(pairs: list[Loss], batches: int) -> list[Loss]:
    """Return what is left of losses that arrive in batches, each summed up with what is left of those before."""
    left: list[Loss] = []
    for first in range(0, len(pairs), len(pairs) // batches):
        left = list(summed_up([*left, *pairs[first : first + len(pairs) // batches]]))
    return left


def cases() -> Iterator[tuple[str, dict[int, float]]]:
    yield "a burst of three", {20_000: 1e5, 20_001: 2e5, 20_002: 3e5}
    yield "one spike", {7: 5_000.0}
    yield "NaN for a while", dict.fromkeys(range(31_000, 31_500), math.nan)
    yield "infinite once", {49_000: math.inf}


@pytest.mark.parametrize("planted", [planted for _, planted in cases()], ids=[name for name, _ in cases()])
@pytest.mark.parametrize("batches", [1, 50])
def test_what_is_planted_is_still_there(planted: dict[int, float], batches: int) -> None:
    left = handed_over(losses(planted), batches)
    assert len(left) <= MOST_LOSSES + 2
    found = dict(left)
    assert [step for step, _ in left] == sorted(found)
    kept = [step for step in planted if step in found]
    assert kept[0] == min(planted)
    assert len(kept) >= min(len(planted), 2 if any(map(math.isnan, planted.values())) else 3)


def test_the_course_of_a_healthy_loss_stays_as_it_is() -> None:
    left = handed_over(losses({}), 50)
    assert len(left) > MOST_LOSSES // 8
    for first, last in ((1, 10_000), (20_000, 30_000), (40_000, 50_000)):
        ours = median([loss for step, loss in left if first <= step <= last])
        truth = median([loss for step, loss in losses({}) if first <= step <= last])
        assert ours == pytest.approx(truth, abs=0.15)


def test_few_losses_are_left_alone() -> None:
    some = losses({})[:MOST_LOSSES]
    assert summed_up(some) is some
