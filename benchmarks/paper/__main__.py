"""``make bench-paper``: the largest learning rate that a network without normalisation takes, with and without AGC.

Each training is repeated with twice the learning rate until it diverges, for each batch size, method and seed; then
1,000 layers are trained with and without AGC. Prints two tables; ``--plot docs/paper.png`` draws them too.
"""

import argparse
import itertools
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.paper.climbing import DEEP_BATCH, DEEP_STEPS, STEPS, climb, dive
from benchmarks.paper.ladder import LEARNED, METHODS, PLAIN, STABLE, Ladder, Method
from benchmarks.paper.plot import draw
from benchmarks.paper.training import Outcome

DEEP_EXPONENTS, DEEP_CLIPS = (-5, -3, -1), (None, 0.01)


def _rate(exponents: Sequence[int | None]) -> str:
    """Return a learning rate as the geometric mean over the seeds that have one."""
    found = [exponent for exponent in exponents if exponent is not None]
    if not found:
        return "none"
    missing = "" if len(found) == len(exponents) else f", {len(found)} of {len(exponents)} seeds"
    return f"{2 ** statistics.fmean(found):.2g}{missing}"


def row(batch: int, method: Method, ladders: Sequence[Ladder]) -> str:
    """Return one line of the table."""
    beside = [ladder for ladder in ladders if ladder.batch == batch]
    plain = {ladder.seed: ladder.largest(STABLE) for ladder in beside if ladder.method == PLAIN}
    own = {ladder.seed: ladder for ladder in beside if ladder.method == method}
    stable = {seed: ladder.largest(STABLE) for seed, ladder in own.items()}
    pairs = [(rate, plain[seed]) for seed, rate in stable.items()]
    raised = [2.0 ** (rate - base) for rate, base in pairs if rate is not None and base is not None]
    times = f"{statistics.geometric_mean(raised):.1f} ({min(raised):g} to {max(raised):g})" if raised else "none"
    learned = _rate([ladder.largest(LEARNED) for ladder in own.values()])
    best = statistics.fmean(max(ladder.accuracies.values()) for ladder in own.values())
    return f"| {batch} | {method.name} | {_rate(list(stable.values()))} | {times} | {learned} | {best:.1%} |"


def sweep(batches: Sequence[int], methods: Sequence[Method], seeds: int, workers: int) -> list[Ladder]:
    """Return the ladders of every batch size, method and seed."""
    jobs = list(itertools.product(batches, methods, range(seeds)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(pool.map(climb, *zip(*jobs, strict=True)))


def plunge(layers: int, clips: Iterable[float | None], workers: int) -> dict[tuple[float | None, int], Outcome]:
    """Return the outcomes of the deep network by threshold and exponent of the learning rate."""
    jobs = list(itertools.product(clips, DEEP_EXPONENTS))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        outcomes = pool.map(dive, itertools.repeat(layers), *zip(*jobs, strict=True))
        return dict(zip(jobs, outcomes, strict=True))


def main() -> None:
    """Run the sweep and the deep network, print and draw them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, two batch sizes, two thresholds, 100 layers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--plot", type=Path, help="file to draw to, such as docs/paper.png")
    asked = parser.parse_args()
    batches, seeds, layers = ((64, 512), 1, 100) if asked.quick else ((16, 64, 256, 512), 3, 1000)
    methods = [method for method in METHODS if not asked.quick or method.clip in (None, 0.01, 0.16)]
    ladders = sweep(batches, methods, seeds, asked.workers)
    print(f"{STEPS} steps a training, {seeds} seeds, means over the seeds")
    print("| batch | network | largest stable learning rate | times that without AGC | that learns | best accuracy |")
    print("|--:|---|--:|--:|--:|--:|")
    for batch, method in itertools.product(batches, methods):
        print(row(batch, method, ladders))
    dives = plunge(layers, DEEP_CLIPS, asked.workers)
    print(f"\n{layers} layers, {DEEP_STEPS} steps of {DEEP_BATCH} images, clipped through gradwatch.attach(clip=...)")
    print("| learning rate | threshold | steps | loss at the end | test accuracy |")
    print("|--:|---|--:|--:|--:|")
    for (clip, exponent), outcome in sorted(dives.items(), key=lambda pair: (pair[0][1], pair[0][0] or math.inf)):
        steps = f"{outcome.steps}, diverged" if outcome.diverged else f"{outcome.steps}"
        print(f"| {2.0**exponent:g} | {clip or 'none'} | {steps} | {outcome.losses[-1]:.3g} | {outcome.accuracy:.3f} |")
    if asked.plot:
        draw(asked.plot, ladders, dives)


if __name__ == "__main__":
    main()
