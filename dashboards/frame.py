"""Makes a dashboard of rows of panels: their places, the links between boards, and the variables."""

from collections.abc import Mapping, Sequence
from typing import Any

from dashboards.panels import POSTGRES, Json, Panel
from dashboards.queries.runs import CHOSEN_PROJECTS

TITLES = {
    "gradwatch-fleet": "gradwatch · Fleet",
    "gradwatch-run": "gradwatch · Run",
    "gradwatch-alerts": "gradwatch · Alerts and deliveries",
    "gradwatch-server": "gradwatch · Server",
}
COLUMNS = 24
PAGE = "http://127.0.0.1:8321"
JOB = "gradwatch"
_PROJECTS = "SELECT DISTINCT project FROM runs ORDER BY project LIMIT 500"
_RUNS = f"""\
SELECT left(name, 60) || ', ' || to_char(to_timestamp(started_at), 'Mon DD HH24:MI') AS __text, id AS __value FROM runs
WHERE project = {CHOSEN_PROJECTS} ORDER BY last_seen_at DESC LIMIT 500"""
Row = tuple[int, Sequence[tuple[int, Panel]]]
"""Height, and (width, panel) from left to right."""


def board(
    uid: str,
    description: str,
    rows: Sequence[Row | Panel],
    *,
    variables: Sequence[Json] = (),
    links: Sequence[Json] = (),
    annotations: Sequence[Json] = (),
) -> Json:
    """Return a dashboard.

    Args:
        uid: names it in addresses.
        description: what it is for.
        rows: rows of panels from top to bottom, or headings of rows that are closed at first.
        variables: beside the data sources.
        links: beside those to the other boards.
        annotations: what is marked in its charts.
    """
    sources = [_source("postgres", "PostgreSQL", POSTGRES["type"]), _source("prometheus", "Prometheus", "prometheus")]
    return {
        "uid": uid,
        "title": TITLES[uid],
        "description": description,
        "tags": ["gradwatch"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [*_board_links(uid), *links],
        "annotations": {"list": list(annotations)},
        "templating": {"list": [*variables, *sources, constant("page", PAGE), constant("job", JOB)]},
        "panels": _placed(rows),
    }


def _placed(rows: Sequence[Row | Panel]) -> list[Panel]:
    """Return the panels with their places; the panels of a closed row lie below its heading."""
    placed, y = [], 0
    for row in rows:
        if isinstance(row, Mapping):
            placed.append(_closed(row, y))
            y += 1
            continue
        height, panels = row
        x = 0
        for width, panel in panels:
            placed.append(panel | {"gridPos": {"x": x, "y": y, "w": width, "h": height}})
            x += width
        assert x == COLUMNS, f"the row of {panels[0][1]['title']!r} is {x} columns wide"
        y += height
    return placed


def _closed(row: Panel, y: int) -> Panel:
    """Return the heading of a closed row at this height, with its panels side by side below it."""
    width = COLUMNS // len(row["panels"])
    inside = [_shifted(each, y + 1) for each in _placed([(8, [(width, each) for each in row["panels"]])])]
    return row | {"gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}, "panels": inside}


def _shifted(panel: Panel, rows: int) -> Panel:
    place = panel["gridPos"]
    return panel | {"gridPos": place | {"y": place["y"] + rows}}


def link(title: str, url: str, *, keeps_time: bool, tooltip: str = "", icon: str = "dashboard") -> Json:
    """Return a link at the top of a board."""
    of_board = {"asDropdown": False, "includeVars": False, "keepTime": keeps_time, "tags": [], "targetBlank": False}
    return {"title": title, "url": url, "type": "link", "icon": icon, "tooltip": tooltip} | of_board


def _board_links(uid: str) -> list[Json]:
    kept = "?${project:queryparam}&${postgres:queryparam}&${prometheus:queryparam}"
    without = "?${postgres:queryparam}&${prometheus:queryparam}"
    return [
        link(title.partition(" · ")[2], f"/d/{other}{without if uid == 'gradwatch-server' else kept}", keeps_time=True)
        for other, title in TITLES.items()
        if other != uid
    ]


def _source(name: str, label: str, kind: str) -> Json:
    about = {"name": name, "label": label, "type": "datasource", "query": kind, "refresh": 1, "regex": ""}
    return about | {"multi": False, "includeAll": False, "hide": 1, "skipUrlSync": False, "options": []}


def constant(name: str, value: str) -> Json:
    """Return a variable that is set once, where the board is imported."""
    chosen = {"text": value, "value": value, "selected": True}
    about = {"name": name, "type": "constant", "query": value, "hide": 2, "skipUrlSync": True}
    return about | {"current": chosen, "options": [chosen]}


def query_variable(name: str, label: str, statement: str, **more: Any) -> Json:
    """Return a variable whose choices a query of PostgreSQL yields."""
    about = {"name": name, "label": label, "type": "query", "datasource": POSTGRES, "query": statement, "refresh": 2}
    return about | {"sort": 0, "hide": 0, "multi": False, "includeAll": False, "options": []} | more


def project_variable() -> Json:
    """Return the variable by which a reader chooses projects."""
    everything = {"text": ["All"], "value": ["$__all"]}
    return query_variable("project", "Project", _PROJECTS, multi=True, includeAll=True, current=everything)


def run_variable() -> Json:
    """Return the variable by which a reader chooses a run of the chosen projects; the run seen last comes first."""
    return query_variable("run", "Run", _RUNS)
