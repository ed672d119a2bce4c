"""Scalars of every step, such as the loss, in at most ``MOST_SPANS`` spans with the smallest and the largest of each.

No step is left out, whatever the range: the roll-ups hold the smallest and the largest value of all their steps, and
what they do not reach yet is read from the trails, which are MessagePack.
"""

from dashboards.queries.steps import NO_SAMPLE, SEEN, time_of
from gradwatch_server.store.rollups.series import TRAIL_STEPS

MOST_SPANS = 400
_ENOUGH = 150
"""Buckets of a level in the range from which on that level is fine enough to be drawn."""
_STEPS = "cf(.{16})|ce(.{8})|cd(.{4})|cc(..)|([0-7].)"
_VALUES = "cb(.{16})|a34e614e|a8496e66696e697479|a92d496e66696e697479"
"""MessagePack's integers, and its float64 or the texts NaN, Infinity and -Infinity, in hexadecimal digits."""
_VALUES_KEY = b"\xa6values".hex()
_ARRAY = "^(9.|dc.{4}|dd.{8})"


def spans_of(scalar: str, prefix: str) -> str:
    """Return the CTE ``{prefix}_spans`` of a scalar: step, last_step, low, high, and whether it is broken by NaN."""
    mine = f"s.run = (SELECT run FROM seen) AND s.name = '{scalar}'"
    covered = (
        f"SELECT s.last_step FROM scalars s WHERE {mine} AND s.level = each.level + 1 ORDER BY s.step DESC LIMIT 1"
    )
    return f"""\
{prefix}_top AS (
  SELECT coalesce(max(level), 0) AS level FROM (
    SELECT s.level FROM scalars s
    WHERE {mine} AND s.step BETWEEN (SELECT from_step FROM seen) AND (SELECT to_step FROM seen)
    GROUP BY s.level HAVING count(*) >= {_ENOUGH}
  ) enough
), {prefix}_parts AS (
  SELECT each.level, CASE WHEN each.level < top.level THEN coalesce(({covered}), -1) ELSE -1 END AS after
  FROM seen, {prefix}_top top, generate_series(0, top.level) AS each(level)
), {prefix}_rows AS (
  SELECT s.step, s.last_step, CASE WHEN s.finite > 0 THEN s.low END AS low,
    CASE WHEN s.finite > 0 THEN s.high END AS high, s.nonfinite > 0 AS broken
  FROM seen CROSS JOIN {prefix}_parts part CROSS JOIN LATERAL (
    SELECT s.* FROM scalars s
    WHERE {mine} AND s.level = part.level AND s.step > part.after AND s.step <= seen.to_step OFFSET 0
  ) s
  WHERE part.level > 0 AND s.last_step >= from_step
  UNION ALL
  SELECT step, step, value, value, value IS NULL FROM (
{_trail(scalar, prefix)}
  ) trail
), {prefix}_spans AS MATERIALIZED (
  SELECT min(step) AS step, max(last_step) AS last_step, min(low) AS low, max(high) AS high, bool_or(broken) AS broken
  FROM (SELECT *, ntile({MOST_SPANS}) OVER (ORDER BY step) AS span FROM {prefix}_rows) numbered GROUP BY span
)"""


def _trail(scalar: str, prefix: str) -> str:
    """Return the statement that decodes the steps and values of a scalar that no bucket covers; NULL: not finite."""
    name = scalar.encode()
    key = bytes([0xA0 + len(name)]) + name + b"\x82\xa5steps"
    value = _float64("item.hex")
    return f"""\
    SELECT DISTINCT ON (item.step) item.step, CASE WHEN item.hex IS NOT NULL THEN {value} END AS value
    FROM seen CROSS JOIN {prefix}_parts part CROSS JOIN LATERAL (
      SELECT * FROM trails WHERE run = seen.run AND first_step <= to_step
        AND first_step > greatest(part.after, from_step) - {TRAIL_STEPS} OFFSET 0
    ) t
    CROSS JOIN LATERAL (SELECT position('\\x{key.hex()}'::bytea IN t.scalars) AS place) key
    CROSS JOIN LATERAL (SELECT encode(substring(t.scalars FROM key.place + {len(key)}), 'hex') AS hex) body
    CROSS JOIN LATERAL (
      SELECT ('x' || lpad(coalesce(step[1], step[2], step[3], step[4], step[5]), 16, '0'))::bit(64)::bigint AS step,
        value[1] AS hex
      FROM ROWS FROM ({_items(1, _STEPS)}, {_items(2, _VALUES)}) AS items(step, value) WHERE step IS NOT NULL
    ) item
    WHERE part.level = 0 AND key.place > 0 AND item.step > part.after AND item.step BETWEEN from_step AND to_step
    ORDER BY item.step, t.attempt DESC, t.arrival DESC"""


def _items(part: int, pattern: str) -> str:
    """Return the expression of the items of an array: the one before or the one after the key ``values``."""
    array = f"regexp_replace(split_part(body.hex, '{_VALUES_KEY}', {part}), '{_ARRAY}', '')"
    return f"regexp_matches({array}, '{pattern}', 'g')"


def _float64(digits: str) -> str:
    """Return the expression of the float64 that 16 hexadecimal digits are."""
    bits = f"('x' || {digits})::bit(64)::bigint"
    fraction = f"({bits} & {2**52 - 1})::float8"
    exponent = f"(({bits} >> 52) & 2047)"
    return f"""(CASE WHEN {bits} < 0 THEN -1 ELSE 1 END * CASE
      WHEN {exponent} = 0 AND {fraction} = 0 THEN 0
      WHEN {exponent} = 0 THEN {fraction} * power(2::float8, -1074)
      ELSE (1 + {fraction} / {2**52}) * power(2::float8, ({exponent} - 1023)::float8) END)"""


def by_step(scalar: str) -> str:
    """Return the query of step, series and value, for a chart over steps: smallest, largest and ``not finite``.

    Without a step in the range a series without values says so, because Grafana would draw empty axes.
    """
    return f"""\
WITH RECURSIVE {SEEN}, {spans_of(scalar, "own")}, drawn AS (
  SELECT step, low, high, CASE WHEN broken THEN coalesce(max(high) OVER (), 1) END AS mark FROM own_spans
)
SELECT step, series, value FROM (
  SELECT step, n, series, value FROM drawn CROSS JOIN LATERAL (
    VALUES (1, 'smallest', low), (2, 'largest', high), (3, 'not finite', mark)) AS each(n, series, value)
  UNION ALL
  SELECT NULL, 0, '{NO_SAMPLE}', NULL WHERE NOT EXISTS (SELECT FROM drawn)
) listed ORDER BY step, n"""


def by_time(scalar: str, label: str) -> str:
    """Return the query of time, smallest, largest and ``not finite``, for a chart over time.

    A row of nothing follows where no sample came for long: a run that was killed does not go on as a line.
    """
    return f"""\
WITH RECURSIVE {SEEN}, {spans_of(scalar, "own")}, timed AS (
  SELECT begins.at, own.low, own.high, own.broken, seen.pause,
    greatest(ends.at, begins.at) AS until, lead(begins.at) OVER (ORDER BY own.step) AS next_at
  FROM seen CROSS JOIN own_spans own
  {time_of("own.step", "begins")}
  {time_of("own.last_step", "ends")}
)
SELECT to_timestamp(at) AS "time", low AS "{label}, smallest", high AS "{label}",
  CASE WHEN broken THEN coalesce(max(high) OVER (), 1) END AS "not finite"
FROM timed
UNION ALL
SELECT to_timestamp(until + 0.001), NULL, NULL, NULL FROM timed WHERE next_at - until > pause
ORDER BY "time\""""


def largest_by_time(scalar: str, label: str) -> str:
    """Return the query of time and largest value of a scalar."""
    return f"""\
WITH RECURSIVE {SEEN}, {spans_of(scalar, "own")}
SELECT to_timestamp(begins.at) AS "time", own.high AS "{label}"
FROM seen CROSS JOIN own_spans own
{time_of("own.step", "begins")}
ORDER BY "time\""""


def lowered_by_time(scalar: str, original: str, label: str) -> str:
    """Return the query of time and largest value of a scalar where it is less than another one."""
    return f"""\
WITH RECURSIVE {SEEN}, {spans_of(scalar, "own")}, {spans_of(original, "other")}
SELECT to_timestamp(begins.at) AS "time",
  CASE WHEN own.high < other.high * (1 - 1e-6) THEN own.high END AS "{label}"
FROM seen CROSS JOIN own_spans own
CROSS JOIN LATERAL (
  SELECT max(high) AS high FROM other_spans WHERE step <= own.last_step AND last_step >= own.step) other
{time_of("own.step", "begins")}
ORDER BY "time\""""
