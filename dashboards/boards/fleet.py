"""The board of all runs, worst first."""

from dashboards import colours
from dashboards.colours import FEW_ARE_BEST, NONE_IS_BEST, NUMBERS
from dashboards.frame import board, project_variable
from dashboards.panels import (
    WRAPPED,
    Json,
    Panel,
    by_name,
    fixed,
    hidden,
    legend_at,
    lines,
    numbers,
    override,
    panel,
    promql,
    sql,
    state_column,
    table,
    text_column,
    when,
)
from dashboards.queries import runs

_CHOSEN = f"r.project = {runs.CHOSEN_PROJECTS}"
_STATES = f"""\
SELECT {runs.STATE} AS state,
    EXISTS (SELECT FROM alerts a WHERE a.run = r.id AND a.state = 'firing' AND a.severity = 'critical') AS critical
  FROM runs r WHERE r.finished_at IS NULL AND {_CHOSEN}"""
_COUNTS = f"""\
SELECT count(*) FILTER (WHERE state = 'running') AS "Running",
  count(*) FILTER (WHERE critical) AS "With critical alerts",
  count(*) FILTER (WHERE state = 'stalled') AS "Stalled",
  (SELECT count(*) FROM runs r WHERE r.status IN ('failed', 'killed')
    AND r.finished_at > extract(epoch FROM now()) - 86400
    AND {_CHOSEN}) AS "Failed in 24 h"
FROM ({_STATES}) runs"""
_RUNS = f"""\
SELECT r.name, {runs.STATE} AS state, worst.severity AS alerts, r.project, worst.what AS "what is wrong",
  r.last_step AS step, (r.scalars ->> 'loss')::float8 AS loss, to_timestamp({runs.LAST_AT}) AS "last sample",
  r.id AS run, {runs.RANGE}
FROM runs r LEFT JOIN LATERAL (
  SELECT min(a.severity) AS severity,
    string_agg(a.rule || ': ' || a.summary, E'\\n' ORDER BY a.severity, a.rule) AS what
  FROM alerts a WHERE a.run = r.id AND {runs.MATTERS}
) worst ON true
WHERE {_CHOSEN} AND (r.last_seen_at >= $__unixEpochFrom() OR r.finished_at IS NULL
  OR EXISTS (SELECT FROM alerts a WHERE a.run = r.id AND a.state = 'firing'))
ORDER BY worst.severity NULLS LAST, r.finished_at IS NOT NULL, r.last_seen_at DESC LIMIT 500"""
_BY_RULE = f"""\
SELECT a.rule, count(DISTINCT a.run) AS runs
FROM alerts a JOIN runs r ON r.id = a.run WHERE a.state = 'firing' AND {_CHOSEN}
GROUP BY a.rule ORDER BY runs DESC, a.rule"""
_FRESH = "time() - max by (run) (gradwatch_run_last_seen_timestamp_seconds) < 300"
_SPEED = 'sum(max by (run) (rate(gradwatch_run_samples_total{project=~"$project"}[$__rate_interval])))'
_CRITICAL = 'max by (run) (gradwatch_run_firing_alerts{severity="critical",project=~"$project"}) > 0'


def _of_unhealthy(metric: str) -> str:
    """Return an expression of a metric of the runs with critical alerts, which ends where a run is not heard of."""
    value = f'max by (run, project, name) ({metric}{{project=~"$project"}})'
    return f"{value} and on (run) ({_CRITICAL}) and on (run) ({_FRESH})"


def build() -> Json:
    """Return the board."""
    rows = [
        (4, [(18, _numbers()), (6, _speed())]),
        (14, [(24, _runs())]),
        (8, [(12, _firing()), (12, _by_rule())]),
        (12, [(12, _loss()), (12, _ratio())]),
    ]
    about = "All runs, worst first, and what is wrong with them."
    return board("gradwatch-fleet", about, rows, variables=[project_variable()])


def _numbers() -> Panel:
    return numbers(
        1,
        "",
        "Runs that are not finished, and what became of the others within a day.",
        sql(_COUNTS),
        unit="locale",
        overrides=[
            override("With critical alerts", thresholds=colours.thresholds(NONE_IS_BEST)),
            override("Stalled", thresholds=colours.thresholds(FEW_ARE_BEST)),
            override("Failed in 24 h", thresholds=colours.thresholds(FEW_ARE_BEST)),
        ],
    )


def _speed() -> Panel:
    query = promql(_SPEED, "Samples stored a second", instant=True)
    return numbers(2, "", "Samples of active runs of the chosen projects.", query, decimals=1, overrides=[])


_LOSS = {"width": 105, "cellOptions": {"type": "color-text"}}


def _runs() -> Panel:
    return table(
        3,
        "Runs, worst first",
        "Runs heard of in the chosen time, and all that are not finished or have an alert that fires: first those with "
        "critical alerts, which a run that has ended keeps.",
        sql(_RUNS),
        state_column("state", colours.STATES),
        state_column("alerts", colours.SEVERITIES, 80),
        override("name", links=[runs.OPEN], custom={"minWidth": 130, **WRAPPED}),
        override("project", custom={"width": 150, **WRAPPED}),
        text_column("what is wrong"),
        override("step", unit="locale", decimals=0, custom={"width": 85}),
        override("loss", mappings=list(NUMBERS), custom=_LOSS, color=fixed("text")),
        when("last sample", 110),
        hidden(runs.HIDDEN),
        nothing="No run was heard of in this time",
    )


def _firing() -> Panel:
    return lines(
        4,
        "Alerts that fire",
        "Alerts that fired at each time, by severity, of runs that have ended as well.",
        sql(runs.firing_over_time("severity", colours.SEVERITIES)),
        nothing="No alert fired in this time",
        min=0,
        decimals=0,
        custom={"lineInterpolation": "stepAfter", "fillOpacity": 20, "showPoints": "never"},
        overrides=by_name(colours.SEVERITIES),
    )


_BARS = {
    "orientation": "horizontal",
    "xField": "rule",
    "showValue": "always",
    "text": {"valueSize": 14},
    "stacking": "none",
    "barWidth": 0.7,
    "groupWidth": 0.7,
    "fullHighlight": False,
    "xTickLabelRotation": 0,
    "xTickLabelSpacing": 0,
    "xTickLabelMaxLength": 24,
    "legend": legend_at("bottom") | {"showLegend": False},
    "tooltip": {"mode": "single", "sort": "none"},
}


def _by_rule() -> Panel:
    return panel(
        5,
        "barchart",
        "Runs by rule",
        "How many runs each rule fires for now.",
        [sql(_BY_RULE)],
        options=_BARS,
        custom={"fillOpacity": 80, "lineWidth": 0},
        color=fixed(colours.LINE),
        noValue="No alert fires",
        min=0,
        decimals=0,
    )


def _loss() -> Panel:
    return lines(
        6,
        "Loss, runs with critical alerts",
        "Loss of the latest step; a run that is not heard of for five minutes ends.",
        promql(_of_unhealthy("gradwatch_run_loss"), "{{name}}"),
        scale="symlog",
        unit="sci",
        decimals=1,
        nothing="Nothing to draw: no run has critical alerts, or Prometheus does not answer",
    )


def _ratio() -> Panel:
    return lines(
        7,
        "Median ratio, runs with critical alerts",
        "Median of gradient norm to weight norm; a run that is not heard of for five minutes ends.",
        promql(_of_unhealthy("gradwatch_run_grad_weight_median_ratio"), "{{name}}"),
        scale="symlog",
        unit="sci",
        decimals=1,
        nothing="Nothing to draw: no run has critical alerts, or Prometheus does not answer",
    )
