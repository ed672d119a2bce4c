"""The first schema."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from gradwatch_server.store.schema import Floats

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False, comment="Unix milliseconds"),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("last_seen_at", sa.Double(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=True),
        sa.Column(
            "diagnosed_step",
            sa.BigInteger(),
            nullable=True,
            comment="last sample that the rules have seen in this attempt",
        ),
        sa.Column("sample_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("usual_interval_seconds", sa.Double(), nullable=True, comment="between samples, smoothed"),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("status", sa.Text(), nullable=True, comment="completed, failed or killed"),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("parameter_count", sa.Integer(), nullable=False),
        sa.Column(
            "attempt_first_step",
            sa.BigInteger(),
            nullable=True,
            comment="from here on everything is of this attempt",
        ),
        sa.Column("statistics", JSON, nullable=False, comment="every statistic that was ever measured"),
        sa.Column("coverage", JSON, nullable=False, comment="how far the levels of each lane reach, see levels.py"),
        sa.Column("attributes", JSON, nullable=False),
        sa.Column("dropped", JSON, nullable=False),
        sa.Column(
            "scalars",
            JSON,
            nullable=False,
            comment="the latest value of each scalar",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
    )
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_runs_last_seen_at"), ["last_seen_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_runs_project_last_seen_at"), ["project", "last_seen_at"], unique=False)

    op.create_table(
        "alerts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, comment="pending, firing or resolved"),
        sa.Column("held", sa.Integer(), nullable=False, comment="samples in a row that it held"),
        sa.Column("clear", sa.Integer(), nullable=False, comment="samples in a row that it did not"),
        sa.Column("hold_samples", sa.Integer(), nullable=False, comment="samples in a row that it takes to fire"),
        sa.Column("clear_samples", sa.Integer(), nullable=False, comment="samples in a row that it takes to resolve"),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("fired_step", sa.BigInteger(), nullable=True),
        sa.Column("resolved_step", sa.BigInteger(), nullable=True),
        sa.Column("first_at", sa.Double(), nullable=False),
        sa.Column("fired_at", sa.Double(), nullable=True),
        sa.Column("resolved_at", sa.Double(), nullable=True),
        sa.Column("resolution", sa.Text(), nullable=True, comment="why it ended"),
        sa.Column("flaps", sa.Integer(), server_default="0", nullable=False, comment="times it came back soon"),
        sa.Column("muted", sa.Text(), nullable=True, comment="why it was not told; none: it was"),
        sa.Column("acknowledged_at", sa.Double(), nullable=True),
        sa.Column("acknowledged_by", sa.Text(), nullable=True),
        sa.Column("parameters", JSON, nullable=False),
        sa.Column("parameters_left_out", sa.Integer(), nullable=False),
        sa.Column("evidence", JSON, nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("remedy", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_alerts_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alerts")),
    )
    with op.batch_alter_table("alerts", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_alerts_first_at_id"), ["first_at", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_alerts_run_state"), ["run", "state"], unique=False)
        batch_op.create_index(batch_op.f("ix_alerts_state"), ["state"], unique=False)

    op.create_table(
        "batches",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_batches_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "rank", "id", name=op.f("pk_batches")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("parameter", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_events_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_events_run_step"), ["run", "step"], unique=False)

    op.create_table(
        "parameters",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False, comment="index into every vector of the run"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("shape", JSON, nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("trainable", sa.Boolean(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_parameters_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "position", name=op.f("pk_parameters")),
    )
    op.create_table(
        "samples",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("level", sa.SmallInteger(), nullable=False, comment="0: as measured; above: a bucket of them"),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=True, comment="of a bucket, whose numbers are in rollups"),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("scalars", JSON, nullable=True),
        sa.Column("histograms", JSON, nullable=True),
        sa.Column("grad_norm", Floats(), nullable=True),
        sa.Column("clipped_grad_norm", Floats(), nullable=True),
        sa.Column("weight_norm", Floats(), nullable=True),
        sa.Column("max_unit_ratio", Floats(), nullable=True),
        sa.Column("zero_unit_share", Floats(), nullable=True),
        sa.Column("nonfinite_count", Floats(), nullable=True),
        sa.Column("clipped_unit_share", Floats(), nullable=True),
        sa.Column("update_norm", Floats(), nullable=True),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_samples_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "level", "step", name=op.f("pk_samples")),
    )
    op.create_table(
        "rollups",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("statistic", sa.Text(), nullable=False),
        sa.Column("level", sa.SmallInteger(), nullable=False, comment="1 and above"),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False, comment="first of the bucket"),
        sa.Column("low", Floats(), nullable=False),
        sa.Column("high", Floats(), nullable=False),
        sa.Column("mean", Floats(), nullable=False),
        sa.Column("last", Floats(), nullable=False),
        sa.Column("finite", Floats(), nullable=False, comment="finite values; one number where all parameters agree"),
        sa.Column("nonfinite", Floats(), nullable=False, comment="NaN and infinite values; likewise"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_rollups_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "statistic", "level", "step", name=op.f("pk_rollups")),
    )
    op.create_table(
        "trails",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("batch", sa.Text(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("arrival", sa.BigInteger(), nullable=False, comment="order of the run's batches"),
        sa.Column("scalars", sa.LargeBinary(), nullable=False, comment="MessagePack: name -> steps, values"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_trails_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "first_step", "rank", "batch", name=op.f("pk_trails")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "scalars",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("level", sa.SmallInteger(), nullable=False, comment="1 and above; level 0 is in trails"),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False, comment="first of the bucket"),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("low", sa.Double(), nullable=True, comment="none: NaN"),
        sa.Column("high", sa.Double(), nullable=True, comment="none: NaN"),
        sa.Column("mean", sa.Double(), nullable=True, comment="none: NaN"),
        sa.Column("last", sa.Double(), nullable=True, comment="none: NaN"),
        sa.Column("finite", sa.BigInteger(), nullable=False),
        sa.Column("nonfinite", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_scalars_run_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "name", "level", "step", name=op.f("pk_scalars")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "transitions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("alert", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, comment="order within the alert"),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False, comment="the JSON that is delivered"),
        sa.ForeignKeyConstraint(["alert"], ["alerts.id"], name=op.f("fk_transitions_alert_alerts"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transitions")),
        sa.UniqueConstraint("alert", "number", name=op.f("uq_transitions_alert_number")),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Text(), nullable=False, comment="the webhook-id, constant over retries"),
        sa.Column("transition", sa.Text(), nullable=False),
        sa.Column("alert", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, comment="order within the alert"),
        sa.Column("receiver", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, comment="due, delivered or dead"),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.Column("leased_until", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("delivered_at", sa.Double(), nullable=True),
        sa.Column("error", sa.Text(), server_default="", nullable=False, comment="what the last attempt failed on"),
        sa.ForeignKeyConstraint(["alert"], ["alerts.id"], name=op.f("fk_deliveries_alert_alerts"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["transition"], ["transitions.id"], name=op.f("fk_deliveries_transition_transitions"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_deliveries_created_at_id"), ["created_at", "id"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_deliveries_alert_receiver_number"), ["alert", "receiver", "number"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_deliveries_receiver_state_due_at"), ["receiver", "state", "due_at"], unique=False
        )

    op.create_table(
        "silences",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False, comment="pattern, as run and rule"),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ends_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_silences")),
    )
    with op.batch_alter_table("silences", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_silences_ends_at"), ["ends_at"], unique=False)

    op.create_table(
        "disabled_receivers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_disabled_receivers")),
    )

    op.create_table(
        "tokens",
        sa.Column("id", sa.Text(), nullable=False, comment="for people: to list and revoke"),
        sa.Column("digest", sa.Text(), nullable=False, comment="SHA-256 of the token"),
        sa.Column("scope", sa.Text(), nullable=False, comment="ingest, read or admin"),
        sa.Column("project", sa.Text(), nullable=True, comment="none: every project"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_tokens_digest")),
    )
    op.create_table(
        "attempts",
        sa.Column("delivery", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True, comment="HTTP status; none: no answer"),
        sa.Column("error", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["delivery"], ["deliveries.id"], name=op.f("fk_attempts_delivery_deliveries"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("delivery", "number", name=op.f("pk_attempts")),
    )
