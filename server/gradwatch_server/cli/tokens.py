"""``gradwatch token``: create, list and revoke the tokens of a server's database."""

import argparse
import sys
import time
from collections.abc import Sequence

import sqlalchemy as sa

from gradwatch_server.cli.command import add_database_option, database_parser, open_database, print_line, run_command
from gradwatch_server.store import schema
from gradwatch_server.store.database import shown_address, writing
from gradwatch_server.store.tokens import create, revoke


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days between 0 and 1,000,000")
    return days


def _parser() -> argparse.ArgumentParser:
    parser = database_parser("token", "Create, list and revoke tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    creating = commands.add_parser("create", help="create a token and print it; it cannot be shown again")
    creating.add_argument("--scope", choices=["ingest", "read", "admin"], required=True, help="what it allows")
    creating.add_argument("--project", help="allow this project only (default: every project)")
    creating.add_argument("--days", type=_days, help="days until it expires (default: it does not expire)")
    commands.add_parser("list", help="list the tokens")
    commands.add_parser("revoke", help="revoke a token").add_argument("id", help="as `gradwatch token list` shows it")
    for subcommand in commands.choices.values():
        add_database_option(subcommand, argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch token``; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_command("token", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    work = {"create": _create, "list": _list_tokens, "revoke": _revoke}[options.command]
    with open_database(options, create=options.command == "create") as engine, writing(engine) as connection:
        return work(connection, options)


def _create(connection: sa.Connection, options: argparse.Namespace) -> int:
    token_id, token = create(connection, options.scope, options.project, options.days)
    database = shown_address(connection.engine)
    print_line(f"created token {token_id} in {database}; it cannot be shown again:", file=sys.stderr)
    print_line(token)
    return 0


def _revoke(connection: sa.Connection, options: argparse.Namespace) -> int:
    revoked = revoke(connection, options.id)
    print_line(f"revoked {options.id}" if revoked else f"no valid token has id {options.id!r}: gradwatch token list")
    return 0 if revoked else 1


def _list_tokens(connection: sa.Connection, _options: argparse.Namespace) -> int:
    for row in connection.execute(sa.select(schema.tokens).order_by(schema.tokens.c.created_at)):
        state = "revoked" if row.revoked_at else "expired" if (row.expires_at or 2e11) < time.time() else "valid"
        print_line(f"{row.id}  {row.scope:<7} {state:<8} {row.project or 'every project'}")
    return 0
