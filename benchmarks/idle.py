"""``make bench-idle``: what the agent costs while nothing happens, and how often it samples at its default setting.

Hooks are timed by the processor time of the training thread, in blocks with and without an agent in turn; the median of
the differences is the cost. Threads are timed by their own clocks. The share of sampled steps is compared with what
arithmetic says: budget x time of a step / cost of a sample. Peers are timed beside them where they are installed.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from benchmarks.agent import NOWHERE
from benchmarks.networks import NETWORKS, Network
from gradwatch.agent import Agent
from gradwatch.steps.schedule import BURST_STEPS

Step = Callable[[], None]

NEVER = 1_000_000
"""Steps between two samples, of which no measurement makes as many."""
MOST_HOOKS_SECONDS = {"clipping": 20e-6, "no clipping": 10e-6}
MOST_BYSTANDER_SECONDS = 2e-6
MOST_THREADS_RATIO = 0.002
BUDGET = 0.01
LONGEST_SECONDS = 60.0
"""Longest count of samples."""


def training(count: int, optimizer_type: Any, *, clips: bool) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """Return a model of small parameters, its optimizer, and one step: a backward pass, a clipping, an optimizer."""
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(count)])
    optimizer = optimizer_type(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(model)).square().mean().backward()
        if clips:
            clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    return model, optimizer, step


def block(step: Step, steps: int) -> float:
    """Return the processor time of this thread in seconds for each of some steps."""
    started = time.thread_time()
    for _ in range(steps):
        step()
    return (time.thread_time() - started) / steps


@contextmanager
def attached(model: nn.Module, optimizer: torch.optim.Optimizer, every: int | None = NEVER) -> Iterator[Agent]:
    agent = gradwatch.attach(model, optimizer, url=NOWHERE, every=every)
    yield agent
    agent.close(timeout_seconds=0.05)


def hooks_cost(count: int, optimizer_type: Any, *, clips: bool, rounds: int) -> tuple[float, float, float, float]:
    """Return in seconds a step, what the hooks add to it, what they add to another model's step, and the resolution."""
    model, optimizer, ours = training(count, optimizer_type, clips=clips)
    _, _, theirs = training(count, optimizer_type, clips=clips)
    steps = max(20, 3000 // count)
    block(ours, steps), block(theirs, steps)
    plain, own, other, again = [], [], [], []
    for _ in range(rounds):
        before = block(ours, steps), block(theirs, steps)
        with attached(model, optimizer):
            block(ours, 60), block(theirs, 60)
            watched = block(ours, steps), block(theirs, steps)
        after = block(ours, steps), block(theirs, steps)
        plain.append(before[0])
        again.append(abs(after[0] - before[0]))
        own.append(watched[0] - (before[0] + after[0]) / 2)
        other.append(watched[1] - (before[1] + after[1]) / 2)
    return tuple(map(statistics.median, (plain, own, other, again)))  # type: ignore[return-value]


def threads_cost(step_seconds: float, seconds: float) -> float:
    """Return the share of one core that the agent's threads take while nothing is sampled."""
    model, optimizer, step = training(6, torch.optim.SGD, clips=True)
    with attached(model, optimizer) as agent:
        session = agent._session
        for _ in range(30):
            step()
        time.sleep(1.5)
        before, started = sum(thread.time.seconds for thread in session.threads), time.monotonic()
        while time.monotonic() < started + seconds:
            step()
            time.sleep(step_seconds)
        taken, wall = sum(thread.time.seconds for thread in session.threads) - before, time.monotonic() - started
    return taken / wall


def shares(network: Network, step_seconds: float, seconds: float) -> tuple[float, float, int, float]:
    """Return the share of sampled steps, what arithmetic says, the number of samples, and the overhead of all.

    Counting begins after the first burst, and lasts for some samples. Gradients are computed once.
    """
    model, _, _ = network.ready()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attached(model, optimizer, every=None) as agent:
        schedule = agent._session.monitor.steps.schedule
        account = schedule._account

        def step() -> bool:
            sampled = schedule.due
            optimizer.step()
            time.sleep(step_seconds)
            return sampled

        settled = time.monotonic() + 2.5
        made = 0
        while made < 2 * BURST_STEPS or time.monotonic() < settled:
            made += 1
            step()
        end = time.monotonic() + min(max(seconds, 10 * account.sample_seconds / BUDGET), LONGEST_SECONDS)
        taken = steps = 0
        while time.monotonic() < end:
            steps, taken = steps + 1, taken + step()
        right = min(max(BUDGET * account.step_seconds / account.sample_seconds, account.step_seconds / 30.0), 1.0)
        overhead = account.fixed_ratio + taken / steps * account.sample_seconds / account.step_seconds
    return taken / steps, right, taken, overhead


def peer_costs(rounds: int) -> dict[str, float | None]:
    """Return what a peer adds to a step in seconds; None where it is not installed."""
    costs: dict[str, float | None] = {"wandb.watch(log_freq=1000)": None, "Lightning's grad_norm every 50 steps": None}
    model, _, step = training(6, torch.optim.SGD, clips=True)
    plain = statistics.median(block(step, 500) for _ in range(rounds))
    try:
        import wandb
    except ImportError:
        pass
    else:
        os.environ.setdefault("WANDB_SILENT", "true")
        with tempfile.TemporaryDirectory() as folder, wandb.init(mode="offline", dir=folder) as run:
            run.watch(model, log="all", log_freq=1000)
            costs["wandb.watch(log_freq=1000)"] = statistics.median(block(step, 500) for _ in range(rounds)) - plain
            run.unwatch(model)
    try:
        from lightning.pytorch.utilities import grad_norm
    except ImportError:
        return costs
    made = 0

    def normed() -> None:
        nonlocal made
        step()
        made += 1
        if made % 50 == 0:
            grad_norm(model, 2)

    costs["Lightning's grad_norm every 50 steps"] = statistics.median(block(normed, 500) for _ in range(rounds)) - plain
    return costs


def report_hooks(rounds: int) -> list[str]:
    """Print what the hooks cost; return the bars that are missed."""
    missed = []
    for count in (6, 2000):
        for optimizer_type in (torch.optim.SGD, torch.optim.Adam):
            for kind, most in MOST_HOOKS_SECONDS.items():
                plain, own, other, resolution = hooks_cost(
                    count, optimizer_type, clips=kind == "clipping", rounds=rounds
                )
                name = f"{count} parameters, {optimizer_type.__name__}, {kind}"
                print(
                    f"  {name:<36} step {plain * 1e6:8.0f} us, hooks {own * 1e6:+7.1f} us ({own / plain:+.1%}), "
                    f"another model's step {other * 1e6:+7.1f} us; resolution {resolution * 1e6:.1f} us",
                    flush=True,
                )
                if own > most + resolution:
                    missed.append(f"{name}: hooks at most {most * 1e6:.0f} us")
                if other > MOST_BYSTANDER_SECONDS + resolution:
                    missed.append(f"{name}: another model's step at most {MOST_BYSTANDER_SECONDS * 1e6:.0f} us more")
    return missed


def report_threads(seconds: float) -> list[str]:
    """Print what the threads cost while nothing is sampled; return the bars that are missed."""
    missed = []
    for step_seconds in (0.001, 0.005, 0.02):
        ratio = threads_cost(step_seconds, seconds)
        print(f"  steps of {step_seconds * 1e3:.0f} ms: threads {ratio:.2%} of a core", flush=True)
        if ratio > MOST_THREADS_RATIO:
            missed.append(f"threads at steps of {step_seconds * 1e3:.0f} ms at most {MOST_THREADS_RATIO:.1%}")
    return missed


def report_shares(seconds: float) -> list[str]:
    """Print how often the default setting samples; return the bars that are missed."""
    missed = []
    for network in NETWORKS:
        for step_seconds in (0.001, 0.02, 0.1, 0.4, 1.0):
            share, right, taken, overhead = shares(network, step_seconds, max(seconds, 40 * step_seconds))
            name = f"{network.name}, steps of {step_seconds * 1e3:.0f} ms"
            print(
                f"  {name:<32} sampled {share:8.3%} ({taken}), arithmetic {right:8.3%}, overhead {overhead:.2%}",
                flush=True,
            )
            one = share / max(taken, 1)  # a run cannot show less
            if not right / 1.5 - one <= share <= 1.5 * right + one:
                missed.append(f"{name}: the share of sampled steps within a factor of 1.5")
            if step_seconds >= 0.005 and overhead > 1.25 * BUDGET:
                missed.append(f"{name}: overhead at most {1.25 * BUDGET:.2%}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.idle", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each kind (default 15)")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of each run (default 10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADWATCH_SPOOL_DIR"] = folder
        print("hooks of a step that is not sampled, processor time of the training thread")
        missed = report_hooks(options.rounds)
        for name, cost in peer_costs(options.rounds).items():
            print(f"  {name:<36} {'not installed' if cost is None else f'{cost * 1e6:+.1f} us a step'}")
        print("threads while nothing is sampled, nobody listening")
        missed += report_threads(options.seconds)
        print(f"the default setting, budget {BUDGET:.0%}")
        missed += report_shares(options.seconds)
    for bar in missed:
        print(f"MISSED: {bar}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
