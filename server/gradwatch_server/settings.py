"""Settings: the configuration file ``gradwatch.toml``, which is checked as a whole, and the command line."""

import math
import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec

from gradwatch import wire
from gradwatch.settings import secret
from gradwatch_server.diagnosis import Thresholds
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.notify.http_client import check_url
from gradwatch_server.notify.outbox import DeliverySettings
from gradwatch_server.notify.receivers import AnyReceiver
from gradwatch_server.store.rollups.retention import Retention

_LEAST_LIMITS = {"body_seconds": 0.001, "read_wait_seconds": 0.001, "drain_seconds": 0}
"""Least values of limits that are not 1."""
_MOST_LIMITS = {"samples_per_batch": wire.MOST_SAMPLES, "name_characters": wire.MOST_NAME_CHARACTERS}


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much a request and the server may hold; a request beyond a limit is refused, and the answer names it."""

    body_bytes: int = 8 * 1024 * 1024
    """Largest body as it arrives."""
    body_seconds: float = 60.0
    """Time in which a body has to arrive; beyond it: 408, and its bytes are released."""
    document_bytes: int = 64 * 1024
    """Largest body of any request that is not an agent's, such as a silence or a login."""
    decoded_bytes: int = 16 * 1024 * 1024
    """Largest body after decompression."""
    loose_bytes: int = 4 * 1024 * 1024
    """Largest part of a batch that is not packed vectors, which takes many times its size in memory; JSON has none."""
    parameters: int = 100_000
    """Most parameters a run may have."""
    name_characters: int = wire.MOST_NAME_CHARACTERS
    """Longest project, run, parameter or scalar name; at most 512, since names are in the keys of the database."""
    attribute_characters: int = 4_096
    """Longest value of an attribute of a run."""
    samples_per_batch: int = 1_000
    """Most samples in one batch."""
    scalars_per_batch: int = 100_000
    """Most values of scalars in one batch."""
    events_per_batch: int = 20_000
    """Most events in one batch."""
    scalar_names: int = 256
    """Most different scalar names in one batch, and names of histograms; most attributes of a run."""
    scalar_names_per_run: int = 2_000
    """Most different scalar names in one run, since each has roll-up levels of its own."""
    runs_per_project: int = 50_000
    """Most runs that a project has; beyond it no further one is registered: 429 with Retry-After."""
    queued_batches: int = 1_000
    """Batches that may wait for the writer; beyond it: 503 with Retry-After."""
    queued_batches_per_run: int = 16
    """Batches of one run that may wait; an agent sends the next after the answer. Beyond it: 429 with Retry-After."""
    reads_at_once: int = 1
    """Reads of the HTTP interface that run at the same time; the others wait in turn, and writes never do."""
    read_wait_seconds: float = 10.0
    """Longest time for which a read waits for its turn; beyond it: 429 with Retry-After."""
    held_bytes: int = 64 * 1024 * 1024
    """Bytes of all bodies that are being received or wait for the writer; beyond it: 503 with Retry-After."""
    drain_seconds: float = 10.0
    """Time in which a server that is stopping answers what it has taken in; it is not ready, but still listens."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            least, most = _LEAST_LIMITS.get(name, 1), _MOST_LIMITS.get(name, math.inf)
            if not least <= value <= most:
                bound = f"at least {least:g}" if value < least or most == math.inf else f"at most {most:,}"
                raise ValueError(f"{name} = {value} is not allowed: it is {bound}")
        if self.held_bytes < max(self.body_bytes, self.decoded_bytes):
            raise ValueError(
                f"held_bytes = {self.held_bytes} has no room for one body: it is at least body_bytes and decoded_bytes"
            )


class Connections(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many connections clients may have, and how long one may keep the server waiting; also without a token."""

    most: Annotated[int, msgspec.Meta(ge=2)] = 2_000
    """Most connections, and at most three quarters of the files that the process may open; beyond it the one is closed
    that has kept the server waiting longest."""
    header_bytes: Annotated[int, msgspec.Meta(ge=1_024)] = 65_536
    """Largest request line and headers together; beyond it: 431."""
    header_seconds: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    """Time in which the first request of a connection, and the rest of any request's headers, have to arrive."""
    idle_seconds: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """How long a connection stays open for the next request."""
    kept: Annotated[int, msgspec.Meta(ge=0)] = 1_000
    """Most connections of callers with a token that stay open for longer than that."""
    kept_seconds: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    """Age at which these are closed between two requests."""
    send_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """How long a client may take nothing of its response."""
    streams: Annotated[int, msgspec.Meta(ge=0)] = 500
    """Most event streams, one for each browser that has a page open; beyond it: 503 with Retry-After."""
    stream_seconds: Annotated[float, msgspec.Meta(gt=0)] = 3_600.0
    """Age at which an event stream ends; a page opens the next by itself."""
    stream_beat_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=3_600)] = 15.0
    """An event stream without news sends a beat this often; a page that misses two of them connects anew."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many parameters ``/metrics`` has series for; the metrics of runs are always there."""

    parameters: Literal["conspicuous", "all"] = "conspicuous"
    """Which parameters of each active run get series of their own."""
    conspicuous_parameters: Annotated[int, msgspec.Meta(ge=0)] = 10
    """How many parameters of each run get series, the most conspicuous ones."""
    most_parameters: Annotated[int, msgspec.Meta(ge=0)] = 20_000
    """Most parameters of all runs together; the others are left out, and ``/metrics`` says how many."""
    most_runs: Annotated[int, msgspec.Meta(ge=0)] = 1_000
    """Most active runs that have metrics, those that reported last; ``/metrics`` says how many are left out."""
    silent_seconds: Annotated[float, msgspec.Meta(gt=0)] = 86_400.0
    """A run that has not reported for so long is left out, though it has not ended; its alerts are still counted."""


class RemoteWrite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prometheus remote write: a time-series store that samples are written to, besides the database."""

    url: str
    """Such as ``http://prometheus:9090/api/v1/write``."""
    backlog_seconds: float = 3600.0
    """Age of the oldest samples of known runs that are sent to a store which was never written to before."""

    def __post_init__(self) -> None:
        check_url("remote_write.url", self.url)


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sends the alerts that match all three lists to some receivers; patterns may have ``*`` and ``?``."""

    receivers: list[str]
    """Names of receivers."""
    projects: Sequence[str] = ("*",)
    """Patterns of projects."""
    rules: Sequence[str] = ("*",)
    """Patterns of rules."""
    severities: Sequence[str] = ("*",)
    """Patterns of severities: ``warning``, ``critical``."""


class Project(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one project that differ from those of all projects."""

    rules: dict[str, dict[str, Any]] = {}
    """Thresholds by rule, which take precedence over those of all projects."""


class Configuration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The content of ``gradwatch.toml``."""

    public_url: str | None = None
    """Address at which people reach the page, such as ``https://gradwatch.example.org``; absent: where it listens, or
    this machine's name if it listens on all addresses."""
    limits: Limits = Limits()
    connections: Connections = Connections()
    metrics: Metrics = Metrics()
    remote_write: RemoteWrite | None = None
    delivery: DeliverySettings = DeliverySettings()
    retention: Retention = Retention()
    receivers: list[AnyReceiver] = []
    """Receivers of notifications of alerts."""
    routes: list[Route] = []
    """Which alerts go where; without any, every alert goes to every receiver."""
    rules: dict[str, dict[str, Any]] = {}
    """Thresholds by rule; see docs/diagnosis.md."""
    projects: dict[str, Project] = {}
    """Settings of single projects, by name."""

    def __post_init__(self) -> None:
        if self.public_url is not None:
            check_url("public_url", self.public_url)
        names = [receiver.name for receiver in self.receivers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two receivers are named {name!r}: give each its own name")
        for route in self.routes:
            for name in route.receivers:
                if name not in names:
                    raise ValueError(f"a route names receiver {name!r}, which is not among [[receivers]]: add it there")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the configuration file.

        Raises:
            ConfigurationError: the file cannot be read or something in it is wrong.
        """
        try:
            configuration = msgspec.convert(_with_environment(msgspec.toml.decode(path.read_bytes())), cls)
            configuration.check_rules()
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path}: {error}") from None
        return configuration

    def check_rules(self) -> None:
        """Check the thresholds of all projects.

        Raises:
            ValueError: a rule, a key or a value is not valid; the text names it.
        """
        Thresholds.from_table(self.rules)
        for name, project in self.projects.items():
            try:
                Thresholds.from_table(project.rules)
            except ValueError as error:
                raise ValueError(f"projects.{name}.{error}") from None

    @cached_property
    def thresholds(self) -> Mapping[str, Thresholds]:
        """Return project -> thresholds of its rules, of any project; the tables have been checked."""
        usual = Thresholds.from_table(self.rules)
        changed = {name: _merged(self.rules, project.rules) for name, project in self.projects.items()}
        own = {name: Thresholds.from_table(table) for name, table in changed.items()}
        return defaultdict(lambda: usual, own)


def _merged(tables: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {rule: tables.get(rule, {}) | changes.get(rule, {}) for rule in tables | changes}


def _with_environment(value: Any) -> Any:
    """Replace every text ``env:NAME`` by that environment variable: secrets stay out of the file."""
    if isinstance(value, dict):
        return {name: _with_environment(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_environment(inner) for inner in value]
    if not isinstance(value, str) or not value.startswith("env:"):
        return value
    name = value.removeprefix("env:")
    if name not in os.environ:
        raise ValueError(f"{value!r}: the environment variable {name!r} is not set: set it before the server starts")
    return os.environ[name]


DATABASE_URL_HELP = "sqlite:///FILE or postgresql://... (default: $GRADWATCH_DATABASE_URL or sqlite:///gradwatch.db)"


def resolve_database_url(given: str | None) -> str:
    """Return the address of the database: as given on the command line, else by the environment, else the default."""
    return given or secret(os.environ, "GRADWATCH_DATABASE_URL") or "sqlite:///gradwatch.db"


EVERY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104
"""Hosts at which a server listens on all addresses of its machine."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """All settings of one server process."""

    database_url: str
    host: str = "127.0.0.1"
    port: int = 8321
    configuration: Configuration = Configuration()

    @cached_property
    def public_url(self) -> str:
        """Return the address at which people reach the page; links in alerts and metrics begin with it.

        Nobody reaches a server at ``0.0.0.0``: links lead to this machine's name where it listens on all addresses.
        """
        if self.configuration.public_url is None and self.host in EVERY_ADDRESS:
            return f"http://{socket.gethostname()}:{self.port}"
        return (self.configuration.public_url or self.address).rstrip("/")

    @cached_property
    def address(self) -> str:
        """Return the address at which the server listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"
