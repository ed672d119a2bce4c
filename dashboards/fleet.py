"""The dashboard of all runs, worst first."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.frame import fill, frame, link_to_run, project_variable
from dashboards.panels import NONE_IS_GOOD, Panel, Sql, lines, listing, number, prom
from gradwatch_server.diagnosis.rules import stalled

_RUNS = f"""\
SELECT r.project, r.name, r.id AS run,
  CASE WHEN r.finished_at IS NOT NULL THEN coalesce(r.status, 'finished')
       WHEN bool_or(a.rule = '{stalled.RULE.name}') THEN 'stalled' ELSE 'running' END AS state,
  count(a.id) FILTER (WHERE a.severity = 'critical') AS critical,
  count(a.id) FILTER (WHERE a.severity = 'warning') AS warnings,
  string_agg(a.rule, ', ' ORDER BY a.severity, a.rule) AS rules,
  r.last_step AS step, (r.scalars ->> 'loss')::float8 AS loss,
  to_timestamp(r.last_seen_at) AS last_seen
FROM runs r LEFT JOIN alerts a ON a.run = r.id AND a.state = 'firing'
WHERE r.project IN (${{project:sqlstring}}) AND r.last_seen_at >= $__unixEpochFrom()
GROUP BY r.id ORDER BY critical DESC, warnings DESC, r.last_seen_at DESC LIMIT 500"""


def _by_run(metric: str) -> str:
    return f'max by (run, project, name) ({metric}{{project=~"$project"}})'


def build() -> Dashboard:
    """Return the dashboard."""
    board = frame("gradwatch-fleet", "All runs, worst first, and their alerts.").with_variable(project_variable())
    return fill(board, (*_numbers(), *_charts()))


def _numbers() -> tuple[Panel, ...]:
    critical = 'max by (run) (gradwatch_run_firing_alerts{project=~"$project",severity="critical"})'
    return (
        number("Active runs", "Runs that are not finished.", "short",
               prom(f"count({_by_run('gradwatch_run_step')}) or vector(0)", instant=True)),
        number("Stalled runs", "Runs that were not heard of for much longer than usual.", "short",
               prom(f"sum({_by_run('gradwatch_run_stalled')}) or vector(0)", instant=True), NONE_IS_GOOD),
        number("Unhealthy runs", "Runs with a critical alert that fires.", "short",
               prom(f"count({critical} > 0) or vector(0)", instant=True), NONE_IS_GOOD),
        number("Samples a second", "Samples that the servers store.", "cps",
               prom("sum(rate(gradwatch_ingest_samples_total[$__rate_interval]))", instant=True)),
    )  # fmt: skip


def _charts() -> tuple[Panel, ...]:
    legend = "{{project}} / {{name}}"
    return (
        listing("Runs, worst first", "Runs by their alerts that fire, then by when they were last heard of.", "short",
                Sql(_RUNS), NONE_IS_GOOD).data_links([link_to_run()]),
        lines("Median ratio", "Median of gradient norm to weight norm over the parameters of each run.", "none",
              prom(_by_run("gradwatch_run_grad_weight_median_ratio"), legend), logarithmic=True),
        lines("Attenuation", "Decades that the gradient loses at each layer on its way to the input; 0 is even.",
              "none", prom(_by_run("gradwatch_run_attenuation_decades_per_layer"), legend)),
        lines("Loss", "Loss of the latest step.", "none", prom(_by_run("gradwatch_run_loss"), legend)),
        lines("Alerts that fire", "By severity, over the chosen projects.", "short",
              prom('sum by (severity) (max by (run, severity) (gradwatch_run_firing_alerts{project=~"$project"}))',
                   "{{severity}}"), steps=NONE_IS_GOOD),
    )  # fmt: skip
