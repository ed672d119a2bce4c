"""``gradwatch prune``: delete expired runs, and the expired levels of other runs, once."""

import argparse
import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from gradwatch_server.alerting.run_alerts import resolve_deleted
from gradwatch_server.cli.command import database_parser, open_database, print_line, run_command
from gradwatch_server.settings import Configuration, Settings
from gradwatch_server.store.deletion import delete_expired_runs
from gradwatch_server.store.group_commit import Writer
from gradwatch_server.store.rollups.downsampling import Downsampled, downsample_expired


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch prune``; return the exit code."""
    parser = database_parser("prune", "Delete expired runs, and the expired levels of the other runs.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="[retention] says what has expired")
    options = parser.parse_args(arguments)
    return run_command("prune", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    configuration = Configuration.load(options.config)
    with open_database(options) as engine:
        runs, levels = asyncio.run(_prune(engine, configuration))
    print_line("; ".join([f"removed {_many(runs, 'run')}", *_summary(levels)]))
    return 0


async def _prune(engine: sa.Engine, configuration: Configuration) -> tuple[int, Downsampled]:
    """Delete expired runs, then expired levels; return the number of runs and the deleted rows of levels."""
    public_url = Settings(database_url="", configuration=configuration).public_url
    resolve = partial(resolve_deleted, configuration=configuration, public_url=public_url)
    writer = Writer(engine, capacity=1, capacity_per_run=1)
    runs = await delete_expired_runs(engine, writer, configuration.retention, resolve)
    return runs, await downsample_expired(engine, writer, configuration.retention)


def _summary(levels: Downsampled) -> list[str]:
    """Return a text about the deleted rows of levels; an empty one if there are none."""
    counts = [_many(levels.samples, "sample")] + ([_many(levels.buckets, "bucket")] if levels.buckets else [])
    return [f"{' and '.join(counts)} of {_many(len(levels.run_ids), 'run')}"] if levels.run_ids else []


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
