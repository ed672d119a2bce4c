"""The rules are right: promtool checks and runs them, and every alert of them is run."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

RULES = ROOT / "dashboards" / "prometheus"


def _promtool(*arguments: str, folder: Path = RULES) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing(arguments: tuple[str, ...]) -> None:
    checked = _promtool(*arguments)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_rule_is_tested() -> None:
    rules, tests = (RULES / "rules.yml").read_text(), (RULES / "rules_test.yml").read_text()
    alerts = set(re.findall(r"alert: (\w+)", rules))
    assert alerts == set(re.findall(r"alertname: (\w+)", tests))


def test_promtool_finds_a_wrong_threshold(tmp_path: Path) -> None:
    rules = (RULES / "rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(rules.replace("> 0.5", "> 0.7"))
    (tmp_path / "rules_test.yml").write_text((RULES / "rules_test.yml").read_text())
    assert "GradwatchQueueFilling" in _promtool("test", "rules", "rules_test.yml", folder=tmp_path).stderr


def test_every_metric_in_the_rules_exists() -> None:
    told = (ROOT / "server" / "gradwatch_server" / "telemetry" / "metrics.py").read_text()
    rules = re.sub(r"\w+:\w+:\w+", "", (RULES / "rules.yml").read_text())  # without those that are recorded here
    for name in set(re.findall(r"\bgradwatch_\w+", rules)):
        assert re.sub("_(total|count|sum)$", "", name) in told, name
