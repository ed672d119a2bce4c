"""``python -m benchmarks.zoo``: every case through the real agent and a real server, and the table.

Exits with 1 where a bar is missed or a label is not proven by its outcome.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch
from torch import nn

import gradwatch
from benchmarks.zoo import dead, exploding, healthy, nonfinite, second, third, throttled, vanishing
from benchmarks.zoo.baselines import Baselines
from benchmarks.zoo.case import Case, holds, train
from benchmarks.zoo.score import Alert, Outcome, Score
from gradwatch.demo.server import Server

CASES: tuple[Case, ...] = (
    *healthy.CASES,
    *vanishing.CASES,
    *dead.CASES,
    *exploding.CASES,
    *nonfinite.CASES,
    *second.CASES,
    *third.CASES,
    *throttled.CASES,
)


def run(case: Case, seed: int, url: str, every: int, *, verify: bool) -> Outcome:
    """Train a case under the agent and ask the server what it made of it."""
    training = case.build(seed)
    models: Sequence[nn.Module] = [training.model] if isinstance(training.model, nn.Module) else training.model
    name = f"{case.name}-{seed}"
    with Baselines(models) as baselines:
        agent = gradwatch.attach(list(models), None, url=url, project="zoo", run=name, every=every, clip=training.clip)
        counted = train(training, case.steps, case.onset, baselines)
        agent.close(timeout_seconds=60)
    twin = True
    if verify and case.twin is not None:
        twin = holds(case, train(case.twin(seed), case.steps, case.onset), repaired=True)
    return Outcome(
        case=case,
        seed=seed,
        alerts=read_alerts(url, agent.run_id),
        label_holds=holds(case, counted),
        twin_holds=twin,
        every=every,
        baselines=baselines.alerts,
    )


def read_alerts(url: str, run_id: str) -> list[Alert]:
    """Return what fired for a run, from the server."""
    state = httpx.get(f"{url}/api/v1/runs/{run_id}", timeout=60, trust_env=False).raise_for_status().json()["state"]
    assert state == "finished", f"run {run_id} is {state}: the server has not got all of it"
    answer = httpx.get(f"{url}/api/v1/alerts", params={"run": run_id}, timeout=60, trust_env=False)
    answer.raise_for_status()
    return [
        Alert(
            rule=entry["rule"],
            severity=entry["severity"],
            fired_step=entry["fired_step"],
            resolved_step=entry["resolved_step"],
            blamed=tuple(blame["name"] for blame in entry["parameters"]),
            summary=entry["summary"],
        )
        for entry in answer.json()
        if entry["fired_step"] is not None
    ]


def main() -> int:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains this")
    parser.add_argument("--seeds", type=int, default=2, help="seeds a case (default: 2)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="steps between samples (default: 1)")
    parser.add_argument("--skip-twins", action="store_true", help="do not train the repaired twins of sick cases")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.case or any(part in case.name for part in options.case)]
    torch.set_num_threads(1)
    outcomes = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADWATCH_SPOOL_DIR"] = str(Path(folder) / "spool")  # not beside the server's own database
        with Server(Path(folder), "http://127.0.0.1:9/nobody", "whsec_" + "A" * 32) as server:
            for case in chosen:
                for seed in range(options.first_seed, options.first_seed + options.seeds):
                    try:
                        outcome = run(case, seed, server.url, options.every, verify=not options.skip_twins)
                    except httpx.HTTPError:
                        print((Path(folder) / "server.log").read_text()[-4000:], file=sys.stderr)
                        raise
                    print(outcome.describe(), flush=True)
                    outcomes.append(outcome)
    score = Score.of(outcomes)
    print(f"\n{len(outcomes)} runs in {time.monotonic() - started:.0f} s\n\n{score.table()}\n")
    for missed in score.failures():
        print(f"MISSED: {missed}")
    return 1 if score.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
