"""``gradwatch flush``: deliver what agents that are gone have left in the spool of this machine."""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from gradwatch.environment import setting
from gradwatch.post import Client, deliver
from gradwatch.spool import abandoned, folder


def main(arguments: Sequence[str]) -> int:
    """Deliver every abandoned spool; return 0 only if nothing is left."""
    parser = argparse.ArgumentParser(prog="gradwatch flush", description=__doc__)
    parser.add_argument("--spool-dir", type=Path, help="where the spools lie (default: $GRADWATCH_SPOOL_DIR, ~/.cache)")
    parser.add_argument("--url", help="deliver to this server instead of the one that each spool was meant for")
    parser.add_argument("--timeout-seconds", type=float, default=60.0, help="longest time to take (default: 60)")
    given = parser.parse_args(arguments)
    directory = given.spool_dir or folder()
    deadline = time.monotonic() + given.timeout_seconds
    left = spools = 0
    for spool in abandoned(directory):
        spools += 1
        with closing(spool), closing(Client(given.url or spool.url, setting("GRADWATCH_TOKEN"))) as client:
            delivered, refused, reason = deliver(spool, client, deadline)
        lost = f", {refused} refused by the server" if refused else ""
        print(f"run {spool.run_id}: {delivered} documents delivered to {given.url or spool.url}{lost}")
        if reason:
            left += 1
            print(f"run {spool.run_id}: the rest stays in {spool.path}: {reason}", file=sys.stderr)
    if not spools:
        print(f"nothing waits in {directory}")
    return 1 if left else 0
