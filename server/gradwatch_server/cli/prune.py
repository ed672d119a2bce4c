"""``gradwatch prune``: remove the runs, and the finer levels of others, whose time is over, now."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from gradwatch.settings import secret
from gradwatch_server.alerting.run_alerts import resolve_deleted
from gradwatch_server.errors import GradwatchError
from gradwatch_server.settings import Configuration, Settings
from gradwatch_server.store.database import open_engine, prepare, told, writing
from gradwatch_server.store.deletion import Left, delete_some
from gradwatch_server.store.retention import Retention
from gradwatch_server.store.rollups.downsampling import Faded, Piece, fade, overdue


def main(arguments: Sequence[str]) -> int:
    """Remove them; return the exit code."""
    parser = argparse.ArgumentParser(prog="gradwatch prune", description="Remove what is over its time.")
    parser.add_argument("--database-url", help="(default: $GRADWATCH_DATABASE_URL or sqlite:///gradwatch.db)")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="[retention] says how long")
    given = parser.parse_args(arguments)
    try:
        configuration = Configuration.load(given.config)
        engine = open_engine(
            given.database_url or secret(os.environ, "GRADWATCH_DATABASE_URL") or "sqlite:///gradwatch.db",
            create=False,
        )
        prepare(engine)
        with told(engine):
            gone = _delete(engine, configuration)
            faded = _fade(engine, configuration.retention)
    except (GradwatchError, ValueError) as error:
        print(f"gradwatch prune: {error}", file=sys.stderr)
        return 1
    engine.dispose()
    print("; ".join([f"removed {_many(gone, 'run')}", *faded]))
    return 0


def _delete(engine: sa.Engine, configuration: Configuration) -> int:
    """Remove the runs that are over their time, in pieces; return how many went."""
    public_url = Settings(database_url="", configuration=configuration).public_url
    with engine.connect() as connection:
        overdue_runs = configuration.retention.overdue(connection, time.time())
    return sum(_delete_run(engine, run_id, configuration, public_url) == "nothing" for run_id in overdue_runs)


def _delete_run(engine: sa.Engine, run_id: str, configuration: Configuration, public_url: str) -> Left:
    resolve = partial(resolve_deleted, configuration=configuration, public_url=public_url)
    left: Left = "some"
    while left == "some":
        with writing(engine) as connection:
            left = delete_some(connection, run_id, resolve, retention=configuration.retention)
    return left


def _fade(engine: sa.Engine, retention: Retention) -> list[str]:
    """Remove the levels that are over their time, in pieces; return what went of them, in words, where anything did."""
    samples, buckets, runs = 0, 0, set()
    while pieces := _overdue(engine, retention):
        for piece in pieces:
            while gone := _fade_once(engine, piece):
                samples, buckets = samples + gone.samples, buckets + gone.buckets
                runs.add(piece.run_id)
    told = [_many(samples, "sample")] + ([_many(buckets, "bucket")] if buckets else [])
    return [f"{' and '.join(told)} of {_many(len(runs), 'run')}"] if runs else []


def _overdue(engine: sa.Engine, retention: Retention) -> list[Piece]:
    with engine.connect() as connection:
        return overdue(connection, retention, time.time())


def _fade_once(engine: sa.Engine, piece: Piece) -> Faded:
    with writing(engine) as connection:
        return fade(connection, piece)


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
