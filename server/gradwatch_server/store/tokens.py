"""Tokens of the HTTP interface: how they are made, stored, checked and revoked.

A token is ``gwt_``, 40 random hexadecimal digits and 8 of a checksum, so that a mistyped one is recognised without the
database and a leaked one by scanners. Only its SHA-256 is stored. As long as no token was ever made, none is required.
"""

import hashlib
import secrets
import time
import zlib
from typing import Literal, NamedTuple

import sqlalchemy as sa

from gradwatch_server.errors import Refused
from gradwatch_server.store import schema

Scope = Literal["ingest", "read", "admin"]
PREFIX = "gwt_"
_CACHE_SECONDS = 2.0
"""A token that was made or revoked elsewhere takes effect within this time."""


class Grant(NamedTuple):
    """The permissions of a token."""

    scope: Scope
    project: str | None
    """None: every project."""
    expires_at: float | None
    revoked_at: float | None


EVERYTHING = Grant("admin", None, None, None)


def make_token() -> str:
    """Return a new token."""
    body = PREFIX + secrets.token_hex(20)
    return body + _checksum(body)


def well_formed(token: str) -> bool:
    """Return whether a text can be a token: whether its prefix, length and checksum are right."""
    return token.startswith(PREFIX) and len(token) == 52 and _checksum(token[:-8]) == token[-8:]


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class TokenCache:
    """The tokens of the database, cached for a moment."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._grants: dict[str, Grant] = {}
        self._read_at = 0.0

    @property
    def fresh(self) -> bool:
        """Return whether the cache is recent enough for ``check``."""
        return time.monotonic() < self._read_at + _CACHE_SECONDS and self._read_at > 0.0

    @property
    def required(self) -> bool:
        """Return whether requests need a token, which they do once one was made."""
        return bool(self._grants)

    def refresh(self) -> None:
        """Read the tokens from the database."""
        table = schema.tokens
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(*table.c["digest", "scope", "project", "expires_at", "revoked_at"]))
            self._grants = {row.digest: Grant(*row[1:]) for row in rows}
        self._read_at = time.monotonic()

    def check(self, token: str | None, scope: Scope, now: float) -> Grant:
        """Return the permissions of a token.

        Raises:
            Refused: 401 without a valid token, 403 where it does not allow this.
        """
        if not self.required:
            return EVERYTHING
        if token is None:
            raise Refused(
                401, "Token missing", "send 'Authorization: Bearer gwt_...': gradwatch token create makes one"
            )
        grant = self._grants.get(_digest(token)) if well_formed(token) else None
        if grant is None or grant.revoked_at is not None:
            raise Refused(401, "Token unknown", "the token is mistyped, revoked or of another server: make a new one")
        if grant.expires_at is not None and grant.expires_at <= now:
            raise Refused(401, "Token expired", "the token's time is over: gradwatch token create makes a new one")
        if grant.scope not in (scope, "admin"):
            raise Refused(403, "Scope missing", f"the token may {grant.scope}, this takes one with scope {scope!r}")
        return grant


def count_tokens(connection: sa.Connection) -> int:
    """Return how many tokens are valid now."""
    table = schema.tokens
    valid = sa.and_(
        table.c.revoked_at.is_(None), sa.or_(table.c.expires_at.is_(None), table.c.expires_at > time.time())
    )
    return int(connection.execute(sa.select(sa.func.count()).where(valid)).scalar_one())


def create(connection: sa.Connection, scope: Scope, project: str | None, days: float | None) -> tuple[str, str]:
    """Make a token; return its id and the token, of which only a digest is stored."""
    token, token_id, now = make_token(), secrets.token_hex(4), time.time()
    expires_at = None if days is None else now + days * 86_400
    connection.execute(
        sa.insert(schema.tokens).values(
            id=token_id, digest=_digest(token), scope=scope, project=project, created_at=now, expires_at=expires_at
        )
    )
    return token_id, token


def revoke(connection: sa.Connection, token_id: str) -> bool:
    """Revoke a token; return whether there was one that was not revoked yet."""
    table = schema.tokens
    ended = sa.update(table).where(table.c.id == token_id, table.c.revoked_at.is_(None))
    return connection.execute(ended.values(revoked_at=time.time())).rowcount > 0
