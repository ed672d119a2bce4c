"""Prometheus collectors behind ``/metrics``: active runs and alerts from the database, and the counts of this process.

The metrics are made at each scrape, so that a finished run is gone at the next one.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gradwatch import __version__, wire
from gradwatch_server import steady_clock
from gradwatch_server.alerting.lifecycle import SEVERITIES
from gradwatch_server.diagnosis import SAMPLE_RULES
from gradwatch_server.ingest.admission import ByteBudget
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.notify.notifier import Notifier
from gradwatch_server.settings import Settings
from gradwatch_server.store import schema
from gradwatch_server.store.database import batched, size_bytes
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.runs import count_active, load_active
from gradwatch_server.telemetry.remote_write import RemoteWriter
from gradwatch_server.telemetry.request_counts import RequestCounts
from gradwatch_server.telemetry.snapshot import ParameterCache, Snapshot, load_snapshots

_PIECE_RUNS = 500
_PIECE_PARAMETERS = 100_000
_RUN_LABELS = ("run", "project", "name")
_RUN_GAUGES = {
    "gradwatch_run_step": "Latest step of the run.",
    "gradwatch_run_stalled": "1 while the rule stalled fires for the run.",
    "gradwatch_run_last_seen_timestamp_seconds": "Time at which the run was last heard of.",
    "gradwatch_run_last_sample_timestamp_seconds": "Time at which the latest sample was measured.",
    "gradwatch_run_loss": "Loss of the latest step.",
    "gradwatch_run_learning_rate": "Learning rate at the latest sample.",
    "gradwatch_run_step_duration_seconds": "Time that a step takes.",
    "gradwatch_run_agent_overhead_ratio": "Share of the step's time that the agent takes.",
    "gradwatch_run_global_grad_norm": "L2 norm of the whole gradient before clipping.",
    "gradwatch_run_clipped_global_grad_norm": "L2 norm of the whole gradient after clipping.",
    "gradwatch_run_global_grad_norm_limit": "Limit to which the training clips the L2 norm of the whole gradient.",
    "gradwatch_run_grad_weight_min_ratio": "Smallest gradient to weight ratio over the parameters.",
    "gradwatch_run_grad_weight_median_ratio": "Median gradient to weight ratio over the parameters.",
    "gradwatch_run_grad_weight_max_ratio": "Largest gradient to weight ratio over the parameters.",
    "gradwatch_run_attenuation_decades_per_layer": "Decades that the gradient loses per layer, from output to input.",
    "gradwatch_run_clipped_parameters_ratio": "Share of the parameters whose gradient was clipped.",
    "gradwatch_run_parameters": "Parameters of the run.",
    "gradwatch_run_parameters_left_out": "Parameters of the run without series of their own.",
    "gradwatch_run_nonfinite_parameters": "Parameters whose gradient holds a NaN or an infinity.",
    "gradwatch_run_zero_parameters": "Parameters whose gradient is exactly zero.",
}
_RUN_COUNTERS = {
    "gradwatch_run_samples": "Samples stored.",
    "gradwatch_run_skipped_steps": "Steps that the gradient scaler skipped.",
    "gradwatch_run_agent_dropped_samples": "Samples that the agent dropped in this attempt.",
    "gradwatch_run_agent_dropped_bytes": "Bytes that the agent dropped in this attempt.",
    "gradwatch_run_agent_errors": "Errors that the agent swallowed in this attempt.",
}
_SCALARS = {
    "loss": "gradwatch_run_loss",
    "learning_rate": "gradwatch_run_learning_rate",
    "step_seconds": "gradwatch_run_step_duration_seconds",
    "overhead_ratio": "gradwatch_run_agent_overhead_ratio",
    "global_grad_norm_limit": "gradwatch_run_global_grad_norm_limit",
    "skipped_steps": "gradwatch_run_skipped_steps",
}
_PARAMETER_GAUGES = {
    "gradwatch_parameter_grad_norm": "L2 norm of the parameter's gradient before clipping.",
    "gradwatch_parameter_weight_norm": "L2 norm of the parameter.",
    "gradwatch_parameter_grad_weight_ratio": "Gradient to weight ratio of the parameter.",
}


class Sources(Protocol):
    """The parts of a server process that the collectors read; ``Services`` has them."""

    settings: Settings
    engine: sa.Engine
    writer: Writer
    ingest: Ingest
    byte_budget: ByteBudget
    notifier: Notifier
    remote_writer: RemoteWriter | None
    parameter_cache: ParameterCache
    request_counts: RequestCounts


class RunCollector(Collector):
    """Collects the metrics of active runs from their latest samples, and those of the alerts."""

    def __init__(self, services: Sources) -> None:
        self._engine = services.engine
        self._settings = services.settings.configuration.metrics
        self._public_url = services.settings.public_url
        self._parameter_cache = services.parameter_cache

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the metric families are not known before the scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yield the metric families, read from the database piece by piece: the runs may have any number of layouts."""
        settings, since = self._settings, steady_clock.now() - self._settings.silent_seconds
        with self._engine.connect() as connection:
            active = load_active(connection, since, settings.most_runs)
            beyond = count_active(connection, since) - len(active)
            most = self._most_listed(sum(run["sample_count"] > 0 for run in active))
            self._parameter_cache.retain(run["id"] for run in active)
            families = _RunFamilies()
            for piece in _pieces(active):
                snapshots = load_snapshots(connection, [run["id"] for run in piece], self._parameter_cache)
                for run in piece:
                    families.add(run, snapshots.get(run["id"]), most)
            unhealthy = _unhealthy(connection, [run["id"] for run in active])
            alerts = _alerts(connection)
            size = size_bytes(connection)
        yield GaugeMetricFamily("gradwatch_database_bytes", "Size of the database on disk.", value=size)
        yield self._run_info(active)
        yield GaugeMetricFamily("gradwatch_runs_left_out", "Active runs beyond metrics.most_runs.", value=beyond)
        yield from families.families
        yield from _health_families(active, unhealthy)
        yield alerts

    def _run_info(self, active: Sequence[dict[str, Any]]) -> Metric:
        text = "The URL of the run's page; always 1."
        family = GaugeMetricFamily("gradwatch_run_info", text, labels=(*_RUN_LABELS, "url"))
        for run in active:
            family.add_metric([*_labels(run), f"{self._public_url}/runs/{run['id']}"], 1)
        return family

    def _most_listed(self, measured: int) -> int:
        """Return how many parameters of each run get series of their own, if so many runs have samples."""
        settings = self._settings
        share = settings.most_parameters // max(1, measured)
        return share if settings.parameters == "all" else min(share, settings.conspicuous_parameters)


def _pieces(active: Sequence[dict[str, Any]]) -> Iterable[Sequence[dict[str, Any]]]:
    """Yield the runs in pieces of at most so many runs and parameters that their layouts fit into memory together."""
    piece: list[dict[str, Any]] = []
    width = 0
    for run in active:
        if piece and (len(piece) == _PIECE_RUNS or width + run["parameter_count"] > _PIECE_PARAMETERS):
            yield piece
            piece, width = [], 0
        piece.append(run)
        width += run["parameter_count"]
    if piece:
        yield piece


class _RunFamilies:
    """The metric families of runs and of their parameters; a run's snapshot is not kept."""

    def __init__(self) -> None:
        self._of_runs: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        self._of_runs |= {name: GaugeMetricFamily(name, text, labels=_RUN_LABELS) for name, text in _RUN_GAUGES.items()}
        self._of_runs |= {
            name: CounterMetricFamily(name, text, labels=_RUN_LABELS) for name, text in _RUN_COUNTERS.items()
        }
        labels = (*_RUN_LABELS, "parameter", "depth")
        self._of_parameters = [GaugeMetricFamily(name, text, labels=labels) for name, text in _PARAMETER_GAUGES.items()]

    @property
    def families(self) -> Iterable[Metric]:
        """Return all families."""
        return [*self._of_runs.values(), *self._of_parameters]

    def add(self, run: Mapping[str, Any], snapshot: Snapshot | None, most: int) -> None:
        """Add a run, and up to so many of its parameters, the most conspicuous."""
        values = _run_values(run)
        if snapshot is not None:
            listed = snapshot.conspicuous(most).tolist()
            values |= _snapshot_values(run["scalars"], snapshot, len(listed))
            self._add_parameters(run, snapshot, listed)
        for name, value in values.items():
            self._of_runs[name].add_metric(_labels(run), value)

    def _add_parameters(self, run: Mapping[str, Any], snapshot: Snapshot, listed: Sequence[int]) -> None:
        parameters, profile = snapshot.parameters, snapshot.profile
        measured = (profile.gradient, profile.weight, profile.ratio)
        for position in listed:
            if profile.present[position]:
                labels = [*_labels(run), parameters.names[position], f"{parameters.depth[position]:03d}"]
                for family, values in zip(self._of_parameters, measured, strict=True):
                    family.add_metric(labels, float(values[position]))


def _labels(run: Mapping[str, Any]) -> list[str]:
    return [run["id"], run["project"], run["name"]]


def _run_values(run: Mapping[str, Any]) -> dict[str, float]:
    values = {
        name: wire.deserialise(run["scalars"][scalar]) for scalar, name in _SCALARS.items() if scalar in run["scalars"]
    }
    values["gradwatch_run_stalled"] = float(run["state"] == "stalled")
    values["gradwatch_run_last_seen_timestamp_seconds"] = run["last_seen_at"]
    values["gradwatch_run_samples"] = run["sample_count"]
    if run["last_step"] is not None:
        values["gradwatch_run_step"] = run["last_step"]
    dropped = run["dropped"]
    return values | {
        "gradwatch_run_agent_dropped_samples": dropped.get("samples", 0),
        "gradwatch_run_agent_dropped_bytes": dropped.get("bytes", 0),
        "gradwatch_run_agent_errors": dropped.get("errors", 0),
    }


def _snapshot_values(scalars: Mapping[str, wire.Number], snapshot: Snapshot, listed: int) -> dict[str, float]:
    profile, ratios = snapshot.profile, snapshot.finite_ratios
    norm = wire.deserialise(scalars.get("global_grad_norm", float(np.linalg.norm(profile.gradient[profile.present]))))
    size = len(snapshot.parameters.names)
    return {
        "gradwatch_run_last_sample_timestamp_seconds": snapshot.sample.at,
        "gradwatch_run_global_grad_norm": norm,
        "gradwatch_run_clipped_global_grad_norm": wire.deserialise(scalars.get("clipped_global_grad_norm", norm)),
        "gradwatch_run_grad_weight_min_ratio": float(ratios.min()) if ratios.size else np.nan,
        "gradwatch_run_grad_weight_median_ratio": float(np.median(ratios)) if ratios.size else np.nan,
        "gradwatch_run_grad_weight_max_ratio": float(ratios.max()) if ratios.size else np.nan,
        "gradwatch_run_attenuation_decades_per_layer": snapshot.decades_per_layer,
        "gradwatch_run_clipped_parameters_ratio": snapshot.clipped_share,
        "gradwatch_run_parameters": size,
        "gradwatch_run_parameters_left_out": size - listed,
        "gradwatch_run_nonfinite_parameters": snapshot.nonfinite,
        "gradwatch_run_zero_parameters": snapshot.zero,
    }


Unhealthy = tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]


def _unhealthy(connection: sa.Connection, run_ids: Sequence[str]) -> Unhealthy:
    """Return how many parameters open alerts blame by (run, rule), and how many alerts fire by (run, severity)."""
    table = schema.alerts
    blamed: dict[tuple[str, str], int] = {}
    firing: dict[tuple[str, str], int] = defaultdict(int)
    query = sa.select(*table.c["run", "rule", "severity", "state", "parameters", "parameters_left_out"]).where(
        table.c.state.in_(("pending", "firing"))
    )
    for some in batched(run_ids):
        for row in connection.execute(query.where(table.c.run.in_(some))):
            blamed[row.run, row.rule] = len(row.parameters) + row.parameters_left_out
            firing[row.run, row.severity] += row.state == "firing"
    return blamed, firing


def _health_families(active: Sequence[dict[str, Any]], unhealthy: Unhealthy) -> Iterable[Metric]:
    blamed, firing = unhealthy
    parameters = GaugeMetricFamily(
        "gradwatch_run_unhealthy_parameters",
        "Parameters that an open alert of the rule blames.",
        labels=(*_RUN_LABELS, "rule"),
    )
    alerts = GaugeMetricFamily(
        "gradwatch_run_firing_alerts", "Alerts of the run that fire.", labels=(*_RUN_LABELS, "severity")
    )
    for run in active:
        for rule in SAMPLE_RULES:
            parameters.add_metric([*_labels(run), rule.name], blamed.get((run["id"], rule.name), 0))
        for severity in SEVERITIES:
            alerts.add_metric([*_labels(run), severity], firing.get((run["id"], severity), 0))
    return parameters, alerts


def _alerts(connection: sa.Connection) -> Metric:
    table = schema.alerts
    family = GaugeMetricFamily(
        "gradwatch_alerts", "Alerts by rule, severity and state.", labels=("rule", "severity", "state")
    )
    groups = table.c["rule", "severity", "state"]
    for row in connection.execute(sa.select(*groups, sa.func.count().label("alerts")).group_by(*groups)):
        family.add_metric([row.rule, row.severity, row.state], row.alerts)
    return family


class ServerCollector(Collector):
    """Collects the metrics of the server itself."""

    def __init__(self, services: Sources) -> None:
        self._services = services

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the metric families are not known before the scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yield the counts of this process, and the deliveries of all servers from the database."""
        services = self._services
        yield _build_info()
        yield _requests(services)
        yield from _ingest(services)
        yield from _queue(services)
        yield from _remote_write(services)
        yield _attempts(services)
        receivers = [receiver.name for receiver in services.settings.configuration.receivers]
        with services.engine.connect() as connection:
            yield from _deliveries(connection, receivers)


def _build_info() -> Metric:
    build = GaugeMetricFamily("gradwatch_build_info", "The version of the server; always 1.", labels=("version",))
    build.add_metric([__version__], 1)
    return build


def _ingest(services: Sources) -> Iterable[Metric]:
    ingest = services.ingest
    for name, text, count in (
        ("gradwatch_ingest_batches", "Batches stored.", ingest.batches),
        ("gradwatch_ingest_duplicate_batches", "Batches that were stored before.", ingest.duplicates),
        ("gradwatch_ingest_samples", "Samples stored.", ingest.samples),
        ("gradwatch_ingest_left_out_samples", "Samples that a later attempt has replaced already.", ingest.left_out),
        ("gradwatch_ingest_values", "Values of statistics stored.", ingest.values),
    ):
        yield CounterMetricFamily(name, text, value=count)


def _queue(services: Sources) -> Iterable[Metric]:
    writer = services.writer
    refused = writer.refused + services.byte_budget.refused
    yield CounterMetricFamily("gradwatch_queue_refusals", "Batches refused because a queue was full.", value=refused)
    yield SummaryMetricFamily(
        "gradwatch_commit_duration_seconds",
        "Duration of transactions, with their sync to disk.",
        count_value=writer.commits,
        sum_value=writer.commit_seconds,
    )
    yield GaugeMetricFamily("gradwatch_queued_batches", "Batches received and not stored yet.", value=writer.waiting)
    yield GaugeMetricFamily("gradwatch_queue_limit_batches", "Batches that the queue holds.", value=writer.capacity)
    held, limit = services.byte_budget.held_bytes, services.byte_budget.limit_bytes
    yield GaugeMetricFamily("gradwatch_held_bytes", "Bytes of bodies received and not stored yet.", value=held)
    yield GaugeMetricFamily("gradwatch_held_limit_bytes", "Bytes of bodies held at most.", value=limit)


def _requests(services: Sources) -> Metric:
    family = HistogramMetricFamily(
        "gradwatch_http_request_duration_seconds",
        "Time until a response began, by route.",
        labels=("method", "route", "status"),
    )
    for kind, tally in list(services.request_counts.tallies.items()):
        family.add_metric([kind.method, kind.route, str(kind.status)], tally.cumulative(), tally.seconds)
    return family


def _remote_write(services: Sources) -> Iterable[Metric]:
    if services.remote_writer is None:
        return
    counts = services.remote_writer.counts
    for name, text, count in (
        ("sent_samples", "Samples that the time-series store accepted.", counts.sent),
        ("set_aside_samples", "Samples that the time-series store refused.", counts.set_aside),
        ("skipped_samples", "Samples replaced or deleted before they were written.", counts.skipped),
        ("retries", "Requests that were sent again.", counts.retries),
        ("errors", "Rounds that ended in an unexpected error.", counts.errors),
    ):
        yield CounterMetricFamily(f"gradwatch_remote_write_{name}", text, value=count)


def _attempts(services: Sources) -> Metric:
    family = CounterMetricFamily(
        "gradwatch_delivery_attempts", "Delivery attempts by receiver and result.", labels=("receiver", "result")
    )
    for (receiver, result), count in list(services.notifier.results.items()):
        family.add_metric([receiver, result], count)
    return family


def _deliveries(connection: sa.Connection, receivers: Sequence[str]) -> Iterable[Metric]:
    table = schema.deliveries
    by_state = GaugeMetricFamily(
        "gradwatch_deliveries", "Deliveries by receiver and state.", labels=("receiver", "state")
    )
    groups = table.c["receiver", "state"]
    found = {(receiver, state): 0 for receiver in receivers for state in ("due", "delivered", "dead")}
    for row in connection.execute(sa.select(*groups, sa.func.count().label("made")).group_by(*groups)):
        found[row.receiver, row.state] = row.made
    for (receiver, state), count in found.items():
        by_state.add_metric([receiver, state], count)
    oldest = connection.execute(sa.select(sa.func.min(table.c.created_at)).where(table.c.state == "due")).scalar_one()
    lag = 0.0 if oldest is None else max(0.0, steady_clock.now() - oldest)
    text = "Age of the oldest delivery that is still due; 0 if none is."
    return by_state, GaugeMetricFamily("gradwatch_delivery_lag_seconds", text, value=lag)
