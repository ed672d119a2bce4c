"""The history: bounded, the same kept, stored or replayed; and the rules' cost and limits."""

import json
import math
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.wire import MISSING, Parameter
from gradwatch_server.diagnosis import History, RunParameters, Sample, Thresholds, diagnose
from gradwatch_server.diagnosis.sample import median
from tests.diagnosis.ticks import LAYERS, Watch, network

VALUES = st.sampled_from([MISSING, 0.0, 1e-30, 1e-9, 0.1, 1.0, 1e6, 1e30, math.inf, math.nan])


def _sample(step: int, gradients: list[float], weights: list[float], loss: float | None) -> Sample:
    scalars = {} if loss is None else {"loss": loss}
    statistics: Any = {"grad_norm": np.array(gradients, np.float32), "weight_norm": np.array(weights, np.float32)}
    return Sample(step=step, at=0.0, statistics=statistics, scalars=scalars)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(VALUES, min_size=12, max_size=12),
            st.lists(st.sampled_from([0.0, 1e-9, 1.0, 1e20, math.nan, math.inf]), min_size=12, max_size=12),
            st.one_of(st.none(), st.sampled_from([0.0, -3.0, 2.3, 1e30, math.inf, math.nan])),
        ),
        max_size=12,
    )
)
def test_whatever_comes_the_rules_answer_and_history_survives_storage(
    samples: list[tuple[list[float], list[float], float | None]],
) -> None:
    parameters = RunParameters.of(network(6))
    kept = stored = History()
    for step, (gradients, weights, loss) in enumerate(samples):
        sample = _sample(step, gradients, weights, loss)
        kept, findings = diagnose(parameters, kept, sample, Thresholds())
        stored, again = diagnose(parameters, History.from_bytes(stored.to_bytes()), sample, Thresholds())
        assert msgspec.msgpack.encode(findings) == msgspec.msgpack.encode(again)
        assert kept.to_bytes() == stored.to_bytes()
        for finding in findings:
            assert len(finding.parameters) <= 20
            assert finding.summary and finding.cause and finding.remedy  # noqa: PT018
            json.dumps([finding.evidence, finding.first_step, finding.left_out])


def test_history_is_bounded_and_earlier_histories_stay_as_they_were() -> None:
    watch = Watch()
    watch.learn(20)
    before = watch.history.to_bytes()
    kept = watch.history
    watch.learn(500, loss=1.2, rate=0.999)
    assert kept.to_bytes() == before
    assert len(watch.history.to_bytes()) < 20_000


def test_a_history_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 99, not 7: replay"):
        History.from_bytes(msgspec.msgpack.encode({"version": 99}))


def test_a_run_may_append_parameters() -> None:
    watch = Watch()
    watch.learn(5)
    longer = Watch(network(LAYERS + 2))
    longer.history, longer.step = watch.history, watch.step
    longer.learn(5, loss=1.9)


def test_more_than_twenty_are_counted() -> None:
    finding = Watch(network(15)).tick(math.nan, loss=math.nan)["nonfinite"]
    assert (len(finding.parameters), finding.left_out) == (20, 10)


@pytest.mark.parametrize(("size", "most_seconds"), [(300, 0.004), (2_000, 0.02)])
def test_a_sample_costs_little(size: int, most_seconds: float) -> None:
    """A quarter of the bound on a free machine; the best of many, since others use it too."""
    parameters = RunParameters.of([Parameter(f"{index}.weight", [64, 64], units=64) for index in range(size)])
    history, best = History(), math.inf
    gradients = np.random.default_rng(0).lognormal(-2, 1, (1_000, size)).astype(np.float32)
    for step, row in enumerate(gradients):
        sample = _sample(step, list(row), [3.0] * size, 2.3 * 0.99**step)
        started = time.perf_counter()
        history, _ = diagnose(parameters, history, sample, Thresholds())
        best = min(best, time.perf_counter() - started)
        if step >= 40 and best < most_seconds:
            break
    assert best < most_seconds


@given(st.lists(st.floats(width=64), min_size=1, max_size=70))
def test_the_median_is_numpys_to_the_bit(values: list[float]) -> None:
    with np.errstate(all="ignore"):
        expected = float(np.median(values))
    assert median(values) == expected or (math.isnan(expected) and math.isnan(median(values)))
