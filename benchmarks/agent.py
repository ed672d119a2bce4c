"""``make bench-agent``: what the agent costs, interleaved with a baseline, beside what others cost.

A round of pairs trains one step without and one step with a monitor, in turn, in one process; the cost of a monitor is
the median of the differences, its share the median of the differences over the median step. The cost of one sample is
timed by itself, after a step, with the caches in the state that a step leaves.
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
from torch import Tensor

import gradwatch
from benchmarks.networks import NETWORKS, Network
from benchmarks.operators import allowed_on_accelerator, launched
from gradwatch.agent import Agent
from gradwatch.model.discovery import find_parameters
from gradwatch.norms.buffers import BufferPool
from gradwatch.norms.layout import MeasurementPlan
from gradwatch.norms.streams import StreamLog

NOWHERE = "http://127.0.0.1:9"
"""Nobody listens: what is measured waits in a spool, which is the dearest case."""


Step = Callable[[], None]


class Training:
    """One network in training."""

    def __init__(self, network: Network) -> None:
        torch.manual_seed(0)
        self.model = network.build()
        inputs, targets = network.batch()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.weights: list[Tensor] = list(self.model.parameters())

        def step() -> None:
            self.optimizer.zero_grad()
            network.loss(self.model, inputs, targets).backward()
            self.optimizer.step()

        self.step: Step = step

    @contextmanager
    def watched(self, every: int | None) -> Iterator[Agent]:
        agent = gradwatch.attach(self.model, self.optimizer, url=NOWHERE, every=every)
        yield agent
        agent.close(timeout_seconds=0.1)


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def after_steps(step: Step, acts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each act, each done after a step of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        step()
        act()
    for _ in range(rounds):
        for name, act in acts.items():
            step()
            seconds[name].append(timed(act))
    return {name: statistics.median(times) for name, times in seconds.items()}


def passes(training: Training) -> dict[str, Callable[[], object]]:
    """Return the agent's measuring pass, and ``_foreach_norm`` over the same tensors."""
    training.step()
    specs = [
        known.spec(parameter)
        for known, parameter in zip(find_parameters([training.model]), training.weights, strict=True)
    ]
    plan = MeasurementPlan(range(len(specs)), specs, specs)
    sample = BufferPool(StreamLog()).acquire()
    assert sample is not None
    norms = sample.allocate(plan)

    def grads() -> list[Tensor]:
        return [grad for weight in training.weights if (grad := weight.grad) is not None]

    @torch.no_grad()
    def ours() -> None:
        norms.measure(grads(), training.weights)

    @torch.no_grad()
    def foreach() -> None:
        torch.stack([*torch._foreach_norm(grads()), *torch._foreach_norm(training.weights)])

    return {"ours": ours, "_foreach_norm": foreach}


def every_step(training: Training, rounds: int) -> tuple[float, float, float]:
    """Return the median step, the median paired difference with ``every=1``, and the hooks' own median time."""
    plain, watched, inside = [], [], []
    with training.watched(1) as agent:
        guard = agent._session.monitor.guard
        for _ in range(3):
            training.step()
        for _ in range(rounds):
            guard.watching = False
            plain.append(timed(training.step))
            guard.watching = True
            before = guard.spent_seconds
            watched.append(timed(training.step))
            inside.append(guard.spent_seconds - before)
    pairs = [after - before for before, after in zip(plain, watched, strict=True)]
    return statistics.median(plain), statistics.median(pairs), statistics.median(inside)


def default_share(training: Training, seconds: float) -> tuple[float, float]:
    """Return the agent's share of the training time at its default setting, and the mean steps between samples.

    All that the agent takes is counted, the processor time of its threads too, after the first burst.
    """
    with training.watched(None) as agent:
        for _ in range(25):
            training.step()
        before, steps, sampled = _spent_seconds(agent), 0, 0
        schedule = agent._session.monitor.steps.schedule
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            steps, sampled = steps + 1, sampled + schedule.due
            training.step()
        spent = _spent_seconds(agent) - before
        return spent / (time.perf_counter() - started), steps / max(sampled, 1)


def _spent_seconds(agent: gradwatch.Agent) -> float:
    """Return all the time that an agent has taken, the processor time of its threads too."""
    session = agent._session
    return session.monitor.guard.spent_seconds + sum(thread.time.seconds for thread in session.threads)


def others(training: Training) -> dict[str, Callable[[], object] | None]:
    """Return what other monitors do after a step; None where one is not installed."""

    def naive() -> dict[str, float]:
        named = list(training.model.named_parameters())
        grads = {name: p.grad.norm().item() for name, p in named if p.grad is not None}
        return {**grads, **{f"{name}.weight": p.detach().norm().item() for name, p in named}}

    found: dict[str, Callable[[], object] | None] = {"naive loop": naive, "lightning grad_norm": None}
    try:
        from lightning.pytorch.utilities import grad_norm
    except ImportError:
        return found
    return {**found, "lightning grad_norm": lambda: grad_norm(training.model, 2)}


def wandb_cost(training: Training, rounds: int) -> float | None:
    """Return what ``wandb.watch(log="all", log_freq=1)`` adds to a step, offline; None where it is not installed."""
    try:
        import wandb
    except ImportError:
        return None
    plain = statistics.median(timed(training.step) for _ in range(rounds))
    with tempfile.TemporaryDirectory() as folder:
        run: Any = wandb.init(mode="offline", dir=folder)
        run.watch(training.model, log="all", log_freq=1)
        watched = statistics.median(timed(training.step) for _ in range(rounds))
        run.unwatch(training.model)
        run.finish()
    return watched - plain


def main() -> int:
    """Print the table; return 0 only if every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="pairs of steps (default 30)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training at the default setting, each model")
    parser.add_argument("--models", nargs="*", default=[network.key for network in NETWORKS])
    options = parser.parse_args()
    logging.getLogger("gradwatch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} pairs")
    print("a sample is the norms of every unit; floor = bytes / bandwidth at which row norms read memory meanwhile\n")
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADWATCH_SPOOL_DIR"] = folder
        for network in NETWORKS:
            if network.key in options.models:
                missed += report(network, options.rounds, options.seconds)
    print("\nall bars are met" if not missed else "\nmissed: " + "; ".join(missed))
    return 1 if missed else 0


def report(network: Network, rounds: int, seconds: float) -> list[str]:
    """Print one network's figures and return the bars that it missed."""
    training = Training(network)
    tensors = training.weights
    shapes = network.shapes()
    operators, most = launched(shapes, "meta"), allowed_on_accelerator(shapes)
    rows = torch.ones(65536, 1024)  # 256 MiB: far larger than any cache
    acts: dict[str, Callable[[], object]] = {
        **passes(training),
        **{name: act for name, act in others(training).items() if act is not None},
        "read": lambda: torch.linalg.vector_norm(rows, dim=1),
    }
    alone = after_steps(training.step, acts, rounds)
    bandwidth = rows.nbytes / alone.pop("read")
    floor = 2 * sum(tensor.nbytes for tensor in tensors) / bandwidth
    sample, foreach = alone.pop("ours"), alone.pop("_foreach_norm")
    plain, pair, inside = every_step(training, rounds)
    share, interval = default_share(training, seconds)
    print(
        f"{network.name}: {len(tensors)} parameters, {sum(t.nbytes for t in tensors) / 1e6:.0f} MB, "
        f"step {plain * 1e3:.1f} ms, {bandwidth / 1e9:.1f} GB/s\n"
        f"  sample           {sample * 1e3:8.2f} ms  {sample / len(tensors) * 1e6:6.2f} us a parameter  "
        f"x{sample / floor:.2f} of the floor {floor * 1e3:.2f} ms  x{sample / foreach:.2f} of _foreach_norm\n"
        f"  operators        {operators} a sample on an accelerator, at most {most} (see docs/agent.md); "
        f"on this CPU {launched(shapes, 'cpu')}\n"
        f"  every=1          {inside * 1e3:8.2f} ms in the hooks {inside / plain:7.2%}"
        f"  paired {pair * 1e3:+.2f} ms {pair / plain:+.2%}\n"
        f"  default          {share:8.2%} of the time, threads included, a sample each {interval:.0f} steps on average"
    )
    for name, cost in {**alone, "wandb.watch": wandb_cost(training, max(3, rounds // 10))}.items():
        said = "not installed" if cost is None else f"{cost * 1e3:8.2f} ms {cost / plain:7.2%}"
        print(f"  {name:<16} {said}", flush=True)
    small = network.key == "blocks"
    bars = {
        f"{network.name}: a sample at most 1.6 times the floor": small or sample <= 1.6 * floor,
        f"{network.name}: at most 5 us a parameter": not small or sample / len(tensors) <= 5e-6,
        f"{network.name}: at most 0.6 of _foreach_norm": not small or sample <= 0.6 * foreach,
        f"{network.name}: default at most 1.0%": share <= 0.01,
        f"{network.name}: at most {most} operators on an accelerator": operators <= most,
    }
    return [bar for bar, met in bars.items() if not met]


if __name__ == "__main__":
    raise SystemExit(main())
