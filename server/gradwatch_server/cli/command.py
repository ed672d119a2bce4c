"""Common parts of the subcommands: their options, the database that they open, and errors as exit codes."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import sqlalchemy as sa

from gradwatch.settings import SettingsError
from gradwatch_server.errors import GradwatchError
from gradwatch_server.plain_text import visible
from gradwatch_server.settings import DATABASE_URL_HELP, resolve_database_url
from gradwatch_server.store.database import database_errors, open_engine, prepare


def server_parser(command: str, purpose: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand that calls a running server, with the option ``--url``."""
    parser = argparse.ArgumentParser(prog=f"gradwatch {command}", description=purpose)
    parser.add_argument("--url", help="address of the server (default: $GRADWATCH_URL or http://127.0.0.1:8321)")
    return parser


def database_parser(command: str, purpose: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand that uses the server's database, with the option ``--database-url``."""
    parser = argparse.ArgumentParser(prog=f"gradwatch {command}", description=purpose)
    add_database_option(parser, None)
    return parser


def add_database_option(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add the option ``--database-url`` to a parser; one within it takes ``argparse.SUPPRESS`` as its default."""
    parser.add_argument("--database-url", metavar="URL", default=default, help=DATABASE_URL_HELP)


@contextmanager
def open_database(options: argparse.Namespace, *, create: bool = False) -> Iterator[sa.Engine]:
    """Open the database that the options name, with the schema of this version; close it at the end.

    Args:
        options: options that a ``database_parser`` has parsed.
        create: whether an SQLite file that does not exist is created.

    Raises:
        DatabaseError: it cannot be used; the text says what to do.
    """
    engine = open_engine(resolve_database_url(options.database_url), create=create)
    try:
        prepare(engine)
        with database_errors(engine):
            yield engine
    finally:
        engine.dispose()


def run_command(command: str, work: Callable[[], int]) -> int:
    """Return the exit code of a subcommand; an error that a user can do something about is printed and gives 1."""
    try:
        return work()
    except BrokenPipeError:  # the main command ends quietly when nobody reads any more
        raise
    except (GradwatchError, SettingsError, OSError) as error:
        print(visible(f"gradwatch {command}: {error}", keep="\n\t"), file=sys.stderr)
        return 1


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line, by default to standard output, in which no text of strangers can act on the terminal."""
    print(visible(text), file=file)
