"""The layers of the chosen run: as the rows of the map by time, and as the points of the depth profile."""

from dashboards.queries.steps import SEEN, time_of
from gradwatch.statistics import RATIO_EPS

NO_SAMPLE = "no sample in this time"
"""Stands in the place of a layer: Grafana complains of missing columns if a query yields no row."""
MOST_ROWS = 40
_COLUMNS = 90
_ENOUGH = 40
"""Buckets of a level in the range from which on that level is fine enough to be drawn."""
_RATIO = f"v.gradient / (v.weight + {RATIO_EPS})"
_ORDERED = """\
SELECT p.position, p.name, jsonb_array_length(p.shape) > 1 AS matrix,
    row_number() OVER (ORDER BY p.depth, p.position) AS place, count(*) OVER () AS layers
  FROM parameters p WHERE p.run = (SELECT run FROM chosen)"""
_BLOCK = r"coalesce(substring(name FROM '^((?:[^.]*[^.0-9][^.]*\.)*\d+)\.'), substring(name FROM '^(.*)\.'), name)"
"""A parameter's module up to its first number: decoder.layers.12 for decoder.layers.12.attention.weight."""

PAGES = f"""\
WITH chosen AS (SELECT id AS run FROM runs WHERE id = ANY (ARRAY[${{run:sqlstring}}]::text[]) LIMIT 1),
ordered AS (
  {_ORDERED}
), pages AS (
  SELECT (place - 1) / {MOST_ROWS} AS page, min(place) AS low, max(place) AS high FROM ordered
  WHERE layers > {MOST_ROWS} GROUP BY 1
)
SELECT __text, __value FROM (
  SELECT 0 AS page, 'all' AS __text, 'all' AS __value
  UNION ALL
  SELECT page + 1, low || ' to ' || high || ': ' || head.name || ' …', low || '-' || high
  FROM pages JOIN ordered head ON head.place = pages.low
) choices ORDER BY page LIMIT 500"""
"""The choices of the variable that pages through the layers: all of them, or so many at a time."""

_PAGE = "coalesce((ARRAY[${layers:sqlstring}]::text[])[1], 'all')"
_ROWS = f"""\
ordered AS (
  {_ORDERED}
), paged AS (
  SELECT *, CASE WHEN count(*) OVER () > {MOST_ROWS} THEN {_BLOCK} ELSE name END AS unit FROM ordered
  WHERE {_PAGE} !~ '^\\d+-\\d+$' OR place BETWEEN split_part({_PAGE}, '-', 1)::int AND split_part({_PAGE}, '-', 2)::int
), units AS (
  SELECT unit, min(place) AS place, CASE WHEN count(*) OVER () > {MOST_ROWS}
    THEN ntile({MOST_ROWS}) OVER (ORDER BY min(place)) ELSE row_number() OVER (ORDER BY min(place)) END AS band
  FROM paged GROUP BY unit
), named AS (
  SELECT band, min(place) AS place, (array_agg(unit ORDER BY place))[1] AS first_unit,
    CASE WHEN count(*) > 1 THEN ' to ' || (array_agg(unit ORDER BY place DESC))[1] ELSE '' END AS last_unit
  FROM units GROUP BY band
), shortened AS (
  SELECT band, place, CASE WHEN length(first_unit || last_unit) > 34
    THEN '…' || right(first_unit || last_unit, 33) ELSE first_unit || last_unit END AS label
  FROM named
), bands AS (
  SELECT band, CASE WHEN count(*) OVER (PARTITION BY label) > 1 THEN label || ' · ' || place ELSE label END AS label
  FROM shortened
), members AS (
  SELECT p.position, u.band, p.matrix OR NOT bool_or(p.matrix) OVER (PARTITION BY u.band) AS counts
  FROM paged p JOIN units u ON u.unit = p.unit
)"""

MAP = f"""\
WITH RECURSIVE {SEEN}, {_ROWS}, top AS (
  SELECT coalesce(max(level), 0) AS level FROM (
    SELECT s.level FROM seen, samples s WHERE s.run = seen.run AND s.level > 0 AND s.step BETWEEN from_step AND to_step
    GROUP BY s.level HAVING count(*) >= {_ENOUGH}
  ) enough
), parts AS (
  SELECT each.level, CASE WHEN each.level < top.level THEN coalesce((
    SELECT last_step FROM samples WHERE run = seen.run AND level = each.level + 1 ORDER BY step DESC LIMIT 1
  ), -1) ELSE -1 END AS after
  FROM seen, top, generate_series(0, top.level) AS each(level)
), pieces AS (
  SELECT s.level, s.step, coalesce(s.last_step, s.step) AS last_step, ntile({_COLUMNS}) OVER (ORDER BY s.step) AS span
  FROM seen, parts part, samples s
  WHERE s.run = seen.run AND s.level = part.level AND s.step > part.after
    AND coalesce(s.last_step, s.step) >= from_step AND s.step <= to_step
), measured AS (
  SELECT p.span, v.place, CASE WHEN v.gradient < 'Infinity' THEN {_RATIO} ELSE 'NaN' END AS ratio
  FROM seen, pieces p, samples s
  CROSS JOIN LATERAL unnest(s.grad_norm, s.weight_norm) WITH ORDINALITY AS v(gradient, weight, place)
  WHERE p.level = 0 AND s.run = seen.run AND s.level = 0 AND s.step = p.step AND v.gradient >= 0
  UNION ALL
  SELECT p.span, v.place, CASE WHEN coalesce(r.nonfinite[v.place::int], r.nonfinite[1]) > 0 THEN 'NaN' ELSE v.high END
  FROM seen, pieces p, rollups r
  CROSS JOIN LATERAL unnest(r.high) WITH ORDINALITY AS v(high, place)
  WHERE p.level > 0 AND r.run = seen.run AND r.statistic = 'ratio' AND r.level = p.level AND r.step = p.step
    AND v.high >= 0
), cells AS (
  SELECT m.span, l.band, max(m.ratio) FILTER (WHERE l.counts OR m.ratio = 'NaN') AS ratio
  FROM measured m JOIN members l ON l.position = m.place - 1 GROUP BY m.span, l.band
), spans AS (
  SELECT span, min(step) AS step, max(last_step) AS last_step FROM pieces GROUP BY span
), timed AS (
  SELECT span, begins.at, greatest(ends.at, begins.at) AS until, pause, lead(begins.at) OVER (ORDER BY span) AS next_at
  FROM seen CROSS JOIN spans
  {time_of("spans.step", "begins")}
  {time_of("spans.last_step", "ends")}
), columns AS (
  SELECT span, at FROM timed
  UNION ALL
  SELECT NULL, until + 0.001 FROM timed
  WHERE CASE WHEN next_at IS NULL THEN until < $__unixEpochTo() - pause ELSE next_at - until > pause END
)
SELECT "time", layer, ratio FROM (
  SELECT to_timestamp(c.at) AS "time", b.band, b.label AS layer, cells.ratio::real AS ratio
  FROM columns c CROSS JOIN bands b LEFT JOIN cells ON cells.span = c.span AND cells.band = b.band
  UNION ALL
  SELECT to_timestamp($__unixEpochFrom()), 0, '{NO_SAMPLE}', NULL WHERE NOT EXISTS (SELECT FROM columns)
) drawn ORDER BY "time", band"""
"""Time across, layers from the input down; where layers share a row, the largest ratio of their weight matrices.

A NaN of any parameter wins. A column of nothing follows where no sample came for long.
"""

PROFILE = f"""\
WITH RECURSIVE {SEEN}, ordered AS (
  {_ORDERED}
), latest AS (
  SELECT s.step, s.grad_norm, s.weight_norm FROM seen, samples s
  WHERE s.run = seen.run AND s.level = 0 AND s.step BETWEEN from_step AND to_step ORDER BY s.step DESC LIMIT 1
), measured AS (
  SELECT o.place, o.name, o.matrix, v.gradient = 0 AS nothing, v.gradient = 'NaN' OR v.gradient = 'Infinity' AS broken,
    CASE WHEN v.gradient > 0 AND v.gradient < 'Infinity' THEN {_RATIO} END AS ratio
  FROM latest CROSS JOIN LATERAL unnest(grad_norm, weight_norm) WITH ORDINALITY AS v(gradient, weight, n)
  JOIN ordered o ON o.position = v.n - 1 WHERE v.gradient >= 0
), edges AS (SELECT coalesce(min(ratio), 1e-6) / 10 AS low, coalesce(max(ratio), 1) * 10 AS high FROM measured)
SELECT place AS depth, CASE WHEN matrix THEN ratio END AS "weight matrices",
  CASE WHEN NOT matrix THEN ratio END AS "biases and norms", CASE WHEN nothing THEN low END AS "exactly 0",
  CASE WHEN broken THEN high END AS "NaN or infinite", name AS parameter
FROM measured, edges
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, '{NO_SAMPLE}' WHERE NOT EXISTS (SELECT FROM measured)
ORDER BY depth"""
"""The ratio of every parameter at the latest sample of the range, the input's first.

What a logarithm cannot show, a gradient of exactly zero and one that is not finite, has a series of its own at the
lower and the upper edge.
"""
