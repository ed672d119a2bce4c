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
from torch import Tensor, nn
from torch.nn import functional

import gradwatch
from benchmarks.agent.models import MODELS
from gradwatch.agent import Agent
from gradwatch.buffers import Plan, Slots
from gradwatch.model import walk

NOWHERE = "http://127.0.0.1:9"
"""Nobody listens: what is measured waits in a spool, which is the dearest case."""


def read_bandwidth() -> float:
    """Return the bytes that row norms read in a second from a buffer far larger than the cache."""
    rows = torch.ones(65536, 1024)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        torch.linalg.vector_norm(rows, dim=1)
        times.append(time.perf_counter() - started)
    return rows.nbytes / statistics.median(times)


def make_step(model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        out = model(inputs)
        if inputs.dtype == torch.int64:
            loss = functional.cross_entropy(out.flatten(0, 1), inputs.flatten())
        else:
            loss = out.square().mean()
        loss.backward()
        optimizer.step()

    return step


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def pass_cost(model: nn.Module, step: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Return the median seconds of the agent's measuring pass, and of ``_foreach_norm`` over the same tensors."""
    watched = [(known, parameter) for known in walk([model]) if (parameter := known.parameter()) is not None]
    weights = [parameter for _, parameter in watched]
    step()
    specs = [known.spec(parameter) for known, parameter in watched]
    plan = Plan(range(len(watched)), specs, specs)
    slot = Slots().take()
    assert slot is not None
    claim = slot.claim(plan)

    def ours() -> None:
        with torch.no_grad():
            grads = [weight.grad for weight in weights]
            assert claim.grads is not None
            claim.grads.run([grad for grad in grads if grad is not None])
            claim.weights.run(weights)

    def foreach() -> None:
        with torch.no_grad():
            grads = [weight.grad for weight in weights if weight.grad is not None]
            torch.stack([*torch._foreach_norm(grads), *torch._foreach_norm(weights)])

    results: dict[Callable[[], None], list[float]] = {ours: [], foreach: []}
    for act in results:
        act()
    for _ in range(rounds):
        for act, times in results.items():
            step()
            times.append(timed(act))
    return statistics.median(results[ours]), statistics.median(results[foreach])


@contextmanager
def agent_every(model: nn.Module, optimizer: torch.optim.Optimizer, every: int | None) -> Iterator[Agent]:
    agent = gradwatch.attach(model, optimizer, url=NOWHERE, every=every)
    yield agent
    agent.close(timeout_seconds=0.1)


def every_step(model: nn.Module, inputs: Tensor, rounds: int) -> tuple[float, float, float]:
    """Return the median step, the median paired difference with ``every=1``, and the hooks' own median time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    step = make_step(model, inputs, optimizer)
    plain, watched, inside = [], [], []
    with agent_every(model, optimizer, 1) as agent:
        for _ in range(3):
            step()
        for _ in range(rounds):
            agent.watching = False
            plain.append(timed(step))
            agent.watching = True
            before = agent.spent_seconds
            watched.append(timed(step))
            inside.append(agent.spent_seconds - before)
    pairs = [after - before for before, after in zip(plain, watched, strict=True)]
    return statistics.median(plain), statistics.median(pairs), statistics.median(inside)


def default_share(model: nn.Module, inputs: Tensor, seconds: float) -> tuple[float, int]:
    """Return the agent's share of the training time at its default setting, and its interval.

    All that the agent takes is counted, the processor time of its threads too, after the first burst.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    step = make_step(model, inputs, optimizer)
    with agent_every(model, optimizer, None) as agent:
        for _ in range(25):
            step()
        before = agent.spent_seconds + agent.background_seconds
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            step()
        spent = agent.spent_seconds + agent.background_seconds - before
        return spent / (time.perf_counter() - started), agent.interval_steps


def others(model: nn.Module, inputs: Tensor, rounds: int) -> dict[str, float | None]:
    """Return the median paired cost of other monitors in a step, in seconds; None where one is not installed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    step = make_step(model, inputs, optimizer)

    def naive() -> dict[str, float]:
        named = list(model.named_parameters())
        grads = {name: p.grad.norm().item() for name, p in named if p.grad is not None}
        return {**grads, **{f"{name}.weight": p.detach().norm().item() for name, p in named}}

    costs: dict[str, float | None] = {"naive loop": cost_after(step, naive, rounds)}
    try:
        from lightning.pytorch.utilities import grad_norm
    except ImportError:
        costs["lightning grad_norm"] = None
    else:
        costs["lightning grad_norm"] = cost_after(step, lambda: grad_norm(model, 2), rounds)
    costs["wandb.watch"] = wandb_cost(model, step, max(3, rounds // 10))
    return costs


def cost_after(step: Callable[[], None], act: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        step()
        times.append(timed(act))
    return statistics.median(times)


def wandb_cost(model: nn.Module, step: Callable[[], None], rounds: int) -> float | None:
    try:
        import wandb
    except ImportError:
        return None
    plain = statistics.median(timed(step) for _ in range(rounds))
    with tempfile.TemporaryDirectory() as folder:
        run: Any = wandb.init(mode="offline", dir=folder)
        run.watch(model, log="all", log_freq=1)
        watched = statistics.median(timed(step) for _ in range(rounds))
        run.unwatch(model)
        run.finish(quiet=True)
    return watched - plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="pairs of steps (default 30)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training at the default setting, each model")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    logging.getLogger("gradwatch").setLevel(logging.ERROR)
    bandwidth = read_bandwidth()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(f"medians of {options.rounds} pairs; a sample is the norms of every unit; floor = bytes / bandwidth\n")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADWATCH_SPOOL_DIR"] = folder
        for name in options.models:
            failed += report(name, bandwidth, options.rounds, options.seconds)
    print("\nall bars are met" if not failed else "\nmissed: " + "; ".join(failed))
    return 1 if failed else 0


def report(name: str, bandwidth: float, rounds: int, seconds: float) -> list[str]:
    """Print one model's figures and return the bars that it missed."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    tensors = list(model.parameters())
    floor = 2 * sum(tensor.nbytes for tensor in tensors) / bandwidth
    step = make_step(model, inputs, torch.optim.SGD(model.parameters(), lr=1e-6))
    sample, foreach = pass_cost(model, step, rounds)
    plain, pair, inside = every_step(model, inputs, rounds)
    share, interval = default_share(model, inputs, seconds)
    print(
        f"{name}: {len(tensors)} parameters, {sum(t.nbytes for t in tensors) / 1e6:.0f} MB, step {plain * 1e3:.1f} ms"
    )
    print(
        f"  sample           {sample * 1e3:8.2f} ms  {sample / len(tensors) * 1e6:6.2f} us a parameter  "
        f"x{sample / floor:.2f} of the floor {floor * 1e3:.2f} ms  x{sample / foreach:.2f} of _foreach_norm"
    )
    print(
        f"  every=1          {inside * 1e3:8.2f} ms in the hooks {inside / plain:7.2%}"
        f"  paired {pair * 1e3:+.2f} ms {pair / plain:+.2%}"
    )
    print(f"  default          {share:8.2%} of the time, threads included, a sample each {interval} steps")
    for other, cost in others(model, inputs, rounds).items():
        said = "not installed" if cost is None else f"{cost * 1e3:8.2f} ms {cost / plain:7.2%}"
        print(f"  {other:<16} {said}")
    bars = {
        f"{name} sample at most 1.6 times the floor": name == "deep" or sample <= 1.6 * floor,
        f"{name} at most 5 us a parameter": name != "deep" or sample / len(tensors) <= 5e-6,
        f"{name} at most 0.6 of _foreach_norm": name != "deep" or sample <= 0.6 * foreach,
        f"{name} default at most 1.0%": share <= 0.01,
    }
    return [bar for bar, met in bars.items() if not met]


if __name__ == "__main__":
    raise SystemExit(main())
