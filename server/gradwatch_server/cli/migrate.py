"""``gradwatch migrate``: migrate the schema of a database to this version."""

from collections.abc import Sequence

from gradwatch_server.cli.command import database_parser, print_line, run_command
from gradwatch_server.settings import resolve_database_url
from gradwatch_server.store.database import migrate, open_engine, shown_address


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch migrate``; return the exit code."""
    parser = database_parser("migrate", "Migrate the schema of a database to this version.")
    options = parser.parse_args(arguments)
    return run_command("migrate", lambda: _migrate(resolve_database_url(options.database_url)))


def _migrate(url: str) -> int:
    engine = open_engine(url)
    migrate(engine)
    print_line(f"gradwatch migrate: {shown_address(engine)} has the schema of this version")
    engine.dispose()
    return 0
