"""``gradwatch dashboards``: write the boards for Grafana and the rules for Prometheus and Alertmanager to a folder."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gradwatch_server.cli.command import print_line, run_command
from gradwatch_server.errors import GradwatchError

_PAGE, _GRAFANA, _JOB = "http://127.0.0.1:8321", "http://127.0.0.1:3000", "gradwatch"
"""What stands in the files; the options put something else in its place."""
_RULES = ("rules.yml", "alertmanager.yml")


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch dashboards``; return the exit code."""
    purpose = "Write the Grafana boards, and the rules for Prometheus and Alertmanager, to a folder."
    parser = argparse.ArgumentParser(prog="gradwatch dashboards", description=purpose)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="made if it is missing; files of the same names are replaced"
    )
    parser.add_argument("--page", default=_PAGE, metavar="URL", help=f"address of gradwatch's page (default: {_PAGE})")
    parser.add_argument("--grafana", default=_GRAFANA, metavar="URL", help=f"address of Grafana (default: {_GRAFANA})")
    parser.add_argument("--job", default=_JOB, help=f"name of the job by which Prometheus scrapes it (default: {_JOB})")
    options = parser.parse_args(arguments)
    return run_command("dashboards", lambda: _write(options))


def _write(options: argparse.Namespace) -> int:
    for name, url in (("--page", options.page), ("--grafana", options.grafana)):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname or '"' in url:
            raise GradwatchError(f"{name} is {url!r}: give an address such as {_PAGE}")
    if not options.job or not options.job.isprintable() or set(options.job) & set("\"'\\"):
        raise GradwatchError(f"--job is {options.job!r}: give the job_name that stands in prometheus.yml")
    source, folder = _source(), options.folder
    folder.mkdir(parents=True, exist_ok=True)
    boards = sorted((source / "grafana").glob("*.json"))
    for board in boards:
        (folder / board.name).write_text(_adapted_board(board.read_text(), options.page.rstrip("/"), options.job))
    for name in _RULES:
        text = (source / "prometheus" / name).read_text()
        text = text.replace(_PAGE, options.page.rstrip("/")).replace(_GRAFANA, options.grafana.rstrip("/"))
        (folder / name).write_text(text.replace(f'job="{_JOB}"', f'job="{options.job}"'))
    print_line(f"{folder}: {len(boards)} boards, {' and '.join(_RULES)}")
    return 0


def _source() -> Path:
    """Return the folder of the files: the wheel carries them within the package, a checkout has them in its root."""
    packaged = Path(__file__).parents[1] / "dashboards"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "dashboards"


def _adapted_board(text: str, page: str, job: str) -> str:
    """Return the JSON of a board whose constants are these."""
    board = json.loads(text)
    for variable in board["templating"]["list"]:
        value = {"page": page, "job": job}.get(variable["name"])
        if value is not None:
            chosen = {"text": value, "value": value, "selected": True}
            variable |= {"query": value, "current": chosen, "options": [chosen]}
    return json.dumps(board, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
