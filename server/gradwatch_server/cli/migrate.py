"""``gradwatch migrate``: migrate the schema of a database to this version."""

import argparse
import math
from collections.abc import Sequence
from typing import Final

from gradwatch_server.cli.command import database_parser, print_line, run_command
from gradwatch_server.settings import resolve_database_url
from gradwatch_server.store.database import migrate, open_engine, shown_address, wait_until_reachable

_LONGEST_WAIT_SECONDS: Final = 3600.0


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch migrate``; return the exit code."""
    parser = database_parser("migrate", "Migrate the schema of a database to this version.")
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long to wait for a database that takes no connection yet (default: 0)",
    )
    options = parser.parse_args(arguments)
    return run_command("migrate", lambda: _migrate(resolve_database_url(options.database_url), options.wait))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds <= _LONGEST_WAIT_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {_LONGEST_WAIT_SECONDS:g}")
    return seconds


def _migrate(url: str, wait_seconds: float) -> int:
    engine = open_engine(url)
    wait_until_reachable(engine, wait_seconds)
    migrate(engine)
    print_line(f"gradwatch migrate: {shown_address(engine)} has the schema of this version")
    engine.dispose()
    return 0
