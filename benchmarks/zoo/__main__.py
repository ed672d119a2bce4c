"""``python -m benchmarks.zoo``: labelled trainings through the real agent and a real server, and the table.

Runs the half to develop on, or with ``--report`` the half that is only reported. Exits with 1 where a bar is missed or
a label is not proven by its outcome.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import httpx

from benchmarks.zoo.run import Task, run
from benchmarks.zoo.score import Outcome, Score
from benchmarks.zoo.split import FIRST_SETS, development, reported, thirty
from gradwatch.demo.server import Server


def run_all(options: argparse.Namespace) -> Iterator[Outcome]:
    """Run the chosen cases against one server, several at a time, and yield their outcomes in order."""
    half = reported() if options.report else development()
    if options.thirty:
        half = thirty(half)
    chosen = [case for case in half if not options.case or any(part in case.name for part in options.case)]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    pairs = list(product(chosen, seeds))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADWATCH_SPOOL_DIR"] = str(Path(folder) / "spool")  # not beside the server's own database
        with (
            Server(Path(folder), "http://127.0.0.1:9/nobody", "whsec_" + "A" * 32) as server,
            ProcessPoolExecutor(options.workers, get_context("spawn")) as pool,
        ):
            seconds, verify = options.step_seconds if options.every is None else 0.0, not options.skip_twins
            tasks = [Task(case.name, seed, server.url, options.every, seconds, verify) for case, seed in pairs]
            try:
                for (case, seed), found in zip(pairs, pool.map(run, tasks), strict=True):
                    yield Outcome(case=case, seed=seed, every=options.every, **found._asdict())
            except httpx.HTTPError:
                print((Path(folder) / "server.log").read_text()[-4000:], file=sys.stderr)
                raise


def _every(text: str) -> int | None:
    return None if text == "default" else int(text)


def main() -> int:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains this")
    parser.add_argument("--report", action="store_true", help="the half that is only reported; note the date in docs")
    parser.add_argument("--seeds", type=int, default=2, help="seeds a case (default: 2)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--every",
        type=_every,
        default=1,
        help="steps between samples (default: 1), or 'default': the agent's choice",
    )
    parser.add_argument(
        "--step-seconds",
        type=float,
        default=0.05,
        help="least time of a step at the agent's choice, which pays for samples out of it (default: 0.05)",
    )
    parser.add_argument("--thirty", action="store_true", help="a fixed list of 30 cases, half of them sick")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at once (default: 1)")
    parser.add_argument("--skip-twins", action="store_true", help="do not train the repaired twins of sick cases")
    options = parser.parse_args()
    outcomes, started = [], time.monotonic()
    for outcome in run_all(options):
        print(outcome.describe(), flush=True)
        outcomes.append(outcome)
    score = Score.of(outcomes)
    print(f"\n{len(outcomes)} runs in {time.monotonic() - started:.0f} s\n\n{score.table()}\n")
    first = {case.name for case in FIRST_SETS}
    if newer := [outcome for outcome in outcomes if outcome.case.name not in first]:
        print(f"Of them {len(newer)} of programs outside the first sets:\n\n{Score.of(newer).table()}\n")
    for missed in score.failures():
        print(f"MISSED: {missed}")
    return 1 if score.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
