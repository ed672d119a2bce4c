"""``gradwatch prune``: deletes expired runs, and the expired levels of others, once."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from gradwatch.settings import secret
from gradwatch_server.alerting.run_alerts import resolve_deleted
from gradwatch_server.errors import GradwatchError
from gradwatch_server.settings import Configuration, Settings
from gradwatch_server.store.database import database_errors, open_engine, prepare
from gradwatch_server.store.deletion import delete_expired_runs
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.rollups.downsampling import Downsampled, downsample_expired


def main(arguments: Sequence[str]) -> int:
    """Delete what has expired; return the exit code."""
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
        with database_errors(engine):
            runs, levels = asyncio.run(_prune(engine, configuration))
    except (GradwatchError, ValueError) as error:
        print(f"gradwatch prune: {error}", file=sys.stderr)
        return 1
    engine.dispose()
    print("; ".join([f"removed {_many(runs, 'run')}", *_summary(levels)]))
    return 0


async def _prune(engine: sa.Engine, configuration: Configuration) -> tuple[int, Downsampled]:
    """Delete expired runs, then expired levels; return how many runs, and what went of the levels."""
    public_url = Settings(database_url="", configuration=configuration).public_url
    resolve = partial(resolve_deleted, configuration=configuration, public_url=public_url)
    writer = Writer(engine, capacity=1, capacity_per_run=1)
    runs = await delete_expired_runs(engine, writer, configuration.retention, resolve)
    return runs, await downsample_expired(engine, writer, configuration.retention)


def _summary(levels: Downsampled) -> list[str]:
    """Return what went of the levels, in words; nothing if nothing went."""
    counts = [_many(levels.samples, "sample")] + ([_many(levels.buckets, "bucket")] if levels.buckets else [])
    return [f"{' and '.join(counts)} of {_many(len(levels.run_ids), 'run')}"] if levels.run_ids else []


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
