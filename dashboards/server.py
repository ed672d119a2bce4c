"""The dashboard of the servers: requests, queue, commits, storage."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.frame import fill, frame
from dashboards.panels import NONE_IS_GOOD, Panel, Sql, lines, listing, number, prom

_REQUESTS = "gradwatch_http_request_duration_seconds"
_COMMITS = "gradwatch_commit_duration_seconds"
_RATE = "[$__rate_interval]"
_TABLES = """\
SELECT c.relname AS "table", pg_total_relation_size(c.oid) AS size FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname = current_schema() ORDER BY size DESC"""


def _mean(summary: str, by: str) -> str:
    return f"sum by ({by}) (rate({summary}_sum{_RATE})) / sum by ({by}) (rate({summary}_count{_RATE}))"


def build() -> Dashboard:
    """Return the dashboard."""
    board = frame("gradwatch-server", "What the servers do: requests, batches, queue, commits, storage.")
    return fill(board, (*_numbers(), *_work(), *_resources()))


def _numbers() -> tuple[Panel, ...]:
    return (
        number("Servers", "Servers that answer.", "short", prom('sum(up{job="gradwatch"})', instant=True),
               ((None, "red"), (1, "green"))),
        number("Queue", "How full the fullest queue is.", "percentunit",
               prom("max(gradwatch_queued_batches / gradwatch_queue_limit_batches)", instant=True),
               ((None, "green"), (0.5, "red"))),
        number("Batches sent away", "Refused in an hour because a queue was full; agents send them again.", "short",
               prom("sum(increase(gradwatch_queue_refusals_total[1h]))", instant=True), NONE_IS_GOOD),
        number("Samples given up", "By agents of active runs, in this attempt.", "short",
               prom("sum(max by (run) (gradwatch_run_agent_dropped_samples_total))", instant=True), NONE_IS_GOOD),
    )  # fmt: skip


def _work() -> tuple[Panel, ...]:
    return (
        lines("Requests", "By route and status.", "reqps",
              prom(f"sum by (route, status) (rate({_REQUESTS}_count{_RATE}))", "{{route}} {{status}}")),
        lines("Time to answer", "Mean by route.", "s", prom(_mean(_REQUESTS, "route"), "{{route}}")),
        lines("Stored", "Samples and batches a second, and batches that were stored before.", "cps",
              prom(f"sum(rate(gradwatch_ingest_samples_total{_RATE}))", "samples", "A"),
              prom(f"sum(rate(gradwatch_ingest_batches_total{_RATE}))", "batches", "B"),
              prom(f"sum(rate(gradwatch_ingest_duplicate_batches_total{_RATE}))", "sent twice", "C")),
        lines("Values stored", "Values of statistics a second.", "cps",
              prom(f"sum(rate(gradwatch_ingest_values_total{_RATE}))", "values")),
        lines("Commits", "Mean time of a transaction with its sync to disk.", "s",
              prom(_mean(_COMMITS, "instance"), "{{instance}}")),
        lines("Waiting batches", "Batches taken in and not stored yet.", "short",
              prom("gradwatch_queued_batches", "{{instance}}")),
    )  # fmt: skip


def _resources() -> tuple[Panel, ...]:
    return (
        lines("Memory", "Resident memory of each server.", "bytes",
              prom('process_resident_memory_bytes{job="gradwatch"}', "{{instance}}")),
        lines("Processor", "Processors that each server keeps busy.", "none",
              prom(f'rate(process_cpu_seconds_total{{job="gradwatch"}}{_RATE})', "{{instance}}")),
        listing("Tables", "Size on disk with indexes.", "bytes", Sql(_TABLES)),
    )  # fmt: skip
