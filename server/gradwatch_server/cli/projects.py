"""``gradwatch projects``: what each project takes of the database."""

from collections.abc import Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from gradwatch_server.cli.command import database_parser, open_database, print_line, run_command
from gradwatch_server.store.database import size_bytes
from gradwatch_server.store.runs import sum_up_projects

_HEAD = ("runs", "unfinished", "samples", "values", "share", "about MB", "last heard of (UTC)", "project")


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch projects``; return the exit code."""
    purpose = "List the projects, the largest first; MB are the database's size by each one's share of all values."
    options = database_parser("projects", purpose).parse_args(arguments)

    def work() -> int:
        with open_database(options) as engine, engine.connect() as connection:
            rows = [_HEAD, *_described(connection)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for *numbers, project in rows:
            cells = [text.rjust(width) for text, width in zip(numbers, widths, strict=False)]
            print_line("  ".join([*cells, project]))
        return 0

    return run_command("projects", work)


def _described(connection: sa.Connection) -> list[tuple[str, ...]]:
    projects, size = sum_up_projects(connection), size_bytes(connection)
    whole = sum(int(row.measured) for row in projects) or 1
    return [
        (
            f"{row.runs:,}",
            f"{row.unfinished:,}",
            f"{int(row.samples):,}",
            f"{int(row.measured):,}",
            f"{int(row.measured) / whole:.1%}",
            f"{size * int(row.measured) / whole / 1e6:,.1f}",
            f"{datetime.fromtimestamp(row.last_seen_at, UTC):%Y-%m-%d %H:%M}",
            row.project,
        )
        for row in projects
    ]
