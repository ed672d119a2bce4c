"""Order deliveries by what receivers identify, the run and the rule, rather than by the single alert."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0014_fingerprints"
down_revision = "0013_arrivals"

_deliveries = sa.table("deliveries", *map(sa.column, ("alert", "fingerprint")))
_SEQUENCE = """
    UPDATE deliveries SET sequence = (
        SELECT count(DISTINCT before.transition) FROM deliveries AS before
        WHERE before.fingerprint = deliveries.fingerprint AND (
            before.created_at < deliveries.created_at
            OR (before.created_at = deliveries.created_at AND before.alert = deliveries.alert
                AND before.number <= deliveries.number)
        )
    )
"""


def upgrade() -> None:
    """Add the columns; the alerts of a run that is deleted are told apart by their own ids."""
    op.add_column("deliveries", sa.Column("fingerprint", sa.Text(), nullable=False, server_default=""))
    op.add_column("deliveries", sa.Column("sequence", sa.BigInteger(), nullable=False, server_default="0"))
    connection = op.get_bind()
    alerts = sa.text("SELECT id, run, rule FROM alerts WHERE id IN (SELECT alert FROM deliveries)")
    known = [
        {
            "of": row.id,
            "to": row.id if row.run is None else hashlib.sha256(f"{row.run}/{row.rule}".encode()).hexdigest()[:16],
        }
        for row in connection.execute(alerts)
    ]
    if known:
        change = sa.update(_deliveries).where(_deliveries.c.alert == sa.bindparam("of"))
        connection.execute(change.values(fingerprint=sa.bindparam("to")), known)
    op.create_index(
        "ix_deliveries_fingerprint_receiver_sequence", "deliveries", ["fingerprint", "receiver", "sequence"]
    )
    op.execute(_SEQUENCE)
