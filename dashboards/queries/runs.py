"""States, alerts and times of runs, as the tables and the numbers of all boards show them."""

from collections.abc import Iterable

from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.store.runs import RUN_ENDED

CHOSEN_PROJECTS = "ANY (ARRAY[${project:sqlstring}]::text[])"
"""Is right for no project, one and many: an IN of nothing is an error."""
STALLED = stalled.RULE.name
STATE = f"""\
CASE WHEN r.finished_at IS NOT NULL THEN coalesce(r.status, 'finished')
    WHEN EXISTS (SELECT FROM alerts a WHERE a.run = r.id AND a.rule = '{STALLED}' AND a.state = 'firing') THEN 'stalled'
    ELSE 'running' END"""
"""A run is stalled while the alert of that rule fires, as on the page and in /metrics."""
MATTERS = f"""\
a.fired_step IS NOT NULL AND (a.state = 'firing'
    OR a.state = 'resolved' AND a.rule <> '{STALLED}' AND starts_with(a.resolution, '{RUN_ENDED}'))"""
"""An alert fires, or fired until its run ended: it says how that ended."""
LAST_AT = """\
coalesce((SELECT s.at FROM samples s WHERE s.run = r.id AND s.level = 0
    ORDER BY s.step DESC LIMIT 1), r.last_seen_at)"""
RANGE = """\
(extract(epoch FROM to_timestamp(r.started_at)) * 1000)::bigint - 10000 AS opens_from,
  CASE WHEN r.finished_at IS NULL AND r.last_seen_at > extract(epoch FROM now()) - 120 THEN 'now'
    ELSE ((coalesce(r.finished_at, r.last_seen_at) * 1000)::bigint + 10000)::text END AS opens_to"""
"""Two columns with the time in which the run was: links to its board carry them."""
_RUN_URL = (
    "/d/gradwatch-run?var-run=${__data.fields.run}&var-project=${__data.fields.project}"
    "&from=${__data.fields.opens_from}&to=${__data.fields.opens_to}&${postgres:queryparam}&${prometheus:queryparam}"
)
OPEN = {"title": "Open the run", "url": _RUN_URL, "targetBlank": False}
"""The link of the column with the names of runs."""
HIDDEN = "run|opens_from|opens_to"
PARTS = 200
"""Moments of a range."""
_WIDTH = f"(($__unixEpochTo() - $__unixEpochFrom()) / {PARTS}.0)"
MOMENTS = f"""\
moments AS (
  SELECT n, $__unixEpochFrom() + (n - 1) * {_WIDTH} AS at FROM generate_series(1, {PARTS}) AS n
)"""
"""The moments of the range at which alerts, or what came since the moment before, are counted: ``n`` and ``at``."""


def firing_over_time(column: str, values: Iterable[str]) -> str:
    """Return the query of how many alerts of the chosen projects fired at each moment, by a column of the alerts."""
    counted = ", ".join(f"count(*) FILTER (WHERE a.{column} = '{value}') AS \"{value}\"" for value in values)
    return f"""\
WITH {MOMENTS}, fired AS (
  SELECT a.rule, a.severity, a.fired_at, coalesce(a.resolved_at, 'Infinity') AS ended_at
  FROM alerts a JOIN runs r ON r.id = a.run
  WHERE a.fired_at <= $__unixEpochTo() AND coalesce(a.resolved_at, 'Infinity') >= $__unixEpochFrom()
    AND r.project = {CHOSEN_PROJECTS}
)
SELECT to_timestamp(m.at) AS "time", {counted}
FROM moments m LEFT JOIN fired a ON a.fired_at <= m.at AND a.ended_at > m.at
WHERE m.at <= extract(epoch FROM now()) GROUP BY m.at ORDER BY m.at"""
