"""The dashboards' files: in step with their code, laid out, and valid by the types of the newest and oldest Grafana."""

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from dashboards import colours
from dashboards.build import FOLDER, render
from dashboards.frame import TITLES
from dashboards.queries.layers import LEGEND
from dashboards.queries.steps import NO_SAMPLE

from tests.processes import ROOT
from tests.prometheus.boards import BOARDS, PANELS, Board, panels_of


def _in_step(folder: Path) -> bool:
    return {file.name: file.read_text() for file in folder.glob("*.json")} == render()


def test_the_files_are_in_step_with_the_code() -> None:
    assert _in_step(FOLDER), "run: python -m dashboards.build"


def test_a_file_out_of_step_is_found(tmp_path: Path) -> None:
    for name, text in render().items():
        (tmp_path / name).write_text(text.replace("now-1h", "now-2h"))
    assert not _in_step(tmp_path)


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_says_what_it_shows(name: str) -> None:
    defaults = PANELS[name]["fieldConfig"]["defaults"]
    assert PANELS[name]["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"]


# Layout


def _layout_faults(board: Board) -> list[str]:
    """Return which panels overlap, reach over the edge, or are not as high as others of their row."""
    found: list[str] = []
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        if place["x"] + place["w"] > 24:
            found.append(f"{panel['title']} reaches over the edge")
        cells = [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        found += [f"{panel['title']} overlaps {taken[cell]}" for cell in cells[:1] if cell in taken]
        taken |= dict.fromkeys(cells, panel["title"])
        heights = {other["gridPos"]["h"] for other in board["panels"] if other["gridPos"]["y"] == place["y"]}
        if len(heights) > 1:
            found.append(f"{panel['title']} stands in a ragged row")
    lowest = max(y for _, y in taken)
    found += [f"there is a hole at {x}, {y}" for y in range(lowest + 1) for x in range(24) if (x, y) not in taken][:1]
    order = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in board["panels"]]
    return found + ([] if order == sorted(order) else ["the panels are not in the order of their places"])


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_their_rows_and_do_not_overlap(name: str) -> None:
    assert _layout_faults(BOARDS[name]) == []
    for row in BOARDS[name]["panels"]:
        if row["type"] == "row":
            assert row["collapsed"]
            assert sum(panel["gridPos"]["w"] for panel in row["panels"]) == 24


@pytest.mark.parametrize("moved", [{"x": 1}, {"w": 20}, {"h": 5}, {"y": 3}])
def test_a_fault_of_the_layout_is_found(moved: dict[str, int]) -> None:
    board = copy.deepcopy(BOARDS["gradwatch-fleet.json"])
    board["panels"][0]["gridPos"] |= moved
    assert _layout_faults(board)


def test_ids_are_those_that_links_and_saved_views_name() -> None:
    ids = {name: [panel["id"] for panel in board["panels"]] for name, board in BOARDS.items()}
    assert ids == {
        "gradwatch-fleet.json": [1, 2, 3, 4, 5, 6, 7],
        "gradwatch-run.json": [1, 2, 3, 4, 5, 6, 20, 30, 40],
        "gradwatch-alerts.json": [1, 2, 3, 4, 5, 6],
        "gradwatch-server.json": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    }
    assert [panel["id"] for panel in panels_of(BOARDS["gradwatch-run.json"])][6:] == [21, 22, 31, 32, 33, 41]


# What is said


@pytest.mark.parametrize("name", PANELS)
def test_no_number_without_a_sample_is_0_and_none_that_is_not_finite_is_blank(name: str) -> None:
    panel = PANELS[name]
    defaults = panel["fieldConfig"]["defaults"]
    assert not re.search(r"\d", defaults["noValue"])
    assert not re.search(r"\bor vector\(0\)", json.dumps(panel["targets"]))
    special = {m["options"]["match"]: m["options"]["result"] for m in defaults["mappings"] if m["type"] == "special"}
    assert (special["nan"]["text"], bool(special["nan"]["color"])) == ("NaN", True)
    assert panel["type"] == "state-timeline" or special["null"]["text"] == colours.UNKNOWN  # a gap is one there


@pytest.mark.parametrize("name", [name for name, panel in PANELS.items() if panel["type"] != "stat"])
def test_a_chart_says_in_words_that_it_is_empty(name: str) -> None:
    panel = PANELS[name]
    assert len(re.findall(r"[a-z]+", panel["fieldConfig"]["defaults"]["noValue"], re.IGNORECASE)) >= 3
    if panel["type"] in ("trend", "state-timeline"):  # Grafana draws axes there, or complains that a column is missing
        assert NO_SAMPLE in panel["targets"][0]["rawSql"]
    if panel["type"] == "xychart":
        assert panel["title"].endswith("${unsampled}")


def test_the_legend_of_the_map_names_every_colour_of_it() -> None:
    defaults, overrides = (PANELS["gradwatch-run.json 5"]["fieldConfig"][key] for key in ("defaults", "overrides"))
    (legend,) = [each["properties"] for each in overrides if each["matcher"]["options"] == LEGEND]
    settings = {each["id"]: each["value"] for each in legend}
    items = sorted(settings["mappings"][0]["options"].values(), key=lambda item: int(item["index"]))
    steps = [step["color"] for step in defaults["thresholds"]["steps"]]
    assert [item["color"] for item in items][: len(steps)] == steps
    nan, zero = (mapping["options"] for mapping in defaults["mappings"])
    words = {item["text"]: item["color"] for item in items[len(steps) :]}
    assert words.pop("NaN or infinite") == nan["result"]["color"]
    assert words.pop("exactly 0") == zero["0"]["color"]
    assert [word.partition(":")[0] for word in words] == ["blank"]
    assert (settings["custom.hideFrom"]["legend"], defaults["custom"]["hideFrom"]["legend"]) == (False, True)


@pytest.mark.parametrize("name", PANELS)
def test_a_legend_names_no_last_value_that_is_not_null(name: str) -> None:
    assert "lastNotNull" not in json.dumps(PANELS[name]["options"])


def test_a_severity_a_state_and_a_rule_have_one_colour_on_every_board() -> None:
    known = colours.SEVERITIES | colours.STATES | colours.RULES
    found: dict[str, set[str]] = {}
    for panel in PANELS.values():
        for override in panel["fieldConfig"]["overrides"]:
            matched = re.fullmatch(r"/\^(\w+)\$/", override["matcher"]["options"])
            for setting in override["properties"]:
                if matched and setting["id"] == "color":
                    found.setdefault(matched[1], set()).add(setting["value"]["fixedColor"])
                for mapping in setting["value"] if setting["id"] == "mappings" else []:
                    if mapping["type"] == "value":
                        for word, result in mapping["options"].items():
                            found.setdefault(word, set()).add(result["color"])
    rule_and_state = {
        "dead": {colours.RULES["dead"], colours.STATES["dead"]}
    }  # a rule, and a delivery that was given up
    for word in sorted(set(found) & set(known)):
        assert found[word] <= rule_and_state.get(word, {known[word]}), word
    assert set(colours.SEVERITIES) | set(colours.RULES) <= set(found)


def test_the_dashboards_link_to_each_other_and_to_the_run_in_its_own_time() -> None:
    for board in BOARDS.values():
        targets = {link["url"].partition("?")[0] for link in board["links"] if link["url"].startswith("/d/")}
        assert targets == {f"/d/{uid}" for uid in TITLES if uid != board["uid"]}
        assert "placement" not in json.dumps([board["links"], board["annotations"]])
    for name in ("gradwatch-fleet.json 3", "gradwatch-alerts.json 2", "gradwatch-alerts.json 5"):
        (url,) = re.findall(r'"url": "(/d/gradwatch-run[^"]+)"', json.dumps(PANELS[name]))
        assert "from=${__data.fields.opens_from}&to=${__data.fields.opens_to}" in url


def test_a_board_is_imported_into_a_grafana_that_is_there() -> None:
    for name, board in BOARDS.items():
        assert board["editable"] is True
        variables = {variable["name"]: variable for variable in board["templating"]["list"]}
        assert [variables[source]["type"] for source in ("postgres", "prometheus")] == ["datasource"] * 2
        uids = set(
            re.findall(r'"datasource": \{"type": "[^"]+", "uid": "([^"]+)"\}', json.dumps(board, sort_keys=True))
        )
        assert uids <= {"${postgres}", "${prometheus}"}, name
        assert 'job=\\"gradwatch' not in json.dumps(board)


# Grafana's own types


@pytest.fixture(scope="module", params=[13, 10])
def schema(request: pytest.FixtureRequest) -> Board:
    version: int = request.param
    return _schema(version)


def _schema(version: int) -> Board:
    generator = ROOT / "node_modules" / ".bin" / "ts-json-schema-generator"
    folder = Path("dashboards") / "types"
    command = [str(generator), "--path", str(folder / f"grafana{version}.ts"), "--no-type-check"]
    command += ["--tsconfig", str(folder / "tsconfig10.json")] if version == 10 else []
    generated = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"version": version, **json.loads(generated.stdout)}


IGNORED_BY_10 = {
    "StateTimelineCustom": {"axisWidth"},
    "TableCustom": {"wrapText"},
    "StatOptions": {"percentChangeColorMode"},
    "XychartOptions": {"mapping"},
    "XychartCustom": {"pointSize", "fillOpacity"},
}
"""What Grafana 10.4 does not know and passes over: charts are less aligned, text is not wrapped, points are smaller."""
KINDS = {"state-timeline": "StateTimeline"}


def _faults(schema: Board, board: Board) -> list[str]:
    """Return where a dashboard, or a panel in it, is not what Grafana's types say."""
    panels = list(panels_of(board))
    shown = copy.deepcopy(board)
    for annotation in shown.get("annotations", {}).get("list", []):
        del annotation["target"]  # a query of its data source, which the type says it "should" be; run below
    found = _check(schema, "Board", shown)
    for panel in panels:
        kind = KINDS.get(panel["type"], panel["type"].capitalize())
        found += _check(schema, f"{kind}Options", panel["options"])
        if f"{kind}Custom" in schema["definitions"]:
            found += [fault for custom in _customs(panel) for fault in _check(schema, f"{kind}Custom", custom)]
    return found


def _customs(panel: Board) -> Iterator[Board]:
    """Yield the options of a panel's fields, and what they are with each override."""
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    yield custom
    for override in panel["fieldConfig"]["overrides"]:
        changed = {each["id"]: each["value"] for each in override["properties"] if each["id"].startswith("custom.")}
        known = {key[7:]: value for key, value in changed.items() if key.count(".") == 1 and key != "custom.hidden"}
        if panel["type"] == "table":  # wrapText was there before Grafana 12.2, which passes over it
            known["cellOptions"] = {"type": known.get("cellOptions", custom["cellOptions"])["type"]}
        yield custom | known


def _check(schema: Board, kind: str, document: Board) -> list[str]:
    ignored = IGNORED_BY_10.get(kind, set()) if schema["version"] == 10 else set()
    known = {key: value for key, value in document.items() if key not in ignored}
    if kind == "XychartOptions" and ignored:  # 10.4 finds x and y by their types where no dimensions are chosen
        known |= {"series": [], "dims": {"frame": 0}}
    validator = jsonschema.Draft7Validator({**schema, "$ref": f"#/definitions/{kind}"})
    return [f"{kind} {error.json_path}: {error.message[:300]}" for error in validator.iter_errors(known)]


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_valid_by_grafanas_types(schema: Board, name: str) -> None:
    assert _faults(schema, BOARDS[name]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("titel",), "misspelt"),
        (("panels", 2, "options", "legnd"), {}),
        (("panels", 2, "fieldConfig", "defaults", "custom", "drawStyle"), "crayon"),
        (("panels", 2, "fieldConfig", "defaults", "thresholds", "mode"), "relative"),
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
