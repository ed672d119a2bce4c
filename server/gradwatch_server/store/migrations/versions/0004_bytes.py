"""Read vectors from PostgreSQL as the bytes that it holds, if the role is a superuser; this makes maps faster.

``array_send`` makes a message of each element. ``byteasend`` copies what it is given, but only a superuser may declare
a function by that name; for other roles the function is an alias of ``array_send``. Readers tell the two forms apart.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004_bytes"
down_revision = "0003_uncompressed"

_DECLARED = "CREATE FUNCTION gradwatch_bytes(real[]) RETURNS bytea IMMUTABLE STRICT PARALLEL SAFE "
_HELD = _DECLARED + "LANGUAGE internal AS 'byteasend'"
_SENT = _DECLARED + "LANGUAGE sql RETURN array_send($1)"
_LITTLE_ENDIAN = "SELECT gradwatch_bytes('{1}') = '\\x0100000000000000bc02000001000000010000000000803f'::bytea"


def upgrade() -> None:
    """Declare the function in its fast form if that is allowed and the server is little-endian."""
    connection = op.get_bind()
    if connection.dialect.name != "postgresql":
        return
    superuser = connection.scalar(sa.text("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))
    op.execute(_HELD if superuser else _SENT)
    if superuser and not connection.scalar(sa.text(_LITTLE_ENDIAN)):
        op.execute("DROP FUNCTION gradwatch_bytes(real[])")
        op.execute(_SENT)
