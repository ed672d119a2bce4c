"""The parts of one server process, made together and stopped together."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import sqlalchemy as sa

from gradwatch_server.alerting.periodic_checks import StallCheck, UnmuteCheck
from gradwatch_server.errors import Refused
from gradwatch_server.ingest.admission import Room, Share
from gradwatch_server.ingest.diagnosis_pool import LARGE_SHARE, Examiner
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.notify.notifier import Notifier
from gradwatch_server.settings import Configuration, Settings
from gradwatch_server.store.change_stream import Feed
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.tokens import TokenBook
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
    examiner: Examiner
    ingest: Ingest
    room: Room
    notifier: Notifier
    stall_check: StallCheck
    unmute_check: UnmuteCheck
    feed: Feed
    tokens: TokenBook
    exporter: Exporter | None = None
    layouts: Layouts = field(default_factory=Layouts)
    requests: Requests = field(default_factory=Requests)
    ready: bool = True
    """False from the first sign of stopping: readiness goes first."""

    @classmethod
    def start(cls, settings: Settings, engine: sa.Engine) -> "Services":
        """Make the parts; the writer runs from here on."""
        configuration = settings.configuration
        remote, limits = configuration.remote_write, configuration.limits
        examiner = Examiner(LARGE_SHARE if _cores() > 1 else math.inf)
        writer = Writer(engine, limits.queued_batches, limits.queued_batches_per_run)
        return cls(
            settings=settings,
            engine=engine,
            writer=writer,
            examiner=examiner,
            ingest=Ingest(configuration, settings.public_url, examiner),
            room=Room(limits.held_bytes),
            notifier=Notifier(engine, writer, configuration.receivers, configuration.delivery),
            stall_check=StallCheck(engine, writer, configuration, settings.public_url, time.time()),
            unmute_check=UnmuteCheck(engine, writer, configuration, settings.public_url),
            feed=Feed(engine),
            exporter=None if remote is None else Exporter(engine, writer, remote),
            tokens=TokenBook(engine),
        )

    def reload(self, configuration: Configuration) -> None:
        """Go on with another configuration, checked already."""
        self.settings = msgspec.structs.replace(self.settings, configuration=configuration)
        public_url = self.settings.public_url
        limits = configuration.limits
        self.room.most = limits.held_bytes
        self.writer.configure(limits.queued_batches, limits.queued_batches_per_run)
        self.ingest.configure(configuration, public_url)
        self.stall_check.configure(configuration, public_url)
        self.unmute_check.configure(configuration, public_url)
        self.notifier.configure(configuration.receivers, configuration.delivery)

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Hold what a request brings, for as long as it takes.

        Raises:
            Refused: 503, the server is stopping.
        """
        if not self.ready:
            raise Refused(503, "Stopping", "the server is stopping: send it again", retry_after_seconds=2)
        with self.room.share() as share:
            yield share

    def stopping(self) -> None:
        """Take the first sign of the end: no longer ready, and no stream keeps a connection open."""
        self.ready = False
        self.feed.close()
