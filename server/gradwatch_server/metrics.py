"""Prometheus collectors over the database and the server's own counts: a finished run is gone at the next scrape."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import sqlalchemy as sa
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gradwatch import wire
from gradwatch_server import queries, schema
from gradwatch_server.runs import load_runs
from gradwatch_server.services import Services

_RUN_LABELS = ("run", "project", "name")
_SCALARS = {
    "loss": ("gradwatch_run_loss", "Loss of the latest step."),
    "global_grad_norm": ("gradwatch_run_global_grad_norm", "L2 norm of the whole gradient before clipping."),
    "clipped_global_grad_norm": (
        "gradwatch_run_clipped_global_grad_norm",
        "L2 norm of the whole gradient after clipping.",
    ),
    "overhead_ratio": ("gradwatch_run_agent_overhead_ratio", "Share of the step that the agent takes."),
    "skipped_steps": ("gradwatch_run_skipped_steps", "Steps that the gradient scaler skipped."),
}


class RunCollector(Collector):
    """Active runs from their latest samples, and the alerts."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the families are known at scrape time."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Read the latest samples and the alerts."""
        with self._engine.connect() as connection:
            active = [run for run in load_runs(connection, None, None) if run["state"] != "finished"]
            yield from _runs(connection, active)
            yield _alerts(connection)


def _runs(connection: sa.Connection, active: list[dict[str, Any]]) -> Iterable[Metric]:
    step = GaugeMetricFamily("gradwatch_run_step", "Latest step of the run.", labels=_RUN_LABELS)
    seen = GaugeMetricFamily(
        "gradwatch_run_last_seen_timestamp_seconds", "When the run was last heard of.", labels=_RUN_LABELS
    )
    ratios = GaugeMetricFamily(
        "gradwatch_run_grad_weight_ratio",
        "Gradient to weight ratio over the parameters at the latest sample.",
        labels=(*_RUN_LABELS, "aggregate"),
    )
    scalars = {name: GaugeMetricFamily(metric, text, labels=_RUN_LABELS) for name, (metric, text) in _SCALARS.items()}
    for run in active:
        labels = [run["id"], run["project"], run["name"]]
        seen.add_metric(labels, run["last_seen_at"])
        if run["last_step"] is not None:
            step.add_metric(labels, run["last_step"])
        for name, family in scalars.items():
            if name in run["scalars"]:
                family.add_metric(labels, wire.number(run["scalars"][name]))
        for aggregate, value in _latest_ratios(connection, run["id"]):
            ratios.add_metric([*labels, aggregate], value)
    yield from (step, seen, ratios, *scalars.values())


def _latest_ratios(connection: sa.Connection, run_id: str) -> list[tuple[str, float]]:
    table = schema.samples
    row = connection.execute(
        sa.select(*table.c["grad_norm", "weight_norm"])
        .where(table.c.run == run_id, table.c.level == 0)
        .order_by(table.c.step.desc())
        .limit(1)
    ).one_or_none()
    if row is None or row.grad_norm is None or row.weight_norm is None:
        return []
    ratio = queries.ratio(row.grad_norm, row.weight_norm)
    known = ratio[ratio != wire.MISSING]
    if not known.size:
        return []
    return [("min", float(np.min(known))), ("median", float(np.median(known))), ("max", float(np.max(known)))]


def _alerts(connection: sa.Connection) -> Metric:
    table = schema.alerts
    family = GaugeMetricFamily(
        "gradwatch_alerts", "Alerts by rule, severity and state.", labels=("rule", "severity", "state")
    )
    counts = connection.execute(
        sa.select(*table.c["rule", "severity", "state"], sa.func.count().label("alerts")).group_by(
            table.c.rule, table.c.severity, table.c.state
        )
    )
    for row in counts:
        family.add_metric([row.rule, row.severity, row.state], row.alerts)
    return family


class ServerCollector(Collector):
    """What the server itself does."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the families are known at scrape time."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Read the counts of this process."""
        ingest, writer = self._services.ingest, self._services.writer
        counts = (
            ("gradwatch_ingest_batches", "Batches stored.", ingest.batches),
            ("gradwatch_ingest_duplicate_batches", "Batches that were stored before.", ingest.duplicates),
            ("gradwatch_ingest_samples", "Samples stored.", ingest.samples),
            ("gradwatch_ingest_values", "Values of statistics stored.", ingest.values),
            ("gradwatch_commits", "Transactions committed and synced.", writer.commits),
            ("gradwatch_commit_seconds", "Time in transactions, with their sync to disk.", writer.commit_seconds),
        )
        for name, text, count in counts:
            yield CounterMetricFamily(name, text, value=count)
        yield GaugeMetricFamily("gradwatch_queued_batches", "Batches that wait for the writer.", value=writer.waiting)
        attempts = CounterMetricFamily(
            "gradwatch_delivery_attempts", "Attempts to deliver by receiver and result.", labels=("receiver", "result")
        )
        for (receiver, result), count in self._services.notifier.results.items():
            attempts.add_metric([receiver, result], count)
        yield attempts
        table = schema.deliveries
        with self._services.engine.connect() as connection:
            due, dead = (
                connection.execute(
                    sa.select(sa.func.count()).select_from(table).where(table.c.state == state)
                ).scalar_one()
                for state in ("due", "dead")
            )
        yield GaugeMetricFamily("gradwatch_deliveries_due", "Deliveries that are not made yet.", value=due)
        yield GaugeMetricFamily("gradwatch_deliveries_dead", "Deliveries that were given up.", value=dead)
