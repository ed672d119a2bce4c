"""Non-finite: at once, with the place where it began."""

import math

import pytest

from gradwatch_server.diagnosis.rules.nonfinite import refine
from tests.diagnosis.ticks import LAYERS, Watch, network


def test_the_last_bad_layer_is_where_it_began() -> None:
    watch = Watch()
    watch.learn(5)
    finding = watch.tick([math.nan] * 6 + [0.1] * 10, loss=1.9)["nonfinite"]
    assert finding.hold_samples == 1
    assert finding.parameters[0].name == "2.bias"
    assert "2.bias" in finding.cause
    later = watch.tick(math.nan, weights=math.nan, loss=math.nan)["nonfinite"]
    assert later.first_step == finding.first_step == 6


@pytest.mark.parametrize(
    ("module", "first"),
    [("4", "4.bias"), ("4.activation.inner", "4.bias"), ("", f"{LAYERS - 1}.bias"), ("gone", f"{LAYERS - 1}.bias")],
)
def test_the_module_that_the_agent_names_comes_first(module: str, first: str) -> None:
    finding = Watch().tick(math.nan, loss=math.nan)["nonfinite"]
    named = refine(finding, Watch().run_parameters.names, module, "its inputs were finite.")
    assert named.parameters[0].name == first
    where = f"module {module}" if module else "the loss"
    assert named.cause == f"The first result that was not finite came out of {where}: its inputs were finite."
    assert len(named.parameters) == len(finding.parameters) == 2 * LAYERS
    assert refine(named, Watch().run_parameters.names, module, "its inputs were finite.") == named


def test_a_module_whose_parameters_were_left_out_is_named_too() -> None:
    watch = Watch(network(15))
    finding = watch.tick(math.nan, loss=math.nan)["nonfinite"]
    named = refine(finding, watch.run_parameters.names, "1", "")
    assert [blame.name for blame in named.parameters[:3]] == ["1.bias", "1.weight", "14.bias"]
    assert (len(named.parameters), named.left_out) == (20, 10)


def test_an_unknown_loss_is_not_taken_for_a_good_one() -> None:
    finding = Watch().tick(math.nan)["nonfinite"]
    assert "loss" not in finding.evidence
    assert "the loss is not known" in finding.cause
    watch = Watch()
    known = watch.tick(math.nan, losses=[(watch.step + watch.every, math.nan)])["nonfinite"]
    assert math.isnan(known.evidence["loss"])


def test_a_bad_loss_alone_is_a_warning_about_what_made_it() -> None:
    finding = Watch().tick(0.1, loss=math.inf)["nonfinite"]
    assert finding.severity == "warning"
    assert [blame.name for blame in finding.parameters] == [f"{LAYERS - 1}.weight"]
