"""``gradwatch migrate``: bring the schema of a database to this version."""

import argparse
import os
import sys
from collections.abc import Sequence

from gradwatch.settings import secret
from gradwatch_server.errors import DatabaseError
from gradwatch_server.store.database import migrate, open_engine


def main(arguments: Sequence[str]) -> int:
    """Migrate the database; return the exit code."""
    parser = argparse.ArgumentParser(prog="gradwatch migrate", description="Bring a database to this version.")
    parser.add_argument("--database-url", help="(default: $GRADWATCH_DATABASE_URL or sqlite:///gradwatch.db)")
    given = parser.parse_args(arguments).database_url
    try:
        engine = open_engine(given or secret(os.environ, "GRADWATCH_DATABASE_URL") or "sqlite:///gradwatch.db")
        migrate(engine)
    except (DatabaseError, ValueError) as error:
        print(f"gradwatch migrate: {error}", file=sys.stderr)
        return 1
    print(f"gradwatch migrate: {engine.url.render_as_string()} has the schema of this version")
    engine.dispose()
    return 0
