"""``gradwatch prune``: remove the runs whose time is over, now."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gradwatch.settings import secret
from gradwatch_server.database import open_engine, prepare, writing
from gradwatch_server.errors import GradwatchError
from gradwatch_server.retention import delete_overdue
from gradwatch_server.settings import Configuration


def main(arguments: Sequence[str]) -> int:
    """Remove them; return the exit code."""
    parser = argparse.ArgumentParser(prog="gradwatch prune", description="Remove the runs whose time is over.")
    parser.add_argument("--database-url", help="(default: $GRADWATCH_DATABASE_URL or sqlite:///gradwatch.db)")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="[retention] says how long")
    given = parser.parse_args(arguments)
    try:
        retention = Configuration.load(given.config).retention
        engine = open_engine(
            given.database_url or secret(os.environ, "GRADWATCH_DATABASE_URL") or "sqlite:///gradwatch.db"
        )
        prepare(engine)
        with writing(engine) as connection:
            gone = delete_overdue(connection, retention)
    except (GradwatchError, ValueError) as error:
        print(f"gradwatch prune: {error}", file=sys.stderr)
        return 1
    print(f"removed {gone} runs")
    return 0
