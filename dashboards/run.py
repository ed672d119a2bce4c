"""One run: its layers over time and over steps."""

from grafana_foundation_sdk.builders.dashboard import AnnotationQuery, Dashboard

from dashboards.frame import frame, project_variable, run_variable
from dashboards.panels import NONE_IS_GOOD, POSTGRES, RATIO, Sql, bars, lines, matrix, number, over_steps, prom

_LAYER = "lpad(p.depth::text, 3, '0') || ' · ' || p.name"
_RATIO = "v.gradient / (v.weight + 0.001)"
_UNNESTED = """\
CROSS JOIN LATERAL unnest(s.grad_norm, s.weight_norm) WITH ORDINALITY AS v(gradient, weight, place)
JOIN parameters p ON p.run = s.run AND p.position = v.place - 1"""
_MAP = f"""\
WITH chosen AS (
  SELECT run, step, grad_norm, weight_norm, ntile(60) OVER (ORDER BY step) AS bucket FROM samples
  WHERE run = ${{run:sqlstring}} AND level = 0 AND $__unixEpochFilter(at)
), bucketed AS (
  SELECT min(s.step) OVER (PARTITION BY s.bucket) AS step, p.depth, {_LAYER} AS layer, {_RATIO} AS ratio
  FROM chosen s {_UNNESTED}
  WHERE v.gradient <> -1
)
SELECT layer, step, max(ratio) AS ratio FROM bucketed GROUP BY depth, layer, step ORDER BY depth, layer, step"""
_PROFILE = f"""\
SELECT {_LAYER} AS layer, {_RATIO} AS ratio
FROM (SELECT run, grad_norm, weight_norm FROM samples
      WHERE run = ${{run:sqlstring}} AND level = 0 AND $__unixEpochFilter(at) ORDER BY step DESC LIMIT 1) s
{_UNNESTED}
WHERE v.gradient <> -1 ORDER BY p.depth, p.name"""
_ALERTS = """\
SELECT fired_at AS time, coalesce(resolved_at, extract(epoch FROM now())) AS timeend, summary AS text,
  rule || ',' || severity AS tags
FROM alerts WHERE run = ${run:sqlstring} AND fired_at IS NOT NULL AND $__unixEpochFilter(fired_at) ORDER BY fired_at"""


def _scalars(*names: str) -> Sql:
    columns = ", ".join(f"(scalars ->> '{name}')::float8 AS {name}" for name in names)
    return Sql(
        f"SELECT step, {columns} FROM samples "
        "WHERE run = ${run:sqlstring} AND level = 0 AND $__unixEpochFilter(at) ORDER BY step"
    )


def _of_run(metric: str, by: str = "run") -> str:
    return f'max by ({by}) ({metric}{{run="$run"}})'


def _alert_annotations() -> AnnotationQuery:
    query = AnnotationQuery().name("Alerts").datasource(POSTGRES).enable(True).icon_color("red")
    return query.target(Sql(_ALERTS))


def build() -> Dashboard:
    """Return the dashboard."""
    board = frame("gradwatch-run", "One run: ratio by layer, depth profile, map, loss, clipping and alerts.")
    board = board.with_variable(project_variable()).with_variable(run_variable()).annotation(_alert_annotations())
    panels = (
        number("Step", "Latest step.", "none", prom(_of_run("gradwatch_run_step"), instant=True)),
        number("Loss", "Loss of the latest step.", "none", prom(_of_run("gradwatch_run_loss"), instant=True)),
        number("Alerts that fire", "Alerts of the run that fire.", "short",
               prom(f"sum({_of_run('gradwatch_run_firing_alerts', 'severity')})", instant=True), NONE_IS_GOOD),
        number("Non-finite parameters", "Parameters whose gradient holds a NaN or an infinity.", "short",
               prom(_of_run("gradwatch_run_nonfinite_parameters"), instant=True), NONE_IS_GOOD),
        number("Agent overhead", "Share of the step's time that the agent takes.", "percentunit",
               prom(_of_run("gradwatch_run_agent_overhead_ratio"), instant=True), ((None, "green"), (0.05, "red"))),
        number("Parameters left out", "Parameters without series of their own in Prometheus.", "short",
               prom(_of_run("gradwatch_run_parameters_left_out"), instant=True)),
        lines("Ratio by layer", "Gradient norm to weight norm of the most conspicuous parameters, by depth.", "none",
              prom(_of_run("gradwatch_parameter_grad_weight_ratio", "depth, parameter"), "{{depth}} · {{parameter}}"),
              logarithmic=True, steps=RATIO),
        lines("Ratio over all layers", "Smallest, median and largest ratio over all parameters.", "none",
              prom(_of_run("gradwatch_run_grad_weight_min_ratio"), "smallest", "A"),
              prom(_of_run("gradwatch_run_grad_weight_median_ratio"), "median", "B"),
              prom(_of_run("gradwatch_run_grad_weight_max_ratio"), "largest", "C"), logarithmic=True, steps=RATIO),
        matrix("Layer by step", "Largest ratio of each layer in up to 60 spans of the steps in the chosen time: no "
               "spike is averaged away. The input's layer is at the top.", "sci",
               Sql(_MAP), ("layer", "step", "ratio"), RATIO),
        bars("Depth profile", "Ratio of each layer at the latest sample, input first: a slope is a fading gradient.",
             "sci", Sql(_PROFILE), RATIO),
        over_steps("Loss by step", "Loss at each sample.", "none", _scalars("loss")),
        over_steps("Global gradient norm by step", "Norm of the whole gradient before clipping.", "none",
                   _scalars("global_grad_norm"), logarithmic=True),
        lines("Clipping", "Share of the parameters whose gradient was clipped at the latest sample.", "percentunit",
              prom(_of_run("gradwatch_run_clipped_parameters_ratio"), "clipped")),
        lines("Unhealthy parameters", "Parameters that open alerts blame, by rule.", "short",
              prom(_of_run("gradwatch_run_unhealthy_parameters", "rule"), "{{rule}}"), steps=NONE_IS_GOOD),
    )  # fmt: skip
    for panel in panels:
        board = board.with_panel(panel)
    return board
