"""The board of the servers: requests, queue, commits, storage."""

from dashboards import colours
from dashboards.colours import NONE_IS_BEST
from dashboards.frame import board
from dashboards.panels import Json, Panel, fixed, lines, numbers, override, promql, sql, table

_REQUESTS = "gradwatch_http_request_duration_seconds"
_COMMITS = "gradwatch_commit_duration_seconds"
_RATE = "[$__rate_interval]"
_MINE = '{job="$job"}'
_ERRORS = f'{{job="$job",status=~"5.."}}{_RATE}'
_TABLES = """\
SELECT c.relname AS "table", pg_total_relation_size(c.oid) + coalesce((
    SELECT sum(pg_total_relation_size(part.inhrelid)) FROM pg_inherits part WHERE part.inhparent = c.oid), 0) AS size
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = current_schema() ORDER BY size DESC LIMIT 50"""


def build() -> Json:
    """Return the board."""
    rows = [(4, [(24, _numbers())])]
    rows += [(8, [(12, left), (12, right)]) for left, right in (_requests(), _stored(), _queue(), _resources())]
    rows.append((9, [(24, _tables())]))
    return board("gradwatch-server", "What the servers do: requests, batches, queue, commits, storage.", rows)


def _share_of_errors() -> str:
    errors = f"sum(rate({_REQUESTS}_count{_ERRORS})) or 0 * sum(rate({_REQUESTS}_count{_MINE}{_RATE}))"
    return f"({errors}) / sum(rate({_REQUESTS}_count{_MINE}{_RATE}))"


def _slowest(share: float, metric: str, by: str = "") -> str:
    grouped = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({grouped}) (rate({metric}_bucket{_MINE}{_RATE})))"


def _numbers() -> Panel:
    refused = f"sum(increase(gradwatch_queue_refusals_total{_MINE}[1h]))"
    fullest = f"max(gradwatch_queued_batches{_MINE} / gradwatch_queue_limit_batches{_MINE})"
    dropped = "sum(max by (run) (gradwatch_run_agent_dropped_samples_total))"
    return numbers(
        1,
        "",
        "Servers that answer, how full the fullest queue is, the share of requests that end in an error of the server, "
        "the time within which 95% of the requests are answered, batches refused within an hour because a queue was "
        "full (agents send them again), and samples that agents of active runs have given up.",
        promql(f"sum(up{_MINE})", "Servers", "A", instant=True),
        promql(fullest, "Queue", "B", instant=True),
        promql(_share_of_errors(), "Errors", "C", instant=True),
        promql(_slowest(0.95, _REQUESTS), "95% answered within", "D", instant=True),
        promql(refused, "Batches refused in 1 h", "E", instant=True),
        promql(dropped, "Samples given up", "F", instant=True),
        overrides=[
            override(
                "Servers", decimals=0, thresholds=colours.thresholds(((None, colours.CRITICAL), (1, colours.PLAIN)))
            ),
            override(
                "Queue", unit="percentunit", decimals=0, thresholds=colours.thresholds(((None, "text"), (0.5, "red")))
            ),
            override(
                "Errors", unit="percentunit", decimals=1, thresholds=colours.thresholds(((None, "text"), (0.05, "red")))
            ),
            override("95% answered within", unit="s", decimals=2),
            override(
                "/^(Batches|Samples).*/",
                regex=True,
                unit="locale",
                decimals=0,
                thresholds=colours.thresholds(NONE_IS_BEST),
            ),
        ],
    )


def _requests() -> tuple[Panel, Panel]:
    answered = f"sum by (status) (rate({_REQUESTS}_count{_MINE}{_RATE}))"
    statuses = [("/^2/", colours.GOOD), ("/^3/", "blue"), ("/^4/", colours.WARNING), ("/^5/", colours.CRITICAL)]
    return (
        lines(2, "Requests a second", "Requests by the status of their answers.", promql(answered, "{{status}}"), min=0,
              overrides=[override(name, regex=True, color=fixed(colour)) for name, colour in statuses]),
        lines(3, "Time to answer", "Half and 95% of the requests are answered within this time.",
              promql(_slowest(0.5, _REQUESTS), "half", "A"), promql(_slowest(0.95, _REQUESTS), "95%", "B"),
              unit="s", min=0),
    )  # fmt: skip


def _stored() -> tuple[Panel, Panel]:
    def rate(of: str) -> str:
        return f"sum(rate(gradwatch_ingest_{of}_total{_MINE}{_RATE}))"

    return (
        lines(4, "Stored a second", "Samples and batches, and batches that were stored before.",
              promql(rate("samples"), "samples", "A"), promql(rate("batches"), "batches", "B"),
              promql(rate("duplicate_batches"), "sent twice", "C"), min=0),
        lines(5, "Values stored a second", "Values of statistics: samples times parameters times statistics.",
              promql(rate("values"), "values"), unit="short", min=0),
    )  # fmt: skip


def _queue() -> tuple[Panel, Panel]:
    mean = f"rate({_COMMITS}_sum{_MINE}{_RATE}) / rate({_COMMITS}_count{_MINE}{_RATE})"
    return (
        lines(6, "Commits", "Mean time of a transaction with its sync to disk, of each server.",
              promql(mean, "{{instance}}"), unit="s", min=0),
        lines(7, "Batches that wait", "Batches received and not stored yet.",
              promql(f"gradwatch_queued_batches{_MINE}", "{{instance}}"), min=0, decimals=0),
    )  # fmt: skip


def _resources() -> tuple[Panel, Panel]:
    return (
        lines(8, "Memory", "Resident memory of each server.",
              promql(f"process_resident_memory_bytes{_MINE}", "{{instance}}"), unit="bytes", min=0),
        lines(9, "Processors", "Processors that each server keeps busy.",
              promql(f"rate(process_cpu_seconds_total{_MINE}{_RATE})", "{{instance}}"), min=0),
    )  # fmt: skip


def _tables() -> Panel:
    size = override("size", unit="bytes", custom={"width": 160})
    return table(10, "Tables", "Size on disk with indexes.", sql(_TABLES), size, nothing="The database has no table")
