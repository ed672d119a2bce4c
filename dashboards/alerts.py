"""The dashboard of alerts and of their deliveries to receivers."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.frame import fill, frame, link_to_run, project_variable
from dashboards.panels import NONE_IS_GOOD, Panel, Sql, lines, listing, number, prom

_FIRING = """\
SELECT a.severity, a.rule, r.project, r.name, r.id AS run, a.fired_step AS step, to_timestamp(a.fired_at) AS fired,
  a.summary, a.cause, a.remedy
FROM alerts a JOIN runs r ON r.id = a.run
WHERE a.state = 'firing' AND r.project IN (${project:sqlstring}) ORDER BY a.severity, a.fired_at DESC LIMIT 500"""
_TRANSITIONS = """\
SELECT to_timestamp(t.at) AS at, t.state, t.severity, a.rule, r.project, r.name, r.id AS run, t.step, a.summary
FROM transitions t JOIN alerts a ON a.id = t.alert JOIN runs r ON r.id = a.run
WHERE $__unixEpochFilter(t.at) AND r.project IN (${project:sqlstring}) ORDER BY t.at DESC LIMIT 500"""
_FAILED_ATTEMPTS = """\
SELECT to_timestamp(t.at) AS at, d.receiver, d.state, t.number AS attempt, t.status, t.error, t.seconds
FROM attempts t JOIN deliveries d ON d.id = t.delivery
WHERE $__unixEpochFilter(t.at) AND t.error <> '' ORDER BY t.at DESC LIMIT 500"""


def _deliveries(state: str) -> str:
    return f'sum(max by (receiver) (gradwatch_deliveries{{state="{state}"}})) or vector(0)'


def build() -> Dashboard:
    """Return the dashboard."""
    board = frame("gradwatch-alerts", "What fires, what was told, and which receivers do not answer.")
    return fill(board.with_variable(project_variable()), (*_numbers(), *_tables()))


def _numbers() -> tuple[Panel, ...]:
    return (
        number("Alerts that fire", "Over all projects.", "short",
               prom('sum(max by (rule, severity) (gradwatch_alerts{state="firing"})) or vector(0)', instant=True),
               NONE_IS_GOOD),
        number("Deliveries that wait", "They are due or wait for their next attempt.", "short",
               prom(_deliveries("due"), instant=True)),
        number("Deliveries given up", "Their receiver refused them, or three days of attempts failed.", "short",
               prom(_deliveries("dead"), instant=True), NONE_IS_GOOD),
        number("Oldest that waits", "Age of the oldest delivery that is not made yet.", "s",
               prom("max(gradwatch_delivery_lag_seconds)", instant=True), ((None, "green"), (300, "red"))),
    )  # fmt: skip


def _tables() -> tuple[Panel, ...]:
    return (
        listing("Firing now", "Worst first, with cause and remedy.", "none", Sql(_FIRING)).data_links([link_to_run()]),
        lines("Alerts by rule", "Alerts that fire, by rule and severity.", "short",
              prom('max by (rule, severity) (gradwatch_alerts{state="firing"})', "{{rule}} {{severity}}"),
              steps=NONE_IS_GOOD),
        lines("Attempts to deliver", "By receiver and the state that they led to.", "cps",
              prom("sum by (receiver, result) (rate(gradwatch_delivery_attempts_total[$__rate_interval]))",
                   "{{receiver}} {{result}}")),
        listing("Told", "Transitions of alerts in the chosen time, the newest first.", "none",
                Sql(_TRANSITIONS)).data_links([link_to_run()]),
        listing("Failed attempts", "What receivers answered, the newest first.", "none", Sql(_FAILED_ATTEMPTS)),
    )  # fmt: skip
