"""The configuration of the rules: what is wrong is named, with its value and the way out."""

from pathlib import Path
from typing import Any

import pytest

from gradwatch_server.diagnosis import RULES, SAMPLE_RULES, Thresholds
from gradwatch_server.diagnosis import rules as rules_folder
from gradwatch_server.diagnosis.rules import dead, exploding, stalled, vanishing
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.settings import Configuration
from tests.diagnosis.ticks import Watch, fading


def test_a_table_changes_what_it_names() -> None:
    thresholds = Thresholds.from_table({"vanishing": {"attenuation_decades": 9, "stuck_decades": 9.0}})
    assert thresholds[vanishing.RULE].attenuation_decades == 9.0
    assert thresholds[exploding.RULE] == Thresholds()[exploding.RULE]
    assert "vanishing" not in Watch(thresholds=thresholds).tick(fading(1.0), loss=2.3)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"vanish": {}}, "rules.vanish: there is no such rule; the rules are dead, exploding"),
        ({"dead": {"samples": 3}}, "rules.dead.samples: there is no such key; the keys are branch_samples"),
        ({"dead": {"cut_samples": 0}}, "rules.dead.cut_samples = 0: expected `int` >= 1; the default is 4"),
        ({"dead": {"enabled": "no"}}, "rules.dead.enabled = 'no': expected `bool`, got `str`; the default is True"),
        ({"dead": 3}, "rules.dead = 3: a table of thresholds"),
        ({"dead": {"highest_severity": "fatal"}}, "rules.dead.highest_severity = 'fatal'"),
    ],
)
def test_what_is_wrong_is_named(table: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="rules") as caught:
        Thresholds.from_table(table)
    assert text in str(caught.value)


@pytest.mark.parametrize("rule", [rule.name for rule in SAMPLE_RULES])
def test_every_rule_can_be_switched_off(rule: str) -> None:
    thresholds = Thresholds.from_table({rule: {"enabled": False}})
    watch = Watch(thresholds=thresholds)
    for gradients in (fading(1.0), [float("nan")] * 16, [0.0] * 8 + [0.1] * 8, [1e6] * 16):
        for _ in range(15):
            assert rule not in watch.tick(gradients, loss=2.3)


def test_every_module_of_the_folder_is_the_rule_of_its_name() -> None:
    modules = sorted(path.stem for path in Path(rules_folder.__path__[0]).glob("*.py") if path.stem != "__init__")
    assert [rule.name for rule in RULES] == modules
    assert set(RULES) - set(SAMPLE_RULES) == {stalled.RULE}
    assert len({rule.colour for rule in RULES}) == len(RULES), "two rules look the same on the boards"
    for rule in RULES:
        assert Thresholds.from_table({rule.name: {"clear_samples": 77}})[rule].clear_samples == 77


def test_a_project_has_its_own(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[rules.dead]\ncut_samples = 7\n[projects.vision.rules.dead]\nbranch_samples = 9\n")
    configuration = Configuration.load(config)
    own, others = (configuration.thresholds[project][dead.RULE] for project in ("vision", "audio"))
    assert (own.cut_samples, own.branch_samples) == (7, 9)
    assert (others.cut_samples, others.branch_samples) == (7, Thresholds()[dead.RULE].branch_samples)
    config.write_text("[projects.vision.rules.dead]\ncut_samples = 0\n")
    with pytest.raises(ConfigurationError, match=r"projects\.vision\.rules\.dead\.cut_samples = 0"):
        Configuration.load(config)


def test_a_severity_can_be_held_down() -> None:
    thresholds = Thresholds.from_table({"vanishing": {"highest_severity": "warning"}})
    assert Watch(thresholds=thresholds).tick(fading(1.0), loss=2.3)["vanishing"].severity == "warning"
