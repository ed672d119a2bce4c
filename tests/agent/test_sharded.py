"""FSDP2: the statistics of sharded parameters are those of the whole, without a collective."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import wire
from tests.processes import LEAVE, free_port

from .conftest import Server

_RANKS = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import gradwatch, gradwatch.samples.collector, gradwatch.samples.joining
from gradwatch.monitor.guard import Guard
Guard.raises_own_errors = True
rank, size, port, url, kind = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 7))
shape = (2, 2) if kind == "hybrid" else (size,)
mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape):])
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
clip = gradwatch.AGC(0.02, exclude=()) if kind == "agc" else None
if kind != "late":
    gradwatch.samples.joining._LAST_PARTS_SECONDS = 60.0
if kind == "behind":
    collector = gradwatch.samples.collector.Collector
    process = collector._process_messages
    collector._process_messages = lambda self, *, wait: process(self, wait=wait) if wait else None
with gradwatch.attach(model, optimizer, url=url, every=1, clip=clip) as agent:
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(step))
        x = x[:, rank * 4 // size : (rank + 1) * 4 // size]
        (9 * model(x)).square().mean().backward()
        if kind == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if rank == 1 and step == 1 and kind == "late":
            agent._session.monitor.guard.watching = False
        optimizer.step()
    dist.barrier()
assert not agent._session.monitor.dropped.errors
dist.destroy_process_group()
"""


def run_ranks(server: Server, kind: str, size: int = 2, program: str = _RANKS) -> None:
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program + LEAVE, str(rank), str(size), port, server.url, kind]
        )
        for rank in range(size)
    ]
    assert [process.wait(400) for process in ranks] == [0] * size


def truth(kind: str) -> list[dict[str, Any]]:
    """Return norms at each step of the same training on one rank, in float64."""
    import gradwatch

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(step))
        (9 * model(x)).square().mean().backward()
        grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        weights = {name: p.detach().double() for name, p in model.named_parameters()}
        ratios = {}
        for name, grad in grads.items():
            rows, weight = (grad, weights[name]) if grad.dim() > 1 else (grad[None], weights[name][None])
            ratios[name] = float((rows.norm(dim=1) / weight.norm(dim=1).clamp(min=1e-3)).max())
        norms = {name: float(grad.norm()) for name, grad in grads.items()}
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        if kind == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if kind == "agc":
            gradwatch.adaptive_clip_grad_(model, 0.02)
        after = {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        found.append(
            {
                "grad_norm": norms,
                "weight_norm": {name: float(weight.norm()) for name, weight in weights.items()},
                "max_unit_ratio": ratios,
                "clipped_grad_norm": after,
                "total": total,
            }
        )
    return found


@pytest.mark.parametrize(("kind", "size"), [("behind", 2), ("norm", 2), ("agc", 2), ("hybrid", 4)])
def test_statistics_are_of_the_whole(server: Server, kind: str, size: int) -> None:
    """One layer has fewer rows than there are ranks: a rank holds nothing of it.

    ``behind``: the collector reads nothing before the agent is closed, and no reference to a parameter is left.
    """
    run_ranks(server, kind, size)
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    for step, expected in enumerate(truth(kind), start=1):
        for statistic in ("grad_norm", "weight_norm", "max_unit_ratio"):
            assert server.values(statistic, step) == pytest.approx(expected[statistic], rel=1e-4), (statistic, step)
        assert server.scalar("global_grad_norm", step) == pytest.approx(expected["total"], rel=1e-4)
        if kind in ("norm", "agc"):
            assert server.values("clipped_grad_norm", step) == pytest.approx(expected["clipped_grad_norm"], rel=1e-4)
    assert len({registration.id for registration in server.registrations}) == 1


def test_a_rank_that_stops_measuring_costs_samples_not_the_training(server: Server) -> None:
    run_ranks(server, "late")
    assert [sample.step for sample in server.samples] == [1]
    assert np.all(server.samples[0].statistics["grad_norm"] != wire.MISSING)


_UNMEASURABLE = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
import gradwatch
from gradwatch.monitor.guard import Guard
Guard.raises_own_errors = True
rank, size, port, url, kind = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
clip = gradwatch.AGC(0.02, exclude=()) if "clip" in kind else None
def attach(): return gradwatch.attach(model, url=url, every=1, clip=clip)
if "late" in kind:
    agent = attach()
if "fsdp1" in kind:
    strategy = ShardingStrategy.NO_SHARD if "whole" in kind else ShardingStrategy.FULL_SHARD
    wrapped = FullyShardedDataParallel(
        model, use_orig_params="orig" in kind, device_id=torch.device("cpu"), sharding_strategy=strategy
    )
    model = wrapped if "late" not in kind else model
else:
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    wrapped = model
if "late" not in kind:
    try:
        agent = attach()
    except NotImplementedError as error:
        assert "FSDP1" in str(error) and "clip" in kind, error
        for alone in (wrapped, list(wrapped.parameters())):
            try:
                gradwatch.adaptive_clip_grad_(alone)
                raise SystemExit("units that were cut apart were clipped")
            except NotImplementedError as refused:
                assert "fully_shard" in str(refused), refused
        dist.barrier()  # the first rank holds the store that the others need until they are here
        os._exit(0)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
for step in range(3):
    optimizer.zero_grad()
    wrapped(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
dist.barrier()
agent.close()
assert not agent._session.monitor.dropped.errors
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["late", "late clip", "fsdp1", "fsdp1 orig late"])
def test_one_ranks_part_is_never_taken_for_the_whole(server: Server, kind: str) -> None:
    """Sharded after attach, or by FSDP1: the other ranks do not measure."""
    run_ranks(server, kind, program=_UNMEASURABLE)
    assert server.samples == []
    assert [event.kind for event in server.events] == ["not_measured"]
    assert "fully_shard" in server.events[0].message
    assert 3 in server.trail("loss")


@pytest.mark.parametrize("kind", ["fsdp1 clip", "fsdp1 orig clip"])
def test_what_fsdp1_shards_cannot_be_clipped(server: Server, kind: str) -> None:
    """Neither by the agent nor by the function alone, which gets the module or its parameters."""
    run_ranks(server, kind, program=_UNMEASURABLE)
    assert server.samples == []


def test_what_fsdp1_does_not_shard_is_measured(server: Server) -> None:
    run_ranks(server, "fsdp1 orig whole", program=_UNMEASURABLE)
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.events == []


_MLP = """
import sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import gradwatch
from gradwatch.monitor.guard import Guard
Guard.raises_own_errors = True
rank, size, port, url, kind = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
"""
"""How a program begins: this rank, and a model that is still whole."""

_UNREDUCED = (
    _MLP
    + """
mesh = init_device_mesh("cpu", (size,))
for part in (model[0], model[2]) if kind == "parts" else ():
    fully_shard(part, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
losses = []
with gradwatch.attach(model, optimizer, url=url, every=1) as agent:
    for step in range(15):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            for part in (model[0], model[2]) if kind == "parts" else ():
                part.set_requires_gradient_sync(micro == 2)
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(9 * step + 3 * micro + rank))
            loss = model(x).square().mean() / 3
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    agent.log(last=losses[-1])
    model.to("cpu")  # which swaps tensors
    dist.barrier()
if rank == 0:
    seen = gradwatch.attach(nn.Linear(2, 2), url=url)
    seen.log(**{f"truth{step}": loss for step, loss in enumerate(losses, start=1)})
    seen.close()
dist.destroy_process_group()
"""
)


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_the_loss_of_passes_that_are_not_reduced_is_part_of_the_step(server: Server, kind: str) -> None:
    """Their gradients lie in what stands in for the parameters, which have none of their own meanwhile."""
    run_ranks(server, kind, program=_UNREDUCED)
    expected = {step: server.trail(f"truth{step}")[0] for step in range(1, 16)}
    assert server.trail("loss") == pytest.approx(expected, rel=1e-5)


_ONE_SIDED = (
    _MLP
    + """
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
with gradwatch.attach(model, optimizer, url=url, every=1_000_000) as agent:
    for step in range(1, 121):
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 6)) + rank).square().mean() * (1 + 0.01 * (step % 3))
        (loss * 1000.0 if step == 40 and rank == 1 else loss).backward()
        optimizer.step()
        time.sleep(0.02)
    dist.barrier()
assert not agent._session.monitor.dropped.errors
dist.destroy_process_group()
"""
)


def test_a_sign_on_one_rank_has_all_of_them_sample_the_same_steps(server: Server) -> None:
    """Rank 1 alone sees it; the burst begins 16 steps or half a second later, and one late to learn of it joins."""
    run_ranks(server, "", program=_ONE_SIDED)
    burst = [sample.step for sample in server.samples if sample.step > 1]
    assert 10 <= len(burst) <= 20
    assert burst == list(range(burst[0], burst[0] + len(burst)))
    assert burst[0] >= 40 + 16
    assert burst[-1] <= 40 + 25 + 20
