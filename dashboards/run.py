"""The dashboard of one run: its layers over time and over steps."""

from grafana_foundation_sdk.builders.dashboard import AnnotationQuery, Dashboard

from dashboards.frame import fill, frame, project_variable, run_variable
from dashboards.panels import NONE_IS_GOOD, POSTGRES, RATIO, Panel, Sql, bars, lines, matrix, number, over_steps, prom
from gradwatch.statistics import RATIO_EPS

_LAYER = "lpad(p.depth::text, 3, '0') || ' · ' || p.name"
_RATIO = f"v.gradient / (v.weight + {RATIO_EPS})"
_UNNESTED = """\
CROSS JOIN LATERAL unnest(s.grad_norm, s.weight_norm) WITH ORDINALITY AS v(gradient, weight, place)
JOIN parameters p ON p.run = s.run AND p.position = v.place - 1"""
_RUN = "run = ${run:sqlstring}"
_SEEN = f"""\
seen AS (
  SELECT min(step) AS from_step, max(step) AS to_step FROM samples WHERE {_RUN} AND level = 0 AND $__unixEpochFilter(at)
)"""
_SPANS = 60
_POINTS = 500
_MAP = f"""\
WITH {_SEEN}, top AS (
  SELECT coalesce(max(level), 0) AS level FROM (
    SELECT level FROM samples, seen WHERE {_RUN} AND level > 0 AND step BETWEEN from_step AND to_step
    GROUP BY level HAVING count(*) >= {_SPANS}
  ) enough
), ends AS (
  SELECT s.level - 1 AS below, max(last_step) AS last FROM samples s, top
  WHERE {_RUN} AND s.level BETWEEN 1 AND top.level GROUP BY s.level
), pieces AS (
  SELECT s.level, s.step, ntile({_SPANS}) OVER (ORDER BY s.step) AS span
  FROM seen, top, generate_series(0, top.level) AS each(level) LEFT JOIN ends ON ends.below = each.level
  CROSS JOIN LATERAL (
    SELECT level, step, coalesce(last_step, step) AS last_step FROM samples
    WHERE {_RUN} AND level = each.level AND step > coalesce(ends.last, -1)
  ) s
  WHERE s.last_step >= from_step AND s.step <= to_step
), measured AS (
  SELECT p.span, v.place, {_RATIO} AS ratio FROM pieces p JOIN samples s ON s.{_RUN} AND s.level = 0 AND s.step = p.step
  CROSS JOIN LATERAL unnest(s.grad_norm, s.weight_norm) WITH ORDINALITY AS v(gradient, weight, place)
  WHERE p.level = 0 AND v.gradient <> -1
  UNION ALL
  SELECT p.span, v.place, CASE WHEN coalesce(r.nonfinite[v.place::int], r.nonfinite[1]) > 0 THEN 'NaN' ELSE v.high END
  FROM pieces p JOIN rollups r ON r.{_RUN} AND r.statistic = 'ratio' AND r.level = p.level AND r.step = p.step
  CROSS JOIN LATERAL unnest(r.high) WITH ORDINALITY AS v(high, place)
  WHERE p.level > 0 AND v.high <> -1
)
SELECT {_LAYER} AS layer, starts.step, max(m.ratio) AS ratio
FROM measured m JOIN (SELECT span, min(step) AS step FROM pieces GROUP BY span) starts ON starts.span = m.span
JOIN parameters p ON p.{_RUN} AND p.position = m.place - 1
GROUP BY p.depth, layer, starts.step ORDER BY p.depth, layer, starts.step"""
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


def _scalar(name: str) -> Sql:
    """Return the query of a scalar's range in spans of steps: from roll-ups if there are enough, then from samples."""
    mine = f"{_RUN} AND name = '{name}'"
    return Sql(f"""\
WITH {_SEEN}, top AS (
  SELECT coalesce(max(level), 0) AS level FROM (
    SELECT level FROM scalars, seen WHERE {mine} AND step BETWEEN from_step AND to_step
    GROUP BY level HAVING count(*) >= {_POINTS}
  ) enough
), spans AS (
  SELECT step, scalars.last_step, low, high FROM scalars, seen, top
  WHERE {mine} AND scalars.level = top.level AND scalars.last_step >= from_step AND step <= to_step
)
SELECT step, low AS smallest, high AS largest FROM spans
UNION ALL
SELECT step, (scalars ->> '{name}')::float8, (scalars ->> '{name}')::float8 FROM samples, seen
WHERE {_RUN} AND level = 0 AND step BETWEEN from_step AND to_step
  AND step > (SELECT coalesce(max(last_step), -1) FROM spans)
ORDER BY step""")


def _of_run(metric: str, by: str = "run") -> str:
    return f'max by ({by}) ({metric}{{run="$run"}})'


def _alert_annotations() -> AnnotationQuery:
    query = AnnotationQuery().name("Alerts").datasource(POSTGRES).enable(True).icon_color("red")
    return query.target(Sql(_ALERTS))


def build() -> Dashboard:
    """Return the dashboard."""
    board = frame("gradwatch-run", "One run: ratio by layer, depth profile, map, loss, clipping and alerts.")
    board = board.with_variable(project_variable()).with_variable(run_variable()).annotation(_alert_annotations())
    return fill(board, (*_numbers(), *_ratios(), *_scalars(), *_clipping_and_health()))


def _numbers() -> tuple[Panel, ...]:
    return (
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
    )  # fmt: skip


def _ratios() -> tuple[Panel, ...]:
    return (
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
    )  # fmt: skip


def _scalars() -> tuple[Panel, ...]:
    return (
        over_steps("Loss by step", "Smallest and largest loss of each span of steps.", "none", _scalar("loss")),
        over_steps("Global gradient norm by step", "Norm of the whole gradient before clipping: the smallest and the "
                   "largest of each span of steps.", "none", _scalar("global_grad_norm"), logarithmic=True),
    )  # fmt: skip


def _clipping_and_health() -> tuple[Panel, ...]:
    return (
        lines("Global gradient norm", "Norm of the whole gradient before and after clipping, and the limit that the "
              "training sets to it.", "none",
              prom(_of_run("gradwatch_run_global_grad_norm"), "before clipping", "A"),
              prom(_of_run("gradwatch_run_clipped_global_grad_norm"), "after", "B"),
              prom(_of_run("gradwatch_run_global_grad_norm_limit"), "limit", "C"), logarithmic=True),
        lines("Clipping", "Share of the parameters whose gradient was clipped at the latest sample.", "percentunit",
              prom(_of_run("gradwatch_run_clipped_parameters_ratio"), "clipped")),
        lines("Unhealthy parameters", "Parameters that open alerts blame, by rule.", "short",
              prom(_of_run("gradwatch_run_unhealthy_parameters", "rule"), "{{rule}}"), steps=NONE_IS_GOOD),
    )  # fmt: skip
