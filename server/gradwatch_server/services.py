"""The parts of one server process, made together and stopped together."""

import time
from dataclasses import dataclass, field

import msgspec
import sqlalchemy as sa

from gradwatch_server.exporter import Exporter
from gradwatch_server.feed import Feed
from gradwatch_server.ingest import Ingest
from gradwatch_server.notifier import Notifier
from gradwatch_server.requests import Requests
from gradwatch_server.settings import Configuration, Settings
from gradwatch_server.stalls import Stalls
from gradwatch_server.tokens import TokenBook
from gradwatch_server.untold import Untold
from gradwatch_server.writer import Writer


@dataclass
class Services:
    """What the routes use."""

    settings: Settings
    engine: sa.Engine
    writer: Writer
    ingest: Ingest
    notifier: Notifier
    stalls: Stalls
    untold: Untold
    feed: Feed
    tokens: TokenBook
    exporter: Exporter | None = None
    requests: Requests = field(default_factory=Requests)
    ready: bool = True
    """False from the first sign of stopping: readiness goes first."""

    @classmethod
    def start(cls, settings: Settings, engine: sa.Engine) -> "Services":
        """Make the parts; the writer runs from here on."""
        configuration = settings.configuration
        remote = configuration.remote_write
        writer = Writer(engine, configuration.limits.queued_batches)
        return cls(
            settings=settings,
            engine=engine,
            writer=writer,
            ingest=Ingest(configuration, settings.public_url),
            notifier=Notifier(engine, writer, configuration.receivers, configuration.delivery),
            stalls=Stalls(engine, writer, configuration, settings.public_url, time.time()),
            untold=Untold(engine, writer, configuration, settings.public_url),
            feed=Feed(engine),
            exporter=None if remote is None else Exporter(engine, remote),
            tokens=TokenBook(engine),
        )

    def reload(self, configuration: Configuration) -> None:
        """Go on with another configuration, checked already; limits of the writer's queue stay until the next start."""
        self.settings = msgspec.structs.replace(self.settings, configuration=configuration)
        self.ingest.configure(configuration)
        self.stalls.configure(configuration)
        self.untold.configure(configuration)
        self.notifier.configure(configuration.receivers, configuration.delivery)

    def stopping(self) -> None:
        """Take the first sign of the end: no longer ready, and no stream keeps a connection open."""
        self.ready = False
        self.feed.close()
