"""``gradwatch dashboards``: what it writes can be imported, and the wheel carries it."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from gradwatch_server.cli.dashboards import main
from tests.processes import ROOT

FILES = ROOT / "dashboards"


def test_it_writes_the_boards_and_the_rules_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "new")]) == 0
    written = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    boards = {path.name: path.read_text() for path in (FILES / "grafana").glob("*.json")}
    rules = {name: (FILES / "prometheus" / name).read_text() for name in ("rules.yml", "alertmanager.yml")}
    assert written == boards | rules
    assert "4 boards" in capsys.readouterr().out


def test_addresses_and_the_job_are_put_in(tmp_path: Path) -> None:
    options = [
        "--page",
        "https://watch.example/",
        "--grafana",
        "https://grafana.example",
        "--job",
        "training/gradwatch",
    ]
    assert main([str(tmp_path), *options]) == 0
    board = json.loads((tmp_path / "gradwatch-run.json").read_text())
    variables = {variable["name"]: variable.get("current", {}).get("value") for variable in board["templating"]["list"]}
    assert (variables["page"], variables["job"]) == ("https://watch.example", "training/gradwatch")
    rules = (tmp_path / "rules.yml").read_text()
    assert "127.0.0.1" not in rules
    assert 'absent(up{job="training/gradwatch"})' in rules
    checked = subprocess.run(["promtool", "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    "options", [["--page", "watch.example"], ["--grafana", 'http://a"b'], ["--job", 'a"b'], ["--job", ""]]
)
def test_what_cannot_be_put_in_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main([str(tmp_path), *options]) == 1
    assert f"{options[0]} is {options[1]!r}: give" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_wheel_carries_what_the_command_writes() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    names = ("grafana", "prometheus/rules.yml", "prometheus/alertmanager.yml")
    carried = {f"dashboards/{name}": f"gradwatch_server/dashboards/{name}" for name in names}
    assert carried.items() <= wheel["force-include"].items()
    assert all((FILES / name).exists() for name in names)
