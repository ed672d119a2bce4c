"""The layers of the chosen run: as the rows of the map by time, and as the points of the depth profile.

Samples are read by their keys, one after the other (LATERAL with OFFSET 0): without that PostgreSQL may unnest the
samples of every run before it looks which of them are in the chosen time.
"""

from dashboards.colours import RATIO_LEGEND
from dashboards.queries.steps import NO_SAMPLE, SEEN, time_of
from gradwatch.statistics import RATIO_EPS

LEGEND = "\u00a0"
"""The first row of the map, which is not drawn: it holds the numbers of the colours, for the legend alone."""
NAMED_ROWS = 40
"""Rows whose names have room beside the map. Where there are more, a row is a block, or every so many have a name."""
MOST_ROWS = 320
_COLUMNS = 90
_ENOUGH = 40
"""Buckets of a level in the range from which on that level is fine enough to be drawn."""
UNNAMED = " "
"""Ends the label of a row that has no room for its name beside the map."""
_RATIO = f"v.gradient / (v.weight + {RATIO_EPS})"
_ORDERED = """\
SELECT p.position, p.name, jsonb_array_length(p.shape) > 1 AS matrix,
    row_number() OVER (ORDER BY p.depth, p.position) AS place, count(*) OVER () AS layers
  FROM parameters p WHERE p.run = (SELECT run FROM chosen)"""
_BLOCK = r"coalesce(substring(name FROM '^((?:[^.]*[^.0-9][^.]*\.)*\d+)\.'), substring(name FROM '^(.*)\.'), name)"
"""A parameter's module up to its first number: decoder.layers.12 for decoder.layers.12.attention.weight."""
_OUTER = "regexp_replace({}, '[^.]*$', '')"

PAGES = f"""\
WITH chosen AS (SELECT id AS run FROM runs WHERE id = ANY (ARRAY[${{run:sqlstring}}]::text[]) LIMIT 1),
ordered AS (
  {_ORDERED}
), pages AS (
  SELECT size, layers, min(place) AS low, max(place) AS high
  FROM ordered CROSS JOIN (VALUES ({MOST_ROWS}), ({NAMED_ROWS})) AS sizes(size)
  WHERE layers > {NAMED_ROWS} GROUP BY size, layers, (place - 1) / size
), choices AS (
  SELECT CASE WHEN high - low + 1 = pages.layers THEN 1 WHEN size = {MOST_ROWS} THEN 3 ELSE 4 END AS kind, low,
    CASE WHEN high - low + 1 = pages.layers THEN 'all ' || pages.layers
      ELSE low || ' to ' || high || ': ' || head.name || ' …' END AS __text, low || '-' || high AS __value
  FROM pages JOIN ordered head ON head.place = pages.low
  UNION ALL
  SELECT 2, 0, CASE WHEN EXISTS (SELECT FROM pages) THEN 'by blocks' ELSE 'all' END, 'all'
)
SELECT __text, __value FROM choices ORDER BY kind, low LIMIT 500"""
"""The choices of the variable of the map's rows, of which a board opens with the first.

These are all parameters if they fit the map, the blocks that they form, and pages with as many as fit it, or as many
as can have a name.
"""

_PAGE = "coalesce((ARRAY[${layers:sqlstring}]::text[])[1], 'all')"
_ROWS = f"""\
ordered AS (
  {_ORDERED}
), choice AS (
  SELECT coalesce(low, 1) AS low, coalesce(high, 2147483647) AS high,
    coalesce(high - low < {MOST_ROWS}, false) AS single
  FROM (SELECT bounds[1]::int AS low, bounds[2]::int AS high
    FROM (SELECT regexp_match({_PAGE}, '^(\\d{{1,9}})-(\\d{{1,9}})$') AS bounds) parsed) page
), paged AS (
  SELECT *, CASE WHEN single OR count(*) OVER () <= {NAMED_ROWS} THEN name ELSE {_BLOCK} END AS unit
  FROM ordered JOIN choice ON place BETWEEN low AND high
), units AS (
  SELECT unit, min(place) AS place,
    CASE WHEN single OR count(*) OVER () <= {NAMED_ROWS} THEN row_number() OVER (ORDER BY min(place))
      ELSE ntile({NAMED_ROWS}) OVER (ORDER BY min(place)) END AS band
  FROM paged GROUP BY unit, single
), named AS (
  SELECT band, place, first_unit, CASE WHEN first_unit = last_unit THEN ''
    WHEN {_OUTER.format("first_unit")} = {_OUTER.format("last_unit")} THEN ' to ' || substring(last_unit FROM '[^.]*$')
    ELSE ' to ' || last_unit END AS last_unit
  FROM (
    SELECT band, min(place) AS place, (array_agg(unit ORDER BY place))[1] AS first_unit,
      (array_agg(unit ORDER BY place DESC))[1] AS last_unit
    FROM units GROUP BY band
  ) ends
), shortened AS (
  SELECT band, place, CASE WHEN length(first_unit || last_unit) > 32
    THEN '…' || right(first_unit || last_unit, 31) ELSE first_unit || last_unit END AS label
  FROM named
), bands AS (
  SELECT band, CASE WHEN count(*) OVER (PARTITION BY label) > 1
    THEN '…' || right(label, 24) || ' · ' || place ELSE label END ||
    CASE WHEN (band - 1) % ceil(count(*) OVER () / {NAMED_ROWS}.0)::int = 0 THEN '' ELSE '{UNNAMED}' END AS label
  FROM shortened
), members AS (
  SELECT p.position, u.band, p.matrix OR NOT bool_or(p.matrix) OVER (PARTITION BY u.band) AS counts
  FROM paged p JOIN units u ON u.unit = p.unit
)"""

_BUCKETS = "s.run = (SELECT run FROM seen)"
MAP = f"""\
WITH RECURSIVE {SEEN}, {_ROWS}, top AS (
  SELECT coalesce(max(level), 0) AS level FROM (
    SELECT s.level FROM samples s WHERE {_BUCKETS} AND s.level > 0
      AND s.step BETWEEN (SELECT from_step FROM seen) AND (SELECT to_step FROM seen)
    GROUP BY s.level HAVING count(*) >= {_ENOUGH}
  ) enough
), parts AS (
  SELECT each.level, CASE WHEN each.level < top.level THEN coalesce((
    SELECT last_step FROM samples WHERE run = seen.run AND level = each.level + 1 ORDER BY step DESC LIMIT 1
  ), -1) ELSE -1 END AS after, coalesce((
    SELECT step FROM samples WHERE run = seen.run AND level = each.level AND step <= from_step
    ORDER BY step DESC LIMIT 1
  ), 0) AS first
  FROM seen, top, generate_series(0, top.level) AS each(level)
), pieces AS (
  SELECT part.level, s.step, s.last_step, ntile({_COLUMNS}) OVER (ORDER BY s.step) AS span
  FROM seen CROSS JOIN parts part CROSS JOIN LATERAL (
    SELECT step, coalesce(last_step, step) AS last_step FROM samples
    WHERE run = seen.run AND level = part.level AND step > part.after AND step BETWEEN part.first AND to_step OFFSET 0
  ) s
  WHERE s.last_step >= from_step
), measured AS (
  SELECT p.span, v.place, CASE WHEN v.gradient < 'Infinity' THEN {_RATIO} ELSE 'NaN' END AS ratio
  FROM seen CROSS JOIN pieces p CROSS JOIN LATERAL (
    SELECT grad_norm, weight_norm FROM samples WHERE run = seen.run AND level = 0 AND step = p.step OFFSET 0
  ) s CROSS JOIN LATERAL unnest(s.grad_norm, s.weight_norm) WITH ORDINALITY AS v(gradient, weight, place)
  WHERE p.level = 0 AND v.gradient >= 0
  UNION ALL
  SELECT p.span, v.place, CASE WHEN coalesce(r.nonfinite[v.place::int], r.nonfinite[1]) > 0 THEN 'NaN' ELSE v.high END
  FROM seen CROSS JOIN pieces p CROSS JOIN LATERAL (
    SELECT high, nonfinite FROM rollups
    WHERE run = seen.run AND statistic = 'ratio' AND level = p.level AND step = p.step OFFSET 0
  ) r CROSS JOIN LATERAL unnest(r.high) WITH ORDINALITY AS v(high, place)
  WHERE p.level > 0 AND v.high >= 0
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
), legend AS (
  SELECT n AS value, $__unixEpochFrom() - 1e8 + n AS at FROM generate_series(1, {len(RATIO_LEGEND)}) AS n
  WHERE EXISTS (SELECT FROM columns)
)
SELECT "time", layer, ratio FROM (
  SELECT to_timestamp(at) AS "time", -1 AS band, '{LEGEND}' AS layer, value AS ratio FROM legend
  UNION ALL
  SELECT to_timestamp(c.at), b.band, b.label, CASE WHEN cells.ratio > 0 AND cells.ratio < 'Infinity'
    THEN to_char(cells.ratio, '9.99EEEE')::float8 ELSE cells.ratio END
  FROM columns c CROSS JOIN bands b LEFT JOIN cells ON cells.span = c.span AND cells.band = b.band
  UNION ALL
  SELECT to_timestamp($__unixEpochFrom()), 0, '{NO_SAMPLE}', NULL WHERE NOT EXISTS (SELECT FROM columns)
) drawn ORDER BY "time", band"""
"""Time across, layers from the input down; where layers share a row, the largest ratio of their weight matrices.

A NaN of any parameter wins. A column of nothing follows where no sample came for long. Ratios have three digits, which
is less to send. The rows of the legend lie years before the chosen time. Where there is no sample, one row says so:
Grafana complains of missing columns if a query yields none.
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
  CASE WHEN broken THEN high END AS "NaN or infinite", name AS parameter,
  CASE WHEN broken THEN 'NaN or infinite' WHEN nothing THEN 'exactly 0'
    ELSE trim(to_char(ratio, '9.9EEEE')) END AS ratio
FROM measured, edges
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, '{NO_SAMPLE}', NULL WHERE NOT EXISTS (SELECT FROM measured)
ORDER BY depth"""
"""The ratio of every parameter at the latest sample of the range, the input's first.

What a logarithm cannot show, a gradient of exactly zero and one that is not finite, has a series of its own at the
lower and the upper edge. The tooltip shows the last two columns.
"""
