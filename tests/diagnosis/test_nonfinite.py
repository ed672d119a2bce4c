"""Non-finite: at once, with the place where it began."""

import math

import numpy as np

from gradwatch.wire import Event
from gradwatch_server.diagnosis import Layout, Memory, Reading, Thresholds, examine
from gradwatch_server.diagnosis.nonfinite import EVENT
from tests.diagnosis.ticks import LAYERS, Watch, network


def test_the_last_bad_layer_is_where_it_began_and_stays_so() -> None:
    watch = Watch()
    watch.learn(5)
    finding = watch.tick([math.nan] * 6 + [0.1] * 10, loss=1.9)["nonfinite"]
    assert finding.hold_samples == 1
    assert finding.parameters[0].name == "2.bias"
    assert "2.bias" in finding.cause
    later = watch.tick(math.nan, weights=math.nan, loss=math.nan)["nonfinite"]
    assert later.parameters[0].name == "2.bias"
    assert later.first_step == finding.first_step == 6


def test_the_module_that_the_agent_names_comes_first() -> None:
    size = 2 * LAYERS
    bad = np.full(size, np.nan, np.float32)
    reading = Reading(
        step=9,
        at=0.0,
        statistics={"grad_norm": bad, "weight_norm": np.ones(size, np.float32)},
        scalars={"loss": math.nan},
        events=[Event(step=9, at=0.0, kind=EVENT, parameter="4")],
    )
    _, (finding, *_) = examine(Layout.of(network()), Memory(), reading, Thresholds())
    assert finding.parameters[0].name == "4.bias"
    assert "came out of 4" in finding.cause


def test_a_bad_loss_alone_is_a_warning() -> None:
    finding = Watch().tick(0.1, loss=math.inf)["nonfinite"]
    assert finding.severity == "warning"
    assert finding.parameters == []
