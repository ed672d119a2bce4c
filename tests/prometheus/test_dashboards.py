"""The dashboards' queries on a real PostgreSQL and a real Prometheus: with every choice, and right to the last step."""

import gzip
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from dashboards.colours import RATIO_LEGEND
from dashboards.queries.layers import LEGEND, MOST_ROWS, NAMED_ROWS, UNNAMED
from dashboards.queries.steps import NO_SAMPLE

from gradwatch import wire
from gradwatch_server.store.database import migrate, open_engine, writing
from tests.postgres import migrated_database, postgres_database
from tests.processes import GradwatchServer, WebhookReceiver, sample
from tests.prometheus.boards import ANNOTATIONS, EVERY_STATEMENT, EXPRESSIONS, STATEMENTS, calls, choices, rows
from tests.prometheus.programs import Prometheus, scraping, until
from tests.prometheus.scraped import scrape

RUNS, WRONG = STATEMENTS["gradwatch-fleet.json 3 A"], STATEMENTS["gradwatch-run.json 2 A"]
SUMMARY, LOSS, NORM, AFTER = (STATEMENTS[f"gradwatch-run.json {name}"] for name in ("1 A", "3 A", "4 A", "4 B"))
MAP, PROFILE, LOSS_BY_STEP = (STATEMENTS[f"gradwatch-run.json {panel} A"] for panel in (5, 6, 21))
PAGES, UNSAMPLED = (EVERY_STATEMENT[f"gradwatch-run.json variable {name}"] for name in ("layers", "unsampled"))


def _cells(engine: sa.Engine, *since: float, **chosen: list[str]) -> list[Any]:
    """Return the cells of the map, without those of its legend."""
    return [row for row in rows(engine, MAP, *since, **chosen) if row.layer != LEGEND]


def _by_step(engine: sa.Engine, *since: float, **chosen: list[str]) -> list[tuple[Any, ...]]:
    """Return step, smallest, largest and the mark of what is not finite, as the chart over steps turns its rows."""
    turned: dict[int, dict[str, Any]] = {}
    for row in rows(engine, LOSS_BY_STEP, *since, **chosen):
        turned.setdefault(row.step, {})[row.series] = row.value
    return [(step, *(found[name] for name in ("smallest", "largest", "not finite"))) for step, found in turned.items()]


class _Seen:
    """What the queries are run on: a server on PostgreSQL with two runs, scraped by a Prometheus."""

    def __init__(self, engine: sa.Engine, prometheus: Prometheus) -> None:
        self.engine, self.prometheus = engine, prometheus

    def expand(self, expression: str) -> str:
        """Return PromQL with Grafana's variables in it replaced."""
        values = {"$__rate_interval": "30s", "$project": "vision", "$run": "run-ill", "$job": "gradwatch"}
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        return expression


def _train(server: GradwatchServer, first: int) -> None:
    """Send a sound run, which is clipped, and one that turns ill."""
    names = ["stem.weight", "body.weight", "head.weight"]
    for run, head in (("sound", 0.1), ("ill", math.nan)):
        run_id = f"run-{run}"
        if first == 0:
            server.register(names, id=run_id, project="vision", name=run)
        scalars = {"loss": 1.0, "global_grad_norm": 0.3, "clipped_global_grad_norm": 0.2, "global_grad_norm_limit": 0.2}
        samples = [
            sample(step, 0.1, 0.2, head, overhead_ratio=0.01, step_seconds=0.1, skipped_steps=0, **scalars)
            for step in range(first, first + 5)
        ]
        for measured in samples:
            measured.statistics["clipped_grad_norm"] = measured.statistics["grad_norm"]
        server.store(run_id, wire.Batch(id=str(first), samples=samples)).raise_for_status()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Iterator[_Seen]:
    folder = tmp_path_factory.mktemp("seen")
    with migrated_database(postgres) as url, WebhookReceiver([500]) as receiver:
        engine = open_engine(url)
        options = ["--database-url", url, "--webhook", receiver.url]
        with (
            GradwatchServer(folder / "gradwatch.db", *options) as server,
            Prometheus(folder / "prometheus", scraping(server.url)) as prometheus,
        ):
            _train(server, 0)
            until(lambda: prometheus.query('gradwatch_run_step{run="run-ill"} == 4'), "first scrape")
            _train(server, 5)
            until(lambda: prometheus.query("increase(gradwatch_ingest_batches_total[1m]) > 0"), "second scrape")
            until(lambda: prometheus.query("rate(gradwatch_delivery_attempts_total[1m])"), "attempts to deliver")
            until(lambda: rows(engine, STATEMENTS["gradwatch-alerts.json 6 A"]), "failed attempts")
            yield _Seen(engine, prometheus)
        engine.dispose()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_promql_returns_rows(seen: _Seen, name: str) -> None:
    expanded = seen.expand(EXPRESSIONS[name])
    until(lambda: seen.prometheus.query(expanded), expanded)  # a scrape that timed out is followed by a better one


@pytest.mark.parametrize("name", EVERY_STATEMENT)
def test_every_sql_returns_rows_and_is_right_with_every_choice(seen: _Seen, name: str) -> None:
    statement = EVERY_STATEMENT[name]
    assert rows(seen.engine, statement) or name.endswith("annotation Warning alerts"), statement
    for chosen in choices(statement):
        rows(seen.engine, statement, **chosen)


@pytest.mark.parametrize("name", EVERY_STATEMENT)
def test_every_sql_is_right_where_nothing_was_stored_yet(fresh: sa.Engine, name: str) -> None:
    statement = EVERY_STATEMENT[name]
    for chosen in choices(statement):
        rows(fresh, statement, **chosen)


@pytest.fixture(scope="module")
def fresh(postgres: str) -> Iterator[sa.Engine]:
    with migrated_database(postgres) as url:
        engine = open_engine(url)
        yield engine
        engine.dispose()


def test_a_query_of_something_unknown_returns_none(seen: _Seen) -> None:
    assert not seen.prometheus.query("gradwatch_run_looss")
    assert not rows(seen.engine, SUMMARY, run=["unknown"])


@pytest.mark.parametrize("chosen", [{"run": ["unknown"]}, {"run": []}, {}])
def test_a_chart_without_a_sample_says_so(seen: _Seen, chosen: dict[str, list[str]]) -> None:
    later = time.time() + 1800
    assert [row.layer for row in rows(seen.engine, MAP, later, **chosen)] == [NO_SAMPLE]
    assert [tuple(row) for row in rows(seen.engine, LOSS_BY_STEP, later, **chosen)] == [(None, NO_SAMPLE, None)]
    assert [row[0] for row in rows(seen.engine, UNSAMPLED, later, **chosen)] == [f" · {NO_SAMPLE.lower()}"]
    assert not rows(seen.engine, LOSS, later, **chosen), "Grafana says what the panel has for no value"
    assert [row[0] for row in rows(seen.engine, UNSAMPLED)] == [""]


def test_a_run_is_known_and_what_is_wrong_with_it_is_said(seen: _Seen) -> None:
    (known,) = rows(seen.engine, SUMMARY)
    assert (known.State, known.Step, known.Loss, known.Parameters, known[3]) == ("running", 9, 1.0, 3, None)
    (wrong,) = rows(seen.engine, WRONG)
    assert (wrong.severity, wrong.rule) == ("critical", "nonfinite")
    assert min(len(wrong.what), len(wrong.cause), len(wrong.remedy)) > 10


def test_a_nan_is_a_nan_in_the_map_and_in_the_profile(seen: _Seen) -> None:
    cells = _cells(seen.engine)
    assert [row.layer for row in cells[:3]] == ["stem.weight", "body.weight", "head.weight"]
    assert {row.layer for row in cells if math.isnan(row.ratio or 0.0)} == {"head.weight"}
    assert [row.depth for row in rows(seen.engine, PROFILE)] == [1, 2, 3]
    *sound, ill = rows(seen.engine, PROFILE)
    assert [row[4] for row in sound] == [None, None]
    assert (ill.parameter, ill[1], ill[2], ill[4] > 0) == ("head.weight", None, None, True)
    assert [row.ratio for row in (*sound, ill)] == ["1.0e-01", "2.0e-01", "NaN or infinite"]


def test_after_clipping_is_drawn_where_it_made_the_norm_smaller(seen: _Seen) -> None:
    assert {row[1] for row in rows(seen.engine, AFTER)} == {0.2}
    same = AFTER.replace("(1 - 1e-6)", "0.5")
    assert {row[1] for row in rows(seen.engine, same)} == {None}


def test_an_alert_that_began_before_the_range_is_marked(seen: _Seen) -> None:
    critical = ANNOTATIONS["gradwatch-run.json annotation Critical alerts"]
    with writing(seen.engine) as connection:
        connection.exec_driver_sql("UPDATE alerts SET fired_at = fired_at - 7200")
    (region,) = rows(seen.engine, critical, time.time() - 60)
    assert region.time < time.time() - 3600 < region.timeend
    with writing(seen.engine) as connection:
        connection.exec_driver_sql("UPDATE alerts SET fired_at = fired_at + 7200")


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
        found = rows(engine, RUNS, project=["vision", "patient", "off"])
        later = rows(engine, RUNS, time.time() + 1800, project=["vision", "patient", "off"])
        engine.dispose()
    assert states == {"vision": "stalled", "patient": "running", "off": "running"}
    assert {row.run: row.state for row in found} == states
    assert {row.run for row in later} == states.keys(), (
        "the numbers above the table count them, whatever time is chosen"
    )
    assert stalled == ["vision"]


SPIKE, FAULT = 13 * 700, 13 * 1200


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Iterator[sa.Engine]:
    """A run of 39,000 steps at ten a second, every 13th of them sampled; much of what was measured is deleted."""
    began = time.time() - 4000
    with migrated_database(postgres) as url:
        engine = open_engine(url)
        folder = tmp_path_factory.mktemp("long")
        with GradwatchServer(folder / "gradwatch.db", "--database-url", url) as server:
            run_id = server.register(["stem.weight", "head.weight"], id="run-long", project="vision", name="long")
            for first in range(0, 3000, 1000):
                steps = range(13 * first, 13 * (first + 1000))
                measured = [
                    sample(step, 5e3 if step == SPIKE else 0.1, math.nan if step == FAULT else 0.2)
                    for step in steps[::13]
                ]
                samples = [msgspec.structs.replace(each, at=began + each.step / 10) for each in measured]
                losses: list[wire.Number] = ["NaN" if step == 100 else abs(step - 5_000.0) for step in steps]
                trail = {"loss": wire.Trail(steps=list(steps), values=losses)}
                server.store(run_id, wire.Batch(id=str(first), samples=samples, trail=trail)).raise_for_status()
        with writing(engine) as connection:  # what was measured is gone: the roll-ups have to know
            connection.exec_driver_sql("DELETE FROM samples WHERE level = 0 AND step BETWEEN 1000 AND 30000")
            connection.exec_driver_sql(f"UPDATE runs SET started_at = {began}, usual_interval_seconds = 1.3")
        yield engine
        engine.dispose()


def _began(engine: sa.Engine) -> float:
    with engine.connect() as connection:
        (began,) = connection.exec_driver_sql("SELECT started_at FROM runs").one()
    return float(began)


def test_long_ranges_are_read_from_the_rollups_and_nothing_is_lost(long: sa.Engine) -> None:
    cells = _cells(long, run=["run-long"])
    losses = _by_step(long, run=["run-long"])
    times = sorted({row.time for row in cells})
    stem, head = ([row for row in cells if row.layer == layer] for layer in ("stem.weight", "head.weight"))
    assert 40 <= len(stem) == len(head) <= 92
    assert [row.time for row in stem] == times
    began = _began(long)
    assert [row.time.timestamp() - began for row in stem if (row.ratio or 0) > 1e3] == [pytest.approx(910, abs=90)]
    assert [row.time.timestamp() - began for row in head if math.isnan(row.ratio or 0)] == [pytest.approx(1560, abs=90)]
    assert 150 < len(losses) <= 400
    assert [row[0] for row in losses] == sorted({row[0] for row in losses})
    assert (min(row[1] for row in losses), max(row[2] for row in losses)) == (0.0, 39_000 - 1 - 5_000.0)
    assert [row[0] for row in losses if row[3] is not None] == [losses[1][0] if losses[1][0] <= 100 else 0]


@pytest.mark.parametrize("seconds", [20, 60, 300, 850])
def test_a_zoom_holds_every_step_of_its_time_and_no_other(long: sa.Engine, seconds: float) -> None:
    with long.connect() as connection:
        (last,) = connection.exec_driver_sql("SELECT max(at) FROM samples WHERE level = 0").one()
    found = _by_step(long, last - seconds, run=["run-long"])
    first = 38_987 - 10 * seconds
    assert found[0][0] == pytest.approx(first, abs=26)
    assert max(row[2] for row in found) == 33_999.0
    assert min(row[1] for row in found) == pytest.approx(first - 5_000, abs=26)
    assert len(found) <= 400
    if seconds == 20:
        assert [row[1] for row in found] == [row[0] - 5_000 for row in found], "each step is a point of its own"


def test_a_run_that_was_killed_does_not_go_on_as_a_line(long: sa.Engine) -> None:
    cells = _cells(long, run=["run-long"])
    assert [row.ratio for row in cells[-2:]] == [None, None], "the map ends where the samples do"
    assert max(row.time.timestamp() for row in cells) - _began(long) == pytest.approx(3899, abs=2)


_WIDE = [f"layers.{layer}.{part}.weight" for layer in range(26) for part in ("query", "key", "value")]
_WIDE += [f"layers.{layer}.{part}.bias" for layer in range(60) for part in ("a", "b", "c", "d")]
_WIDER = [f"decoder.{layer}.{part}" for layer in range(250) for part in "abcdefgh"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Iterator[sa.Engine]:
    """A run of 318 parameters of which 600 steps are sampled, a copy of it, and one of 2,000 with a few samples."""
    plan = [("run-wide", _WIDE, 600), ("run-copy", _WIDE, 600), ("run-wider", _WIDER, 20)]
    with migrated_database(postgres) as url:
        engine = open_engine(url)
        folder = tmp_path_factory.mktemp("wide")
        with GradwatchServer(folder / "gradwatch.db", "--database-url", url) as server:
            for run_id, names, count in plan:
                server.register(names, id=run_id, project="vision", name=run_id)
                for first in range(0, count, 100):
                    steps = range(first, min(first + 100, count))
                    samples = [sample(step, *[0.1234567] * len(names), loss=1.0) for step in steps]
                    server.store(run_id, wire.Batch(id=str(first), samples=samples)).raise_for_status()
        yield engine
        engine.dispose()


def test_a_board_of_318_parameters_is_small_as_it_is_sent(wide: sa.Engine) -> None:
    """Grafana and the proxies before it compress what they send."""
    sizes = {}
    for name in ("1 A", "2 A", "3 A", "4 A", "4 B", "4 C", "5 A", "6 A"):
        found = rows(wide, STATEMENTS[f"gradwatch-run.json {name}"], run=["run-wide"], layers=["1-318"])
        columns = [[str(value) for value in column] for column in zip(*found, strict=True)]
        sizes[name] = len(gzip.compress(json.dumps(columns).encode()))
    assert sizes["5 A"] < 500_000
    assert sum(sizes.values()) < 1_000_000


def test_a_chart_costs_what_its_run_and_its_time_hold_and_not_what_else_is_stored(wide: sa.Engine) -> None:
    cells = _cells(wide, run=["run-wide"], layers=["1-318"])
    assert calls(wide, MAP, run=["run-wide"], layers=["1-318"]) <= 640 + len({row.time for row in cells})
    assert calls(wide, PROFILE, run=["run-wide"]) == 1


@pytest.mark.parametrize("panel", [3, 21])
def test_a_zoom_does_not_take_the_whole_run_apart(long: sa.Engine, panel: int) -> None:
    with long.connect() as connection:
        (last,) = connection.exec_driver_sql("SELECT max(at) FROM samples WHERE level = 0").one()
    with long.connect() as connection:
        (trails,) = connection.exec_driver_sql("SELECT count(*) FROM trails").one()
    assert calls(long, STATEMENTS[f"gradwatch-run.json {panel} A"], last - 20, run=["run-long"]) <= 4 < trails


def test_every_layer_of_the_map_is_reached(wide: sa.Engine) -> None:
    (first, *others), wider = (rows(wide, PAGES, run=[run]) for run in ("run-wide", "run-wider"))
    assert (tuple(first), tuple(others[0])) == (("all 318", "1-318"), ("by blocks", "all"))
    assert [row[1] for row in others[1:]] == [f"{low}-{min(low + 39, 318)}" for low in range(1, 318, NAMED_ROWS)]
    assert wider[0][1] == "all"
    assert [row[1] for row in wider[1:8]] == [f"{low}-{min(low + 319, 2000)}" for low in range(1, 2000, MOST_ROWS)]
    assert [row[1] for row in wider[8:]] == [f"{low}-{low + 39}" for low in range(1, 2000, NAMED_ROWS)]


@pytest.mark.parametrize(
    ("run", "layers", "height", "named"),
    [
        ("run-wide", "1-318", 318, 40),
        ("run-wide", "all", 40, 40),
        ("run-wide", "281-318", 38, 38),
        ("run-wider", "1-320", 320, 40),
        ("run-wider", "all", 40, 40),
        ("run-wider", "1-2000", 40, 40),
        ("run-wider", "1921-2000", 80, 40),
    ],
)
def test_a_map_has_a_row_for_each_parameter_that_is_chosen_and_names_with_room(
    wide: sa.Engine, run: str, layers: str, height: int, named: int
) -> None:
    found = list(dict.fromkeys(row.layer for row in _cells(wide, run=[run], layers=[layers])))
    assert len(found) == height
    assert len([layer for layer in found if not layer.endswith(UNNAMED)]) == named
    assert max(map(len, found)) <= 34
    if (run, layers) == ("run-wider", "all"):
        assert found[:2] == ["decoder.0 to 6", "decoder.7 to 13"]


def test_the_legend_of_the_map_is_before_its_time(wide: sa.Engine) -> None:
    legend = [row for row in rows(wide, MAP, run=["run-wide"]) if row.layer == LEGEND]
    assert [row.ratio for row in legend] == list(range(1, len(RATIO_LEGEND) + 1))
    assert max(row.time.timestamp() for row in legend) < 0.91e9


def test_a_layer_is_named_by_its_end_and_no_two_alike(postgres: str, tmp_path: Path) -> None:
    names = [f"a.module.with.a.long.path.number{n}.and.the.same.end.for.every.one.of.them" for n in range(3)]
    with migrated_database(postgres) as url:
        engine = open_engine(url)
        with GradwatchServer(tmp_path / "gradwatch.db", "--database-url", url) as server:
            run_id = server.register(names, id="run-long-names", project="vision", name="long names")
            server.store(run_id, wire.Batch(id="1", samples=[sample(1, 0.1, 0.2, 0.3)])).raise_for_status()
        layers = [row.layer for row in _cells(engine, run=[run_id])][:3]
        engine.dispose()
    assert len(set(layers)) == 3
    assert all(layer.startswith("…") and "every.one.of.them" in layer for layer in layers)
