"""Which steps of the chosen run lie in the chosen time, and when a step was: what the panels of one run begin with.

Samples carry a time, the scalars of every step do not, and there is no index by time. So the ends of the time range are
found by bisection over the samples' steps, and the time of any other step by its neighbours.
"""

NO_SAMPLE = "No sample in this time"
"""What an empty chart says: as its legend or in its title where Grafana would draw axes without a word."""

CHOSEN = """\
chosen AS (
  SELECT id AS run, started_at, last_seen_at, last_step, greatest(60, 20 * coalesce(usual_interval_seconds, 0)) AS pause
  FROM runs WHERE id = ANY (ARRAY[${run:sqlstring}]::text[]) LIMIT 1
)"""
"""The run, and the seconds without a sample after which a line is broken off."""

SEEN = f"""\
{CHOSEN}, ends AS (
  SELECT c.*, head.step AS head_step, head.at AS head_at, tail.step AS tail_step, tail.at AS tail_at
  FROM chosen c
  CROSS JOIN LATERAL (
    SELECT step, at FROM samples WHERE run = c.run AND level = 0 ORDER BY step LIMIT 1) head
  CROSS JOIN LATERAL (
    SELECT step, at FROM samples WHERE run = c.run AND level = 0 ORDER BY step DESC LIMIT 1) tail
), bisected AS (
  SELECT bound, head_step AS low, tail_step + 1 AS high
  FROM ends, (VALUES ($__unixEpochFrom()::float8), ($__unixEpochTo() + 1::float8)) AS bounds(bound)
  UNION ALL
  SELECT b.bound, CASE WHEN probe.at < b.bound THEN probe.step + 1 ELSE b.low END,
    CASE WHEN probe.at < b.bound THEN b.high ELSE (b.low + b.high) / 2 END
  FROM bisected b CROSS JOIN ends e CROSS JOIN LATERAL (
    SELECT step, at FROM samples WHERE run = e.run AND level = 0 AND step >= (b.low + b.high) / 2 ORDER BY step LIMIT 1
  ) probe
  WHERE b.low < b.high
), found AS (
  SELECT e.*, b.bound, CASE
    WHEN b.bound > e.tail_at THEN greatest(e.last_step, e.tail_step) + 1
    WHEN b.bound > e.head_at OR e.head_at <= e.started_at THEN max(b.low)
    ELSE ceil(e.head_step * (b.bound - e.started_at) / (e.head_at - e.started_at))::bigint END AS step
  FROM ends e, bisected b GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, b.bound
), seen AS (
  SELECT b.run, b.started_at, b.last_seen_at, b.last_step, b.pause, b.step AS from_step, a.step - 1 AS to_step
  FROM found b JOIN found a ON a.bound > b.bound
)"""
"""One row ``seen`` with the first and the last step of the range; begin the statement with WITH RECURSIVE."""


UNSAMPLED = f"""\
WITH RECURSIVE {SEEN}
SELECT __text, __text AS __value FROM (
  SELECT CASE WHEN EXISTS (
    SELECT FROM seen, samples s WHERE s.run = seen.run AND s.level = 0 AND s.step BETWEEN from_step AND to_step
  ) THEN '' ELSE ' \u00b7 {NO_SAMPLE.lower()}' END AS __text
) said"""
"""What a title adds where there is no sample: nothing, or the words; one row."""


def time_of(step: str, name: str) -> str:
    """Return a join that adds the time of a step, ``name.at`` in Unix seconds, to a row of ``seen``.

    Args:
        step: an expression of the row.
        name: of the joined row.
    """
    samples = "SELECT step, at FROM samples WHERE run = seen.run AND level = 0"
    return f"""\
CROSS JOIN LATERAL (
  SELECT b.at + CASE WHEN a.step > b.step THEN (a.at - b.at) * ({step} - b.step) / (a.step - b.step) ELSE 0 END AS at
  FROM (SELECT coalesce(max(step), 0)::float8 AS step, coalesce(max(at), seen.started_at) AS at FROM (
      {samples} AND step <= {step} ORDER BY step DESC LIMIT 1) before) b,
    (SELECT coalesce(max(step), seen.last_step)::float8 AS step, coalesce(max(at), seen.last_seen_at) AS at FROM (
      {samples} AND step > {step} ORDER BY step LIMIT 1) after) a
) {name}"""
