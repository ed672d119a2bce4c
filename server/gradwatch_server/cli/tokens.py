"""``gradwatch token``: makes, lists and revokes the tokens of a server's database."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import sqlalchemy as sa

from gradwatch.settings import secret
from gradwatch_server.errors import DatabaseError
from gradwatch_server.store import schema
from gradwatch_server.store.database import database_errors, open_engine, prepare, writing
from gradwatch_server.store.tokens import create, revoke


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days between 0 and 1,000,000")
    return days


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradwatch token", description="Make, list and revoke tokens.")
    parser.add_argument("--database-url", help="(default: $GRADWATCH_DATABASE_URL or sqlite:///gradwatch.db)")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("create", help="make a token and print it, once")
    made.add_argument("--scope", choices=["ingest", "read", "admin"], required=True)
    made.add_argument("--project", help="allow this project alone (default: every project)")
    made.add_argument("--days", type=_days, help="how long it is valid (default: until it is revoked)")
    commands.add_parser("list", help="list the tokens")
    commands.add_parser("revoke", help="end a token").add_argument("id")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch token``; return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        engine = open_engine(
            given.database_url or secret(os.environ, "GRADWATCH_DATABASE_URL") or "sqlite:///gradwatch.db",
            create=given.command == "create",
        )
        prepare(engine)
        with database_errors(engine), writing(engine) as connection:
            return _run(connection, given, engine.url.render_as_string())
    except (DatabaseError, ValueError) as error:
        print(f"gradwatch token: {error}", file=sys.stderr)
        return 1


def _run(connection: sa.Connection, given: argparse.Namespace, database: str) -> int:
    if given.command == "create":
        token_id, token = create(connection, given.scope, given.project, given.days)
        print(f"made token {token_id} in {database}; it is shown this once:", file=sys.stderr)
        print(token)
        return 0
    if given.command == "revoke":
        found = revoke(connection, given.id)
        print(f"revoked {given.id}" if found else f"no valid token has id {given.id!r}: gradwatch token list")
        return 0 if found else 1
    for row in connection.execute(sa.select(schema.tokens).order_by(schema.tokens.c.created_at)):
        state = "revoked" if row.revoked_at else "expired" if (row.expires_at or 2e11) < time.time() else "valid"
        print(f"{row.id}  {row.scope:<7} {state:<8} {row.project or 'every project'}")
    return 0
