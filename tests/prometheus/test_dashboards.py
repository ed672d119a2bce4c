"""The dashboards: in step with their code, valid by Grafana's own types, and every query of theirs returns rows."""

import copy
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sqlalchemy as sa
from dashboards.build import FOLDER, render
from dashboards.frame import TITLES

from gradwatch import wire
from gradwatch_server.store.database import migrate, open_engine, writing
from tests.postgres import postgres_database
from tests.processes import ROOT, GradwatchServer, WebhookReceiver, sample
from tests.prometheus.programs import Prometheus, scraping, until
from tests.prometheus.scraped import scrape

Board = dict[str, Any]
BOARDS: dict[str, Board] = {name: json.loads(text) for name, text in render().items()}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"]]
TARGETS = [(f"{name} {panel['title']}", target) for name, panel in PANELS for target in panel["targets"]]
EXPRESSIONS = {f"{title} {target['refId']}": target["expr"] for title, target in TARGETS if "expr" in target}
STATEMENTS = {title: target["rawSql"] for title, target in TARGETS if "rawSql" in target}
STATEMENTS |= {
    f"{name} variable {variable['name']}": variable["query"]
    for name, board in BOARDS.items()
    for variable in board.get("templating", {}).get("list", [])
}
STATEMENTS |= {
    f"{name} annotation {annotation['name']}": annotation["target"]["rawSql"]
    for name, board in BOARDS.items()
    for annotation in board.get("annotations", {}).get("list", [])
}


def _in_step(folder: Path) -> bool:
    return {file.name: file.read_text() for file in folder.glob("*.json")} == render()


def test_the_files_are_in_step_with_the_code() -> None:
    assert _in_step(FOLDER), "run: python -m dashboards.build"


def test_a_file_out_of_step_is_found(tmp_path: Path) -> None:
    for name, text in render().items():
        (tmp_path / name).write_text(text.replace("now-1h", "now-2h"))
    assert not _in_step(tmp_path)


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_panel_says_what_it_shows(name: str, panel: Board) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"]


def test_the_dashboards_link_to_each_other() -> None:
    for board in BOARDS.values():
        targets = {link["url"] for link in board["links"]}
        assert targets == {f"/d/{uid}" for uid in TITLES if uid != board["uid"]}


# Grafana's own types


@pytest.fixture(scope="module")
def schema() -> Board:
    generator = ROOT / "node_modules" / ".bin" / "ts-json-schema-generator"
    command = [str(generator), "--path", "dashboards/types.ts", "--no-type-check"]
    generated = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    described: Board = json.loads(generated.stdout)
    return described


def _faults(schema: Board, board: Board) -> list[str]:
    """Return where a dashboard, or a panel in it, is not what Grafana's types say."""
    board = copy.deepcopy(board)
    for annotation in board.get("annotations", {}).get("list", []):
        del annotation["target"]  # a query of its data source, which the type says it "should" be; run below
    found = _check(schema, "Board", board)
    for panel in board["panels"]:
        kind = panel["type"].capitalize()
        custom = panel["fieldConfig"]["defaults"].get("custom", {})
        found += _check(schema, f"{kind}Options", panel["options"])
        if f"{kind}Custom" in schema["definitions"]:
            found += _check(schema, f"{kind}Custom", custom)
    return found


def _check(schema: Board, kind: str, document: Board) -> list[str]:
    validator = jsonschema.Draft7Validator({**schema, "$ref": f"#/definitions/{kind}"})
    return [f"{kind} {error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_valid_by_grafanas_types(schema: Board, name: str) -> None:
    assert _faults(schema, BOARDS[name]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("titel",), "misspelt"),
        (("panels", 8, "options", "legnd"), {}),
        (("panels", 6, "fieldConfig", "defaults", "custom", "drawStyle"), "crayon"),
        (("panels", 6, "fieldConfig", "defaults", "thresholds", "mode"), "relative"),
        (("templating", "list", 0, "type"), "queery"),
    ],
)
def test_a_fault_in_a_dashboard_is_found(schema: Board, path: tuple[Any, ...], value: object) -> None:
    board = copy.deepcopy(BOARDS["gradwatch-run.json"])
    place: Any = board
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert _faults(schema, board)


# Every query, on the real thing


class _Seen:
    """What the queries are run on: a server on PostgreSQL with two runs, scraped by a Prometheus."""

    def __init__(self, run_id: str, engine: sa.Engine, prometheus: Prometheus) -> None:
        self.run_id, self.engine, self.prometheus = run_id, engine, prometheus

    def expand(self, expression: str) -> str:
        """Return PromQL with Grafana's variables in it replaced."""
        values = {"$__rate_interval": "30s", "$project": "vision", "$run": self.run_id}
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        return expression

    def rows(self, statement: str) -> list[Any]:
        """Return what a statement with Grafana's macros in it yields."""
        start, end = 1_000_000_000, int(time.time()) + 3600
        statement = re.sub(r"\$__unixEpochFilter\(([\w.]+)\)", rf"\1 >= {start} AND \1 <= {end}", statement)
        statement = statement.replace("$__unixEpochFrom()", str(start)).replace("$__unixEpochTo()", str(end))
        statement = statement.replace("${run:sqlstring}", f"'{self.run_id}'").replace(
            "${project:sqlstring}", "'vision'"
        )
        assert "$" not in statement, statement
        with self.engine.connect() as connection:
            return list(connection.exec_driver_sql(statement.replace("%", "%%")).all())


def _train(server: GradwatchServer, first: int) -> str:
    """Send a sound run and one that turns ill; return the second's id."""
    names = ["stem.weight", "body.weight", "head.weight"]
    for run, head in (("sound", 0.1), ("ill", math.nan)):
        run_id = f"run-{run}"
        if first == 0:
            server.register(names, id=run_id, project="vision", name=run)
        samples = [
            sample(step, 0.1, 0.2, head, loss=1.0, global_grad_norm=0.3, overhead_ratio=0.01, skipped_steps=0)
            for step in range(first, first + 5)
        ]
        for measured in samples:
            measured.statistics["clipped_grad_norm"] = measured.statistics["grad_norm"]
            measured.scalars["global_grad_norm_limit"] = 1.0
        server.store(run_id, wire.Batch(id=str(first), samples=samples)).raise_for_status()
    return "run-ill"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Iterator[_Seen]:
    folder = tmp_path_factory.mktemp("seen")
    with postgres_database(postgres) as url, WebhookReceiver([500]) as receiver:
        engine = open_engine(url)
        migrate(engine)
        engine.dispose()
        options = ["--database-url", url, "--webhook", receiver.url]
        with (
            GradwatchServer(folder / "gradwatch.db", *options) as server,
            Prometheus(folder / "prometheus", scraping(server.url)) as prometheus,
        ):
            run_id = _train(server, 0)
            until(lambda: prometheus.query(f'gradwatch_run_step{{run="{run_id}"}} == 4'), "first scrape")
            _train(server, 5)
            until(lambda: prometheus.query("increase(gradwatch_ingest_batches_total[1m]) > 0"), "second scrape")
            until(lambda: prometheus.query("rate(gradwatch_delivery_attempts_total[1m])"), "attempts to deliver")
            yield _Seen(run_id, engine, prometheus)
        engine.dispose()


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_every_promql_returns_rows(seen: _Seen, title: str) -> None:
    expanded = seen.expand(EXPRESSIONS[title])
    until(lambda: seen.prometheus.query(expanded), expanded)  # a scrape that timed out is followed by a better one


@pytest.mark.parametrize("title", STATEMENTS)
def test_every_sql_returns_rows(seen: _Seen, title: str) -> None:
    assert seen.rows(STATEMENTS[title]), STATEMENTS[title]


def test_a_query_of_something_unknown_returns_none(seen: _Seen) -> None:
    assert not seen.prometheus.query("gradwatch_run_looss")
    assert not seen.rows("SELECT 1 FROM runs WHERE project IN (${project:sqlstring}) AND id = 'unknown'")


def test_rows_sort_by_depth(seen: _Seen) -> None:
    layers = [row[0] for row in seen.rows(STATEMENTS["gradwatch-run.json Depth profile"])]
    assert layers == ["000 · stem.weight", "001 · body.weight", "002 · head.weight"]


PROJECTS = "'vision', 'patient', 'off'"
STALL_LIMITS = """
[rules.stalled]
intervals = 1.0
least_seconds = 0.5
[projects.patient.rules.stalled]
least_seconds = 7200.0
[projects.off.rules.stalled]
enabled = false
"""


def test_the_fleet_calls_a_run_stalled_when_the_rule_does(postgres: str, tmp_path: Path) -> None:
    (tmp_path / "gradwatch.toml").write_text(STALL_LIMITS)
    with postgres_database(postgres) as url:
        engine = open_engine(url)
        migrate(engine)
        options = ["--database-url", url, "--config", str(tmp_path / "gradwatch.toml")]
        with GradwatchServer(tmp_path / "gradwatch.db", *options) as server:
            for project in ("vision", "patient", "off"):
                server.register(["w"], id=project, project=project, name=project)
                server.store(project, wire.Batch(id="b", samples=[sample(1, 0.1), sample(2, 0.1)])).raise_for_status()
            # An hour of silence is less than one project allows; the rule is switched off for the other.
            with writing(engine) as connection:
                silent = "UPDATE runs SET last_seen_at = last_seen_at - 3600 WHERE project <> 'vision'"
                connection.exec_driver_sql(silent)
            until(lambda: server.get("/api/v1/runs", state="stalled"), "stalled run")
            states = {run["id"]: run["state"] for run in server.get("/api/v1/runs")}
            stalled = re.findall(r'gradwatch_run_stalled\{.*run="(\w+)"\} 1.0', scrape(server.http))
        seen = _Seen("vision", engine, Prometheus(tmp_path))
        rows = seen.rows(STATEMENTS["gradwatch-fleet.json Runs, worst first"].replace("${project:sqlstring}", PROJECTS))
        engine.dispose()
    assert states == {"vision": "stalled", "patient": "running", "off": "running"}
    assert {row.run: row.state for row in rows} == states
    assert stalled == ["vision"]


def test_long_ranges_are_read_from_the_rollups_and_nothing_is_lost(postgres: str, tmp_path: Path) -> None:
    with postgres_database(postgres) as url:
        engine = open_engine(url)
        migrate(engine)
        with GradwatchServer(tmp_path / "gradwatch.db", "--database-url", url) as server:
            run_id = server.register(["stem.weight", "head.weight"], id="run-long", project="vision", name="long")
            every, spike, fault = 13, 13 * 700, 13 * 1200
            for first in range(0, 3000, 1000):
                steps = range(every * first, every * (first + 1000))
                samples = [
                    sample(step, 5e3 if step == spike else 0.1, math.nan if step == fault else 0.2)
                    for step in steps[::every]
                ]
                trail = {"loss": wire.Trail(steps=list(steps), values=[abs(step - 5_000.0) for step in steps])}
                server.store(run_id, wire.Batch(id=str(first), samples=samples, trail=trail)).raise_for_status()
        seen = _Seen(run_id, engine, Prometheus(tmp_path))
        with writing(engine) as connection:  # what was measured is gone: the roll-ups have to know
            connection.exec_driver_sql("DELETE FROM samples WHERE level = 0 AND step BETWEEN 1000 AND 30000")
        rows = seen.rows(STATEMENTS["gradwatch-run.json Layer by step"])
        losses = seen.rows(STATEMENTS["gradwatch-run.json Loss by step"])
        engine.dispose()
    stem, head = ([row for row in rows if row[0] == layer] for layer in ("000 · stem.weight", "001 · head.weight"))
    assert len(stem) == len(head) == 60
    assert [row[1] for row in stem if row[2] > 1e3] == [max(row[1] for row in stem if row[1] <= spike)]
    assert [row[1] for row in head if math.isnan(row[2])] == [max(row[1] for row in head if row[1] <= fault)]
    assert 500 < len(losses) < 2_000
    assert [row[0] for row in losses] == sorted({row[0] for row in losses})
    assert (min(row[1] for row in losses), max(row[2] for row in losses)) == (0.0, 39_000 - 13 - 5_000.0)
