"""The services of one server process: made, started and stopped together."""

import asyncio
import math
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import msgspec
import sqlalchemy as sa
from starlette.requests import Request

from gradwatch_server import steady_clock
from gradwatch_server.alerting.periodic_checks import StallCheck, UnmuteCheck
from gradwatch_server.alerting.run_alerts import resolve_deleted
from gradwatch_server.errors import Refused
from gradwatch_server.ingest.admission import ByteBudget
from gradwatch_server.ingest.diagnosis_pool import LARGE_TIME_SHARE, DiagnosisPool
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.notify.notifier import Notifier
from gradwatch_server.settings import Configuration, Settings
from gradwatch_server.store import schema
from gradwatch_server.store.change_stream import ChangeStream
from gradwatch_server.store.database import read_clock, shrink_log
from gradwatch_server.store.deletion import ResolveAlerts, delete_expired_runs
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.rollups.downsampling import downsample_expired
from gradwatch_server.store.tokens import TokenCache
from gradwatch_server.telemetry.remote_write import RemoteWriter
from gradwatch_server.telemetry.request_counts import RequestCounts
from gradwatch_server.telemetry.snapshot import ParameterCache

_RETENTION_SECONDS = 3_600
_FOLLOW_SECONDS = 10.0
_SHRINK_SECONDS = 5.0


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Services:
    """The services that routes and metrics use."""

    settings: Settings
    engine: sa.Engine
    writer: Writer
    diagnosis_pool: DiagnosisPool
    ingest: Ingest
    byte_budget: ByteBudget
    notifier: Notifier
    stall_check: StallCheck
    unmute_check: UnmuteCheck
    change_stream: ChangeStream
    tokens: TokenCache
    read_slots: asyncio.Semaphore
    """Each read of the HTTP interface holds one."""
    remote_writer: RemoteWriter | None = None
    parameter_cache: ParameterCache = field(default_factory=ParameterCache)
    request_counts: RequestCounts = field(default_factory=RequestCounts)
    ready: bool = True
    """False from the first signal to stop: readiness ends first."""

    @classmethod
    def start(cls, settings: Settings, engine: sa.Engine) -> "Services":
        """Make the services; the writer runs from here on."""
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
            stall_check=StallCheck(engine, writer, configuration, settings.public_url, steady_clock.now()),
            unmute_check=UnmuteCheck(engine, writer, configuration, settings.public_url),
            change_stream=ChangeStream(engine),
            remote_writer=None if remote is None else RemoteWriter(engine, writer, remote),
            tokens=TokenCache(engine),
            read_slots=asyncio.Semaphore(limits.reads_at_once),
        )

    @classmethod
    def of(cls, request: Request) -> "Services":
        """Return the services of the application that a request came to."""
        return cast("Services", request.app.state.services)

    def reload(self, configuration: Configuration) -> None:
        """Use another configuration, which has been checked, from now on."""
        self.settings = msgspec.structs.replace(self.settings, configuration=configuration)
        public_url = self.settings.public_url
        limits = configuration.limits
        self.byte_budget.limit_bytes = limits.held_bytes
        self.read_slots = asyncio.Semaphore(limits.reads_at_once)  # reads that wait for one of the old ones get it
        self.writer.configure(limits.queued_batches, limits.queued_batches_per_run)
        self.ingest.configure(configuration, public_url)
        self.stall_check.configure(configuration, public_url)
        self.unmute_check.configure(configuration, public_url)
        self.notifier.configure(configuration.receivers, configuration.delivery)

    def alert_resolver(self) -> ResolveAlerts:
        """Return the function that resolves the alerts of a run that is deleted, by the present configuration."""
        return partial(resolve_deleted, configuration=self.settings.configuration, public_url=self.settings.public_url)

    def begin_shutdown(self) -> None:
        """Stop being ready, refuse further bodies, and end the streams, which would keep their connections open."""
        self.ready = False
        self.byte_budget.close()
        self.change_stream.close()

    async def follow_clock(self) -> None:
        """Follow the database's clock if servers may share it, for as long as the server runs."""
        while self.engine.dialect.name != "sqlite":
            with suppress(sa.exc.SQLAlchemyError):  # out of reach: the clock goes on by itself
                steady_clock.follow(await asyncio.to_thread(read_clock, self.engine))
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def shrink_log(self) -> None:
        """Keep SQLite's write-ahead log small, for as long as the server runs."""
        while self.engine.dialect.name == "sqlite":
            await asyncio.sleep(_SHRINK_SECONDS)
            with suppress(sqlite3.Error, OSError):  # somebody holds a snapshot: again in some seconds
                await asyncio.to_thread(shrink_log, self.engine)

    async def apply_retention(self) -> None:
        """Delete expired runs and levels, now and once an hour, for as long as the server runs."""
        while True:
            retention = self.settings.configuration.retention
            with suppress(Refused, sa.exc.SQLAlchemyError):  # queue full, or database out of reach: again in an hour
                await delete_expired_runs(self.engine, self.writer, retention, self.alert_resolver())
                await downsample_expired(self.engine, self.writer, retention)
            await asyncio.sleep(_RETENTION_SECONDS)


def _start_clock(engine: sa.Engine) -> None:
    """Start the clock no earlier than what earlier servers have stored."""
    latest = [sa.select(sa.func.max(column)) for column in (schema.runs.c.last_seen_at, schema.deliveries.c.created_at)]
    with engine.connect() as connection:
        stored = max(connection.scalar(each) or 0.0 for each in latest)
    steady_clock.start(read_clock(engine), stored)


@asynccontextmanager
async def run_services(settings: Settings, engine: sa.Engine) -> AsyncIterator[Services]:
    """Start the services of a server process and yield them; stop them at the end."""
    await asyncio.to_thread(_start_clock, engine)
    services = Services.start(settings, engine)
    notifying = asyncio.create_task(services.notifier.run())
    checks = (services.stall_check.run(), services.unmute_check.run())
    upkeep = (services.follow_clock(), services.shrink_log(), services.apply_retention())
    repeating = [asyncio.create_task(work) for work in (*upkeep, *checks)]
    exporting = None if services.remote_writer is None else asyncio.create_task(services.remote_writer.run())
    try:
        yield services
    finally:
        # 1. Periodic work can end anywhere: the next server goes on with it.
        for task in repeating:
            task.cancel()
        # 2. Deliveries that are under way are finished and recorded.
        services.notifier.stop()
        await notifying
        if exporting is not None:
            exporting.cancel()
            with suppress(asyncio.CancelledError):
                await exporting
        # 3. Batches that have been taken in are stored.
        await asyncio.to_thread(services.writer.close, services.settings.configuration.limits.drain_seconds)
        services.diagnosis_pool.close()
