"""Throttled: clipping that decides every step. Stalled: a silence much longer than usual."""

import numpy as np
import pytest

from gradwatch_server.diagnosis import History, RunParameters, Sample, Thresholds, diagnose
from gradwatch_server.diagnosis.rules import stalled
from tests.diagnosis.ticks import LAYERS, network


@pytest.mark.parametrize(
    ("share", "rate", "samples", "expected"),
    [
        (1.0, 1.0, 110, True),
        (1.0, 0.98, 110, False),
        (1.0, 0.98, 510, True),
        (0.5, 1.0, 110, False),
        (0.0, 0.99, 1010, True),
        (0.0, 0.99, 500, False),
    ],
)
@pytest.mark.parametrize("silent", [0.0, 0.3])
def test_throttled(share: float, rate: float, samples: int, expected: bool, silent: float) -> None:
    parameters, history, rules = RunParameters.of(network()), History(), set[str]()
    size = 2 * LAYERS
    for step in range(samples):
        sample = Sample(
            step=step,
            at=0.0,
            statistics={
                "grad_norm": np.full(size, 0.1, np.float32),
                "weight_norm": np.full(size, 3.0, np.float32),
                "clipped_unit_share": np.full(size, share * (1.0 - silent), np.float32),
                "zero_unit_share": np.full(size, silent, np.float32),
            },
            scalars={"loss": 2.3 * rate**step},
        )
        history, findings = diagnose(parameters, history, sample, Thresholds())
        rules = {finding.rule for finding in findings}
    assert ("throttled" in rules) is expected


@pytest.mark.parametrize(
    ("usual", "silence", "expected"),
    [(None, 2399.0, False), (None, 2401.0, True), (1.0, 121.0, True), (60.0, 1199.0, False), (60.0, 1201.0, True)],
)
def test_stalled_knows_the_usual_interval(usual: float | None, silence: float, expected: bool) -> None:
    seen = stalled.Silence(last_seen_at=1000.0, now=1000.0 + silence, usual_interval_seconds=usual, last_step=42)
    finding = stalled.RULE.judge(seen, Thresholds()[stalled.RULE])
    assert (finding is not None) is expected
    assert finding is None or finding.first_step == 42
