"""Database schema: the tables. Every large one has a key that begins with the run."""

from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from gradwatch.wire import STATISTICS


class _RealArray(UserDefinedType[NDArray[np.float32]]):
    """``real[]``; vectors.py converts it between numpy and the driver."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the column's type in SQL."""
        return "REAL[]"


class Floats(TypeDecorator[NDArray[np.float32]]):
    """A float32 vector: ``real[]`` on PostgreSQL, packed little-endian bytes on SQLite; NaN and Inf stay exact."""

    impl = sa.LargeBinary
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> TypeEngine[Any]:
        """Return the column type of the engine in use."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(_RealArray())
        return dialect.type_descriptor(sa.LargeBinary())

    def process_bind_param(self, value: NDArray[np.float32] | None, dialect: sa.Dialect) -> Any:
        """Return the value in the form that the driver takes."""
        if value is None or dialect.name == "postgresql":
            return value
        return value.astype("<f4", copy=False).tobytes()

    def process_result_value(self, value: bytes | NDArray[np.float32] | None, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Return a float32 vector."""
        return np.frombuffer(value, "<f4") if isinstance(value, bytes) else value


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Scalars(TypeDecorator[dict[str, Any]]):
    """name -> number, as floats: PostgreSQL's JSONB returns whole numbers as integers of any size."""

    impl = sa.JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> TypeEngine[Any]:
        """Return the column type of the engine in use."""
        return dialect.type_descriptor(postgresql.JSONB() if dialect.name == "postgresql" else sa.JSON())

    def process_result_value(self, value: dict[str, Any] | None, dialect: sa.Dialect) -> dict[str, Any] | None:  # noqa: ARG002
        """Return name -> number, those that are not finite as text."""
        if value is None:
            return None
        return {name: number if isinstance(number, str) else float(number) for name, number in value.items()}


_json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def _run() -> sa.Column[str]:
    return sa.Column("run", sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)


runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("attempt", sa.BigInteger, nullable=False, comment="Unix milliseconds"),
    sa.Column(
        "attempts",
        _json,
        nullable=False,
        server_default="{}",
        comment="numbers of agents whose clock goes wrong -> start of the attempt by the server's clock",
    ),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("last_seen_at", sa.Double, nullable=False),
    sa.Column("last_step", sa.BigInteger),
    sa.Column("diagnosed_step", sa.BigInteger, comment="last sample that the rules have seen in this attempt"),
    sa.Column("sample_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("usual_interval_seconds", sa.Double, comment="between samples, smoothed"),
    sa.Column("finished_at", sa.Double),
    sa.Column("status", sa.Text, comment="completed, failed or killed"),
    sa.Column("exit_code", sa.Integer),
    sa.Column("deleted_at", sa.Double, comment="since then it is being deleted"),
    sa.Column("parameter_count", sa.Integer, nullable=False),
    sa.Column(
        "first_steps",
        _json,
        nullable=False,
        server_default="{}",
        comment="attempt -> its first step: from there on nothing is of an older one, see batch_store.py",
    ),
    sa.Column(
        "orders",
        _json,
        nullable=False,
        server_default="{}",
        comment="attempt -> segments of the run's parameters, where it lists them in another order",
    ),
    sa.Column("statistics", _json, nullable=False, comment="every statistic that was ever measured"),
    sa.Column("coverage", _json, nullable=False, comment="how far the levels of each series reach, see levels.py"),
    sa.Column("attributes", _json, nullable=False),
    sa.Column("dropped", _json, nullable=False),
    sa.Column("scalars", Scalars, nullable=False, comment="the latest value of each scalar"),
    sa.Column(
        "scalar_steps", _json, nullable=False, server_default="{}", comment="at which steps of this attempt these were"
    ),
    sa.Column(
        "memory_mark",
        sa.Text,
        comment="changes with the detector state of the run; none: since before that was saved",
    ),
    sa.Column(
        "arrivals", sa.BigInteger, nullable=False, server_default="0", comment="number of the sample stored last"
    ),
    sa.Index(None, "project", "last_seen_at"),
    sa.Index(None, "last_seen_at"),
)

parameters = sa.Table(
    "parameters",
    metadata,
    _run(),
    sa.Column("position", sa.Integer, primary_key=True, comment="index into every vector of the run"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("shape", _json, nullable=False),
    sa.Column("dtype", sa.Text, nullable=False),
    sa.Column("depth", sa.Integer, nullable=False),
    sa.Column("units", sa.BigInteger, nullable=False),
    sa.Column("trainable", sa.Boolean, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
)

samples = sa.Table(
    "samples",
    metadata,
    _run(),
    sa.Column("level", sa.SmallInteger, primary_key=True, comment="0: as measured; above: a bucket of them"),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("last_step", sa.BigInteger, comment="of a bucket, whose numbers are in rollups"),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("scalars", Scalars),
    sa.Column("histograms", _json),
    *(sa.Column(name, Floats) for name in STATISTICS),
    sa.Column("arrival", sa.BigInteger, comment="order of the run's samples, from 1 on"),
)
sa.Index(  # on PostgreSQL of the partition that holds the samples: no bucket has a number
    "ix_samples_arrivals", *samples.c["run", "arrival"], sqlite_where=samples.c.arrival.is_not(None)
).ddl_if(dialect="sqlite")
sa.Index(  # of SQLite alone: the buckets of a level lie far apart among the samples, in PostgreSQL in a partition
    "ix_samples_spans", *samples.c["run", "level", "step", "last_step"], sqlite_where=samples.c.level > 0
).ddl_if(dialect="sqlite")

rollups = sa.Table(
    "rollups",
    metadata,
    _run(),
    sa.Column("statistic", sa.Text, primary_key=True),
    sa.Column("level", sa.SmallInteger, primary_key=True, comment="1 and above"),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False, comment="first of the bucket"),
    *(sa.Column(name, Floats, nullable=False) for name in ("low", "high", "mean", "last")),
    sa.Column("finite", Floats, nullable=False, comment="finite values; one number where all parameters agree"),
    sa.Column("nonfinite", Floats, nullable=False, comment="NaN and infinite values; likewise"),
)

trails = sa.Table(
    "trails",
    metadata,
    _run(),
    sa.Column("first_step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rank", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("batch", sa.Text, primary_key=True),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("arrival", sa.BigInteger, nullable=False, comment="order of the run's batches"),
    sa.Column("scalars", sa.LargeBinary, nullable=False, comment="MessagePack: name -> steps, values"),
    sqlite_with_rowid=False,
)

scalars = sa.Table(
    "scalars",
    metadata,
    _run(),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("level", sa.SmallInteger, primary_key=True, comment="1 and above; level 0 is in trails"),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False, comment="first of the bucket"),
    sa.Column("last_step", sa.BigInteger, nullable=False),
    *(sa.Column(name, sa.Double, comment="none: NaN") for name in ("low", "high", "mean", "last")),
    sa.Column("finite", sa.BigInteger, nullable=False),
    sa.Column("nonfinite", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

batches = sa.Table(
    "batches",
    metadata,
    _run(),
    sa.Column("rank", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sqlite_with_rowid=False,
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("run", sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("parameter", sa.Text),
    sa.Index(None, "run", "step"),
)

alerts = sa.Table(
    "alerts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column(
        "run",
        sa.ForeignKey("runs.id", ondelete="CASCADE"),
        comment="none: deleted, its resolution is not delivered",
    ),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("severity", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, comment="pending, firing or resolved"),
    sa.Column("held", sa.Integer, nullable=False, comment="samples in a row in which it held"),
    sa.Column("clear", sa.Integer, nullable=False, comment="samples in a row in which it did not"),
    sa.Column("hold_samples", sa.Integer, nullable=False, comment="samples in a row that it takes to fire"),
    sa.Column("clear_samples", sa.Integer, nullable=False, comment="samples in a row that it takes to resolve"),
    sa.Column("first_step", sa.BigInteger, nullable=False),
    sa.Column("fired_step", sa.BigInteger),
    sa.Column("resolved_step", sa.BigInteger),
    sa.Column("first_at", sa.Double, nullable=False),
    sa.Column("fired_at", sa.Double),
    sa.Column("resolved_at", sa.Double),
    sa.Column("resolution", sa.Text, comment="why it ended"),
    sa.Column("flaps", sa.Integer, nullable=False, server_default="0", comment="times it came back soon after"),
    sa.Column("muted", sa.Text, comment="why nobody was notified; none: the receivers were"),
    sa.Column("acknowledged_at", sa.Double),
    sa.Column("acknowledged_by", sa.Text),
    sa.Column("parameters", _json, nullable=False),
    sa.Column("parameters_left_out", sa.Integer, nullable=False),
    sa.Column("evidence", _json, nullable=False),
    sa.Column("summary", sa.Text, nullable=False),
    sa.Column("cause", sa.Text, nullable=False),
    sa.Column("remedy", sa.Text, nullable=False),
    sa.Index(None, "run", "state"),
    sa.Index(None, "state"),
    sa.Index(None, "first_at", "id"),
)

transitions = sa.Table(
    "transitions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("alert", sa.ForeignKey("alerts.id", ondelete="CASCADE"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False, comment="order within the alert"),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("severity", sa.Text, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("payload", sa.Text, nullable=False, comment="the JSON that is delivered"),
    sa.UniqueConstraint("alert", "number"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="the webhook-id, constant over retries"),
    sa.Column("transition", sa.ForeignKey("transitions.id", ondelete="CASCADE"), nullable=False),
    sa.Column("alert", sa.ForeignKey("alerts.id", ondelete="CASCADE"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False, comment="order within the alert"),
    sa.Column("receiver", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, comment="due, delivered or dead"),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("attempts_before", sa.Integer, nullable=False, server_default="0", comment="before the last replay"),
    sa.Column("due_at", sa.Double, nullable=False),
    sa.Column("leased_until", sa.Double, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("delivered_at", sa.Double),
    sa.Column("error", sa.Text, nullable=False, server_default="", comment="what the last attempt failed on"),
    sa.Column("fingerprint", sa.Text, nullable=False, server_default="", comment="of run and rule"),
    sa.Column("sequence", sa.BigInteger, nullable=False, server_default="0", comment="order within the fingerprint"),
    sa.Index(None, "fingerprint", "receiver", "sequence"),
    sa.Index(None, "receiver", "state", "due_at"),
    sa.Index(None, "alert", "receiver", "number"),
    sa.Index(None, "created_at", "id"),
)

silences = sa.Table(
    "silences",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("project", sa.Text, nullable=False, comment="pattern, as run and rule"),
    sa.Column("run", sa.Text, nullable=False),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("comment", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("ends_at", sa.Double, nullable=False),
    sa.Index(None, "ends_at"),
)

disabled_receivers = sa.Table(
    "disabled_receivers",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="for people: to list and revoke"),
    sa.Column("digest", sa.Text, nullable=False, unique=True, comment="SHA-256 of the token"),
    sa.Column("scope", sa.Text, nullable=False, comment="ingest, read or admin"),
    sa.Column("project", sa.Text, comment="none: every project"),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
)

detector_states = sa.Table(
    "memories",
    metadata,
    _run(),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("step", sa.BigInteger, comment="of the last sample in it"),
    sa.Column("version", sa.Integer, nullable=False, comment="of the bytes; another one is replayed"),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

remote_write_positions = sa.Table(
    "written",
    metadata,
    sa.Column("run", sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("store", sa.Text, primary_key=True, comment="digest of the address that is written to"),
    sa.Column("arrival", sa.BigInteger, nullable=False, server_default="0", comment="of the last sample dealt with"),
)

remote_write_stores = sa.Table(
    "remote_write_stores",
    metadata,
    sa.Column("store", sa.Text, primary_key=True, comment="digest of the address that is written to"),
    sa.Column("since", sa.Double, nullable=False, comment="when it was first written to"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("delivery", sa.ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("status", sa.Integer, comment="HTTP status; none: no answer"),
    sa.Column("error", sa.Text, nullable=False),
)
