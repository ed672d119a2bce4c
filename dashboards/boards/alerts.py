"""The board of alerts and of their deliveries to receivers."""

from dashboards import colours
from dashboards.colours import FEW_ARE_BEST, NONE_IS_BEST
from dashboards.frame import board, project_variable
from dashboards.panels import (
    WRAPPED,
    Json,
    Panel,
    by_name,
    hidden,
    lines,
    numbers,
    override,
    sql,
    state_column,
    table,
    text_column,
    when,
)
from dashboards.queries import runs

_CHOSEN = f"r.project = {runs.CHOSEN_PROJECTS}"
_OF_DELIVERIES = f"FROM deliveries d JOIN alerts a ON a.id = d.alert JOIN runs r ON r.id = a.run WHERE {_CHOSEN}"
_COUNTS = f"""\
WITH firing AS (
  SELECT a.severity FROM alerts a JOIN runs r ON r.id = a.run WHERE a.state = 'firing' AND {_CHOSEN}
), sent AS (SELECT d.state, d.created_at {_OF_DELIVERIES} AND d.state <> 'delivered')
SELECT (SELECT count(*) FROM firing WHERE severity = 'critical') AS "Critical alerts",
  (SELECT count(*) FROM firing WHERE severity = 'warning') AS "Warnings",
  (SELECT count(*) FROM sent WHERE state = 'due') AS "Deliveries that wait",
  (SELECT extract(epoch FROM now()) - min(created_at) FROM sent WHERE state = 'due') AS "The oldest waits for",
  (SELECT count(*) FROM sent WHERE state = 'dead') AS "Deliveries given up\""""
_FIRING = f"""\
SELECT a.severity, a.rule, r.name, r.project, to_timestamp(a.fired_at) AS since, a.summary AS what, a.cause, a.remedy,
  r.id AS run, {runs.RANGE}
FROM alerts a JOIN runs r ON r.id = a.run WHERE a.state = 'firing' AND {_CHOSEN}
ORDER BY a.severity, a.fired_at DESC LIMIT 200"""
_TRANSITIONS = f"""\
SELECT to_timestamp(t.at) AS at, t.state, t.severity, a.rule, r.name, r.project, t.step, a.summary AS what,
  r.id AS run, {runs.RANGE}
FROM transitions t JOIN alerts a ON a.id = t.alert JOIN runs r ON r.id = a.run
WHERE $__unixEpochFilter(t.at) AND {_CHOSEN} ORDER BY t.at DESC LIMIT 200"""
_FAILED = f"""\
SELECT to_timestamp(t.at) AS at, d.receiver, d.state, t.number AS attempt, t.status, t.error, t.seconds AS took
FROM attempts t JOIN deliveries d ON d.id = t.delivery JOIN alerts a ON a.id = d.alert JOIN runs r ON r.id = a.run
WHERE $__unixEpochFilter(t.at) AND t.error <> '' AND {_CHOSEN} ORDER BY t.at DESC LIMIT 200"""
_ATTEMPTS = f"""\
WITH {runs.MOMENTS}, counted AS (
  SELECT width_bucket(t.at, $__unixEpochFrom(), $__unixEpochTo(), {runs.PARTS}) AS n,
    count(*) FILTER (WHERE t.error = '') AS delivered, count(*) FILTER (WHERE t.error <> '') AS failed
  FROM attempts t JOIN deliveries d ON d.id = t.delivery JOIN alerts a ON a.id = d.alert JOIN runs r ON r.id = a.run
  WHERE $__unixEpochFilter(t.at) AND {_CHOSEN} GROUP BY 1
)
SELECT to_timestamp(m.at) AS "time", coalesce(c.delivered, 0) AS delivered, coalesce(c.failed, 0) AS failed
FROM moments m LEFT JOIN counted c ON c.n = m.n ORDER BY m.at"""
_STACKED = {"stacking": {"mode": "normal", "group": "A"}, "lineWidth": 0, "showPoints": "never"}


def build() -> Json:
    """Return the board."""
    rows = [
        (4, [(24, _numbers())]),
        (12, [(24, _firing())]),
        (8, [(12, _by_rule()), (12, _attempts())]),
        (10, [(24, _transitions())]),
        (9, [(24, _failed())]),
    ]
    about = "What fires, who was notified, and which receivers do not answer."
    return board("gradwatch-alerts", about, rows, variables=[project_variable()])


def _numbers() -> Panel:
    return numbers(
        1,
        "",
        "Alerts that fire now, and deliveries that did not succeed yet, of the chosen projects.",
        sql(_COUNTS),
        unit="locale",
        overrides=[
            override(
                "/^(Critical alerts|Deliveries given up)$/", regex=True, thresholds=colours.thresholds(NONE_IS_BEST)
            ),
            override("Warnings", thresholds=colours.thresholds(FEW_ARE_BEST)),
            override(
                "The oldest waits for",
                unit="dtdurations",
                decimals=0,
                thresholds=colours.thresholds(((None, "text"), (300, "orange"))),
            ),
        ],
    )


_PROJECT = {"width": 150, **WRAPPED}


def _run_column() -> Json:
    wrapped = {"minWidth": 130, **WRAPPED}
    return override("name", links=[runs.OPEN], custom=wrapped)


def _firing() -> Panel:
    return table(
        2,
        "Alerts that fire now",
        "What is wrong, why, and what to do.",
        sql(_FIRING),
        state_column("severity", colours.SEVERITIES, 80),
        override("rule", custom={"width": 90}),
        _run_column(),
        override("project", custom=_PROJECT),
        when("since", 95),
        text_column("what"),
        text_column("cause"),
        text_column("remedy"),
        hidden(runs.HIDDEN),
        nothing="No alert fires",
    )


def _by_rule() -> Panel:
    custom = {"drawStyle": "line", "lineInterpolation": "stepAfter", "fillOpacity": 60, **_STACKED}
    return lines(
        3,
        "Alerts that fire, by rule",
        "Alerts that fired at each time, of runs that have ended as well.",
        sql(runs.firing_over_time("rule", colours.RULES)),
        nothing="No alert fired in this time",
        min=0,
        decimals=0,
        custom=custom,
        overrides=by_name(colours.RULES),
    )


def _attempts() -> Panel:
    custom = {"drawStyle": "bars", "fillOpacity": 80, **_STACKED}
    return lines(
        4,
        "Attempts to deliver",
        "Attempts in each two-hundredth of the chosen time, by how they ended.",
        sql(_ATTEMPTS),
        nothing="No attempt in this time",
        min=0,
        decimals=0,
        custom=custom,
        overrides=by_name({"delivered": colours.GOOD, "failed": colours.CRITICAL}),
    )


def _transitions() -> Panel:
    return table(
        5,
        "Alerts that began or ended, the newest first",
        "Transitions of alerts in the chosen time; each was sent to the receivers unless it was muted.",
        sql(_TRANSITIONS),
        when("at"),
        state_column("state", colours.STATES, 85),
        state_column("severity", colours.SEVERITIES, 80),
        override("rule", custom={"width": 90}),
        _run_column(),
        override("project", custom=_PROJECT),
        override("step", unit="locale", decimals=0, custom={"width": 85}),
        text_column("what"),
        hidden(runs.HIDDEN),
        nothing="No alert began or ended in this time",
    )


def _failed() -> Panel:
    return table(
        6,
        "Attempts that failed, the newest first",
        "What receivers answered.",
        sql(_FAILED),
        when("at"),
        text_column("receiver"),
        state_column("state", colours.STATES, 85),
        override("/^(attempt|status)$/", regex=True, unit="none", decimals=0, custom={"width": 75}),
        text_column("error"),
        override("took", unit="s", custom={"width": 90}),
        nothing="No attempt failed in this time",
    )
