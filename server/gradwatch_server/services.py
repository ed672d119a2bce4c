"""The parts of one server process, made together and stopped together."""

import math
import os
import time
from dataclasses import dataclass, field
from functools import partial

import msgspec
import sqlalchemy as sa

from gradwatch_server.alerting.run_alerts import resolve_deleted
from gradwatch_server.alerting.stall_check import Stalls
from gradwatch_server.alerting.unmuted import Untold
from gradwatch_server.ingest.admission import ByteBudget
from gradwatch_server.ingest.diagnosis_pool import LARGE_TIME_SHARE, DiagnosisPool
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.notify.notifier import Notifier
from gradwatch_server.settings import Configuration, Settings
from gradwatch_server.store.change_stream import ChangeStream
from gradwatch_server.store.deletion import ResolveAlerts
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.tokens import TokenCache
from gradwatch_server.telemetry.remote_write import Exporter
from gradwatch_server.telemetry.request_counts import Requests
from gradwatch_server.telemetry.snapshot import Layouts


def _cores() -> int:
    """Return on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Services:
    """What the routes use."""

    settings: Settings
    engine: sa.Engine
    writer: Writer
    diagnosis_pool: DiagnosisPool
    ingest: Ingest
    byte_budget: ByteBudget
    notifier: Notifier
    stalls: Stalls
    untold: Untold
    change_stream: ChangeStream
    tokens: TokenCache
    exporter: Exporter | None = None
    layouts: Layouts = field(default_factory=Layouts)
    requests: Requests = field(default_factory=Requests)
    ready: bool = True
    """False from the first signal to stop: readiness ends first."""

    @classmethod
    def start(cls, settings: Settings, engine: sa.Engine) -> "Services":
        """Make the parts; the writer runs from here on."""
        configuration = settings.configuration
        remote, limits = configuration.remote_write, configuration.limits
        pool = DiagnosisPool(LARGE_TIME_SHARE if _cores() > 1 else math.inf)
        writer = Writer(engine, limits.queued_batches, limits.queued_batches_per_run)
        return cls(
            settings=settings,
            engine=engine,
            writer=writer,
            diagnosis_pool=pool,
            ingest=Ingest(configuration, settings.public_url, pool),
            byte_budget=ByteBudget(limits.held_bytes),
            notifier=Notifier(engine, writer, configuration.receivers, configuration.delivery),
            stalls=Stalls(engine, writer, configuration, settings.public_url, time.time()),
            untold=Untold(engine, writer, configuration, settings.public_url),
            change_stream=ChangeStream(engine),
            exporter=None if remote is None else Exporter(engine, writer, remote),
            tokens=TokenCache(engine),
        )

    def reload(self, configuration: Configuration) -> None:
        """Go on with another configuration, checked already."""
        self.settings = msgspec.structs.replace(self.settings, configuration=configuration)
        public_url = self.settings.public_url
        limits = configuration.limits
        self.byte_budget.limit_bytes = limits.held_bytes
        self.writer.configure(limits.queued_batches, limits.queued_batches_per_run)
        self.ingest.configure(configuration, public_url)
        self.stalls.configure(configuration, public_url)
        self.untold.configure(configuration, public_url)
        self.notifier.configure(configuration.receivers, configuration.delivery)

    def alert_resolver(self) -> ResolveAlerts:
        """Return the function that resolves the alerts of a run that is deleted, by the present configuration."""
        return partial(resolve_deleted, configuration=self.settings.configuration, public_url=self.settings.public_url)

    def begin_shutdown(self) -> None:
        """Stop being ready, refuse further bodies, and end the streams, which would keep their connections open."""
        self.ready = False
        self.byte_budget.close()
        self.change_stream.close()
