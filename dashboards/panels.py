"""The kinds of panels that the boards consist of, as Grafana stores them, with one look."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dashboards import colours
from dashboards.colours import NEUTRAL, NUMBERS, UNKNOWN, Steps

Json = dict[str, Any]
Panel = Json
PROMETHEUS = {"type": "prometheus", "uid": "${prometheus}"}
POSTGRES = {"type": "grafana-postgresql-datasource", "uid": "${postgres}"}
Scale = Literal["linear", "symlog"]
_SCALES: dict[Scale, Json] = {
    "linear": {"type": "linear"},
    "symlog": {"type": "symlog", "log": 10, "linearThreshold": 1e-12},
}
"""A logarithm that has a place for 0, which the sickest layers are at, and for a loss below 0."""
GRAFANA_VERSION = "12.3.0"
"""What the options are written for: without it Grafana takes them for those of an old version and migrates them."""
AXIS_WIDTH = 220
"""Pixels left of every chart that stands above or below the map, whose rows have names: their times are aligned."""

NO_NUMBER = "No number from Prometheus in this time"


def sql(statement: str, ref_id: str = "A") -> Json:
    """Return a query of PostgreSQL that yields a table."""
    return {
        "refId": ref_id,
        "datasource": POSTGRES,
        "editorMode": "code",
        "rawQuery": True,
        "format": "table",
        "rawSql": statement,
    }


def promql(expression: str, legend: str = "", ref_id: str = "A", *, instant: bool = False) -> Json:
    """Return a query of Prometheus."""
    query = {"refId": ref_id, "datasource": PROMETHEUS, "expr": expression, "legendFormat": legend}
    return query | {"instant": instant, "range": not instant, "editorMode": "code"}


def override(name: str, *, regex: bool = False, custom: Mapping[str, Any] | None = None, **properties: Any) -> Json:
    """Return the settings of the fields of one name, or of those that a regular expression matches."""
    listed = [{"id": key, "value": value} for key, value in properties.items()]
    listed += [{"id": f"custom.{key}", "value": value} for key, value in (custom or {}).items()]
    return {"matcher": {"id": "byRegexp" if regex else "byName", "options": name}, "properties": listed}


def fixed(colour: str) -> Json:
    """Return the setting of one colour."""
    return {"mode": "fixed", "fixedColor": colour}


def by_name(colour_of: Mapping[str, str], pattern: str = "{}") -> list[Json]:
    """Return the settings that give series their colours by name; ``pattern`` is the series' name around it."""
    return [override(f"/^{pattern.format(name)}$/", regex=True, color=fixed(each)) for name, each in colour_of.items()]


def panel(
    number: int,
    kind: str,
    title: str,
    description: str,
    targets: Sequence[Json],
    *,
    unit: str = "none",
    steps: Steps = NEUTRAL,
    options: Mapping[str, Any],
    custom: Mapping[str, Any] | None = None,
    overrides: Sequence[Json] = (),
    **defaults: Any,
) -> Panel:
    """Return a panel without a place.

    Args:
        number: its id, which links and saved views name: it stays.
        kind: Grafana's id of the kind of panel.
        title: the heading.
        description: what it shows, as full sentences.
        targets: its queries.
        unit: Grafana's id of the unit of its numbers.
        steps: thresholds with their colours.
        options: the options of this kind of panel.
        custom: the options of its fields.
        overrides: settings of single fields.
        defaults: further settings of all fields.
    """
    field = {"unit": unit, "noValue": UNKNOWN, "mappings": list(NUMBERS), "custom": dict(custom or {})}
    field["thresholds"] = colours.thresholds(steps)
    return {
        "id": number,
        "type": kind,
        "pluginVersion": GRAFANA_VERSION,
        "title": title,
        "description": description,
        "datasource": targets[0]["datasource"],
        "targets": list(targets),
        "options": dict(options),
        "fieldConfig": {"defaults": field | defaults, "overrides": list(overrides)},
    }


def numbers(number: int, title: str, description: str, *targets: Json, overrides: Sequence[Json], **more: Any) -> Panel:
    """Return a panel with one large number for each column of the query's first row."""
    options = {
        "reduceOptions": {
            "calcs": ["last"],
            "fields": "" if targets[0]["datasource"] is PROMETHEUS else "/.*/",
            "values": False,
        },
        "text": {"titleSize": 14, "valueSize": 20},
        "orientation": "vertical",
        "textMode": "value_and_name",
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "center",
        "wideLayout": False,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
    }
    settings = {"color": {"mode": "thresholds"}} | more
    return panel(number, "stat", title, description, targets, options=options, overrides=overrides, **settings)


def lines(
    number: int,
    title: str,
    description: str,
    *targets: Json,
    nothing: str = NO_NUMBER,
    scale: Scale = "linear",
    custom: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Panel:
    """Return a panel with lines over time; ``nothing`` is said where there is none."""
    options = {"legend": legend_at("bottom"), "tooltip": {"mode": "multi", "sort": "desc"}}
    drawn = _line(scale) | dict(custom or {})
    made = panel(number, "timeseries", title, description, targets, options=options, custom=drawn, **settings)
    made["fieldConfig"]["defaults"]["noValue"] = nothing
    return made


def over_steps(number: int, title: str, description: str, target: Json, scale: Scale, **settings: Any) -> Panel:
    """Return a panel with lines over steps, whose query yields ``step``, ``series`` and ``value``."""
    options = {"xField": "step", "legend": legend_at("bottom"), "tooltip": {"mode": "multi", "sort": "none"}}
    overrides = [
        override("step", unit="none", decimals=0, custom={"scaleDistribution": {"type": "linear"}}),
        *settings.pop("overrides", ()),
    ]
    made = panel(
        number,
        "trend",
        title,
        description,
        [target],
        options=options,
        custom=_line(scale),
        overrides=overrides,
        **settings,
    )
    return made | {"transformations": [*matrix("step", "series", "value"), renamed(r"step\\.*", "step")]}


def matrix(row_field: str, column_field: str, value_field: str) -> list[Json]:
    """Return the transformation of rows to a table with a column for each value of ``column_field``."""
    fields = {"rowField": row_field, "columnField": column_field, "valueField": value_field}
    return [{"id": "groupingToMatrix", "options": fields | {"emptyValue": "null"}}]


def renamed(pattern: str, name: str) -> Json:
    """Return the transformation that renames the columns which a regular expression matches as a whole."""
    return {"id": "renameByRegex", "options": {"regex": f"^{pattern}$", "renamePattern": name}}


def table(number: int, title: str, description: str, target: Json, *overrides: Json, nothing: str) -> Panel:
    """Return a table; ``nothing`` is said where it has no row, and a dash where a cell has no value."""
    options = {"showHeader": True, "cellHeight": "sm", "frameIndex": 0}
    custom = {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False}
    made = panel(number, "table", title, description, [target], options=options, custom=custom, overrides=overrides)
    made["fieldConfig"]["defaults"]["noValue"] = nothing
    return made


WRAPPED: Json = {"cellOptions": {"type": "auto", "wrapText": True}, "wrapText": True}
"""Newer and older versions of Grafana look for the setting in different places."""


def text_column(name: str, least: int = 130) -> Json:
    """Return the settings of a column of sentences, at least so many pixels wide: they are wrapped, not cut."""
    return override(name, custom={**WRAPPED, "minWidth": least})


def state_column(name: str, colour_of: Mapping[str, str], width: int = 92) -> Json:
    """Return the settings of a column whose words have colours."""
    custom = {"cellOptions": {"type": "color-text"}, "width": width}
    return override(name, mappings=[colours.named(dict(colour_of)), *NUMBERS], custom=custom)


def hidden(pattern: str) -> Json:
    """Return the settings of columns that only links read; older versions of Grafana know the second of the two."""
    return override(f"/^({pattern})$/", regex=True, custom={"hideFrom.viz": True, "hidden": True})


def when(name: str, width: int = 130) -> Json:
    """Return the settings of a column with a time that is read as a distance: 3 minutes ago."""
    return override(name, unit="dateTimeFromNow", custom={"width": width, **WRAPPED})


def row(number: int, title: str, *inside: Panel) -> Panel:
    """Return the heading of a row that is closed at first; its queries are asked when it is opened."""
    return {"id": number, "type": "row", "title": title, "collapsed": True, "panels": list(inside)}


def legend_at(placement: str, **more: Any) -> Json:
    """Return a legend that lists names: numbers stand where they are not skipped if they are NaN."""
    return {"showLegend": True, "displayMode": "list", "placement": placement, "calcs": []} | more


def _line(scale: Scale) -> Json:
    return {
        "lineWidth": 1,
        "showPoints": "auto",
        "pointSize": 4,
        "spanNulls": False,
        "scaleDistribution": _SCALES[scale],
    }
