"""The board of one run: how it is, what is wrong, and its layers over time."""

from dashboards import colours
from dashboards.colours import NUMBERS, UNKNOWN, special
from dashboards.frame import Row, board, link, project_variable, query_variable, run_variable
from dashboards.panels import (
    AXIS_WIDTH,
    POSTGRES,
    Json,
    Panel,
    fixed,
    legend_at,
    lines,
    matrix,
    numbers,
    over_steps,
    override,
    panel,
    promql,
    renamed,
    row,
    sql,
    state_column,
    table,
    text_column,
    when,
)
from dashboards.queries import layers, runs, scalars
from dashboards.queries.steps import NO_SAMPLE, UNSAMPLED

_RUN = "r.id = ANY (ARRAY[${run:sqlstring}]::text[])"
_SUMMARY = f"""\
SELECT {runs.STATE} AS "State", r.last_step AS "Step",
  (r.scalars ->> 'loss')::float8 AS "Loss", (r.scalars ->> 'learning_rate')::float8 AS "Learning rate",
  to_timestamp({runs.LAST_AT}) AS "Last sample", to_timestamp(r.started_at) AS "Started",
  coalesce(r.finished_at, r.last_seen_at) - r.started_at AS "Duration",
  (SELECT sum((SELECT round(exp(sum(ln(size::float8))))
      FROM jsonb_array_elements_text(p.shape) AS sizes(size) WHERE size::bigint > 0))
    FROM parameters p WHERE p.run = r.id) AS "Weights",
  r.parameter_count AS "Parameters"
FROM runs r WHERE {_RUN}"""
_WRONG = f"""\
SELECT a.severity, a.rule, a.fired_step AS "since step", to_timestamp(a.fired_at) AS since,
  a.summary || CASE WHEN a.state = 'resolved' THEN ' (until the run ended)' ELSE '' END AS what, a.cause, a.remedy
FROM alerts a JOIN runs r ON r.id = a.run WHERE {_RUN} AND {runs.MATTERS} ORDER BY a.severity, a.fired_at LIMIT 50"""
_HISTORY = f"""\
SELECT a.state, a.severity, a.rule, a.fired_step AS "from step", a.resolved_step AS "to step",
  to_timestamp(a.fired_at) AS fired, to_timestamp(a.resolved_at) AS resolved, a.summary, a.resolution
FROM alerts a JOIN runs r ON r.id = a.run WHERE {_RUN} AND a.fired_at IS NOT NULL ORDER BY a.fired_at DESC LIMIT 200"""
_REGIONS = f"""\
SELECT a.fired_at AS time, coalesce(a.resolved_at, extract(epoch FROM now())) AS timeend,
  a.rule || ': ' || a.summary AS text, a.rule || ',' || a.severity AS tags
FROM alerts a JOIN runs r ON r.id = a.run
WHERE {_RUN} AND a.severity = '{{severity}}' AND a.fired_at <= $__unixEpochTo()
  AND coalesce(a.resolved_at, extract(epoch FROM now())) >= $__unixEpochFrom() ORDER BY a.fired_at LIMIT 500"""
"""Alerts that fired at any time in the range, also those that began before it."""


def build() -> Json:
    """Return the board."""
    charts = [_loss(), _norm(), _map(), _profile()]
    rows: list[Row | Panel] = [
        (4, [(24, _numbers())]),
        (6, [(24, _wrong())]),
        *((height, [(24, chart)]) for height, chart in zip((7, 7, 20, 9), charts, strict=True)),
        row(20, "By step", *_by_step()),
        row(30, "Clipping and the agent, while the run is active", *_agent()),
        row(40, "All alerts of this run", _history()),
    ]
    page = link("gradwatch's page of this run", "${page}/runs/${run}", keeps_time=False, icon="external link")
    return board(
        "gradwatch-run",
        "One run: its state, what is wrong with it, loss, gradients and layers.",
        rows,
        variables=[
            project_variable(),
            run_variable(),
            query_variable("layers", "Layers", layers.PAGES),
            query_variable("unsampled", "", UNSAMPLED, hide=2, skipUrlSync=True),
        ],
        links=[page],
        annotations=[_regions(severity) for severity in ("critical", "warning")],
    )


def _regions(severity: str) -> Json:
    return {
        "name": f"{severity.capitalize()} alerts",
        "datasource": POSTGRES,
        "enable": True,
        "iconColor": colours.SEVERITIES[severity],
        "target": sql(_REGIONS.replace("{severity}", severity)),
    }


def _numbers() -> Panel:
    states = [colours.named(colours.STATES), *NUMBERS]
    return numbers(
        1,
        "",
        "The run as the database knows it, after its end as well; a dash stands for what is not known.",
        sql(_SUMMARY),
        overrides=[
            override("State", mappings=states),
            override("/^(Step|Parameters)$/", regex=True, unit="locale", decimals=0),
            override("Weights", unit="short", decimals=1),
            override("/^(Loss|Learning rate)$/", regex=True, unit="none"),
            override("/^(Last sample|Started)$/", regex=True, unit="dateTimeFromNow"),
            override("Duration", unit="dtdurations", decimals=0),
        ],
    )


def _wrong() -> Panel:
    return table(
        2,
        "What is wrong",
        "Alerts that fire, or that fired until the run ended: what, why, and what to do.",
        sql(_WRONG),
        state_column("severity", colours.SEVERITIES),
        override("rule", custom={"width": 100}),
        override("since step", unit="locale", decimals=0, custom={"width": 95}),
        when("since"),
        text_column("what"),
        text_column("cause"),
        text_column("remedy"),
        nothing="No alert fires",
    )


def _not_finite() -> Json:
    """Return the look of the series that marks where a value was NaN or infinite."""
    drawn = {"drawStyle": "points", "pointSize": 7, "showPoints": "always"}
    return override(
        "not finite", color=fixed(colours.NOT_FINITE_WORD), mappings=list(colours.ANY_IS_NOT_FINITE), custom=drawn
    )


def _band(name: str, colour: str) -> list[Json]:
    """Return the look of a series with the largest values that is filled down to the smallest."""
    below = f"{name}, smallest"
    return [
        override(name, color=fixed(colour), custom={"fillBelowTo": below, "fillOpacity": 35}),
        override(below, color=fixed(colour), custom={"hideFrom": {"legend": True, "tooltip": False, "viz": False}}),
    ]


def _loss() -> Panel:
    return lines(
        3,
        "Loss",
        "Every step counts: the line is the largest loss of each span of steps, and it is filled down to the smallest.",
        sql(scalars.by_time("loss", "loss")),
        scale="symlog",
        unit="sci",
        decimals=2,
        nothing=NO_SAMPLE,
        custom={"axisWidth": AXIS_WIDTH},
        overrides=[*_band("loss", colours.LINE), _not_finite()],
    )


def _norm() -> Panel:
    return lines(
        4,
        "Gradient norm",
        "Norm of the whole gradient before clipping, largest and smallest of each span of steps; after clipping, only "
        "where that made it smaller; and the limit that the training sets.",
        sql(scalars.by_time("global_grad_norm", "before clipping")),
        sql(scalars.lowered_by_time("clipped_global_grad_norm", "global_grad_norm", "after clipping"), "B"),
        sql(scalars.largest_by_time("global_grad_norm_limit", "limit"), "C"),
        scale="symlog",
        unit="sci",
        decimals=1,
        nothing=NO_SAMPLE,
        custom={"axisWidth": AXIS_WIDTH},
        overrides=[
            *_band("before clipping", colours.LINE),
            override("after clipping", color=fixed("semi-dark-green")),
            override(
                "limit",
                color=fixed("orange"),
                custom={"lineStyle": {"fill": "dash", "dash": [8, 8]}, "showPoints": "never"},
            ),
            _not_finite(),
        ],
    )


_MAP_MAPPINGS = (
    special("nan", "NaN", colours.NOT_FINITE),
    {"type": "value", "options": {"0": {"text": "exactly 0", "color": colours.ZERO, "index": 94}}},
)
_OFF_THE_MAP = " " * 64
"""Follows a name that has no room beside the map: names end at the map, so this pushes it off."""


def _map() -> Panel:
    made = panel(
        5,
        "state-timeline",
        "Layers over time: gradient norm to weight norm",
        "The input's layer is at the top; where nothing is drawn, nothing was sampled. Choose at the top of the board "
        "whether a row is a parameter or a block. A block shows the largest ratio of its weight matrices, and NaN if "
        "any of its parameters is not finite. Where names have no room beside the map, the tooltip has them.",
        [sql(layers.MAP)],
        unit="sci",
        steps=colours.RATIO,
        decimals=1,
        options={
            "rowHeight": 1,
            "showValue": "never",
            "mergeValues": False,
            "alignValue": "left",
            "legend": legend_at("bottom"),
            "tooltip": {"mode": "single", "sort": "none"},
        },
        custom={
            "lineWidth": 0,
            "fillOpacity": 100,
            "axisWidth": AXIS_WIDTH,
            "hideFrom": {"legend": True, "tooltip": False, "viz": False},
        },
        color={"mode": "thresholds"},
        noValue=NO_SAMPLE,
        mappings=list(_MAP_MAPPINGS),
        overrides=[_map_legend()],
    )
    unnamed = renamed(f"(.*){layers.UNNAMED}", f"$1{_OFF_THE_MAP}")
    return made | {"transformations": [*matrix("time", "layer", "ratio"), unnamed]}


def _map_legend() -> Json:
    """Return the settings of the row that is not drawn: Grafana's legend names the values of a row that are mapped."""
    items = {
        str(number): {"text": word, "color": colour, "index": number}
        for number, (word, colour) in enumerate(colours.RATIO_LEGEND.items(), 1)
    }
    return override(
        layers.LEGEND,
        color=fixed(colours.PLAIN),
        mappings=[{"type": "value", "options": items}, special("null", "")],
        custom={"hideFrom": {"legend": False, "tooltip": True, "viz": True}},
    )


_POINTS = {
    "weight matrices": colours.LINE,
    "biases and norms": "gray",
    "exactly 0": "purple",
    "NaN or infinite": colours.NOT_FINITE_WORD,
}


def _profile() -> Panel:
    series = [
        {
            "name": {"fixed": name},
            "frame": {"matcher": {"id": "byIndex", "options": 0}},
            "x": {"matcher": {"id": "byName", "options": "depth"}},
            "y": {"matcher": {"id": "byName", "options": name}},
        }
        for name in _POINTS
    ]
    points = {
        "show": "points",
        "pointSize": {"fixed": 8},
        "fillOpacity": 80,
        "scaleDistribution": {"type": "log", "log": 10},
    }
    # The tooltip lists every column of the row, three of them empty: it has the column with the ratio as a text.
    unlisted = {"hideFrom": {"legend": False, "tooltip": True, "viz": False}}
    overrides = [override(name, color=fixed(colour), custom=unlisted) for name, colour in _POINTS.items()]
    overrides += [
        override(
            "depth", unit="locale", custom={"scaleDistribution": {"type": "linear"}, "axisLabel": "layer, input first"}
        ),
        override("exactly 0", mappings=_always("exactly 0", "purple")),
        override("NaN or infinite", mappings=list(colours.ANY_IS_NOT_FINITE)),
    ]
    return panel(
        6,
        "xychart",
        "Depth profile: gradient norm to weight norm${unsampled}",
        "Ratio of every parameter at the latest sample in the chosen time, the input's at the left: a slope of the "
        "weight matrices is a fading gradient. What is exactly 0 lies at the lower edge, NaN at the upper.",
        [sql(layers.PROFILE)],
        unit="sci",
        decimals=1,
        options={
            "mapping": "manual",
            "series": series,
            "legend": legend_at("bottom"),
            "tooltip": {"mode": "single", "sort": "none"},
        },
        noValue=NO_SAMPLE,
        custom=points | {"axisWidth": AXIS_WIDTH},
        overrides=overrides,
    )


def _always(text: str, colour: str) -> list[colours.Mapping]:
    shown = {"from": None, "to": None, "result": {"text": text, "color": colour, "index": 95}}
    return [special("null", UNKNOWN), {"type": "range", "options": shown}]


def _by_step() -> tuple[Panel, Panel]:
    looks = [
        override("largest", color=fixed(colours.LINE), custom={"fillBelowTo": "smallest", "fillOpacity": 35}),
        override("smallest", color=fixed(colours.LINE)),
        _not_finite(),
    ]
    return (
        over_steps(21, "Loss by step", "Smallest and largest loss of each span of steps: no step is left out.",
                   sql(scalars.by_step("loss")), "symlog", unit="sci", decimals=2, overrides=looks,
                   noValue=NO_SAMPLE),
        over_steps(22, "Global gradient norm by step", "Norm of the whole gradient before clipping: the smallest and "
                   "the largest of each span of steps.", sql(scalars.by_step("global_grad_norm")), "symlog",
                   unit="sci", decimals=1, overrides=looks, noValue=NO_SAMPLE),
    )  # fmt: skip


def _of_run(metric: str) -> str:
    """Return an expression of a metric of the run, which ends where the run is not heard of any more."""
    fresh = 'time() - gradwatch_run_last_seen_timestamp_seconds{run="$run"} < 300'
    return f'max by (run) ({metric}{{run="$run"}} and on (run) ({fresh}))'


_NOT_ACTIVE = "No number from Prometheus, which has those of active runs alone"


def _agent() -> tuple[Panel, ...]:
    return (
        lines(31, "Clipped parameters", "Share of the parameters whose gradient was clipped at the latest sample.",
              promql(_of_run("gradwatch_run_clipped_parameters_ratio"), "clipped"), unit="percentunit", min=0, max=1,
              nothing=_NOT_ACTIVE),
        lines(32, "Agent's share of a step", "Share of the step's time that the agent takes.",
              promql(_of_run("gradwatch_run_agent_overhead_ratio"), "agent"), unit="percentunit", min=0,
              nothing=_NOT_ACTIVE),
        lines(33, "Time of a step", "Time that a step takes.",
              promql(_of_run("gradwatch_run_step_duration_seconds"), "step"), unit="s", min=0, nothing=_NOT_ACTIVE),
    )  # fmt: skip


def _history() -> Panel:
    return table(
        41,
        "Alerts, the newest first",
        "Every alert of the run that fired, whenever that was.",
        sql(_HISTORY),
        state_column("state", colours.STATES),
        state_column("severity", colours.SEVERITIES),
        override("rule", custom={"width": 100}),
        override("/^(from|to) step$/", regex=True, unit="locale", decimals=0, custom={"width": 90}),
        override("/^(fired|resolved)$/", regex=True, unit="dateTimeAsIso", custom={"width": 150}),
        text_column("summary"),
        text_column("resolution"),
        nothing="No alert has fired",
    )
