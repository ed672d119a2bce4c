"""Meshes of one, two and three dims, and pipelines: norms are those of the whole model, on whichever ranks it lies.

One launch of four ranks trains every parallelism after the other; processes that import torch are what is slow here.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradwatch import wire
from gradwatch.model.discovery import find_parameters
from gradwatch.ranks.holdings import Holdings, holdings_of, peers_of
from gradwatch.ranks.whole_model import WholeModel
from tests.processes import PATIENCE_SECONDS, environment, free_port

from .conftest import Server
from .truth import norm

STEPS = 2

_BEGINNING = f"""
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import gradwatch
from gradwatch.monitor.guard import Guard
Guard.raises_own_errors = True
rank, size, port, url = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{{port}}", rank=rank, world_size=size)
STEPS = {STEPS}
def batch(step, width=8): return torch.randn(16, width, generator=torch.Generator().manual_seed(step))
def half(data, which): return data[8 * which : 8 * which + 8]
def attach(model, run, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, gradwatch.attach(model, optimizer, url=url, run=run, every=1, **options)
def train(model, run, loss, synchronise=lambda model: None, close=True):
    optimizer, agent = attach(model, run)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        synchronise(model)
        optimizer.step()
    if close:
        agent.close()
def layers(): return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 3))
plan = {{"1": ColwiseParallel(), "3": RowwiseParallel()}}
dp_tp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
pp_dp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
replica, stage = dp_tp["dp"].get_local_rank(), pp_dp["pp"].get_local_rank()
"""

_PROGRAM = """
# Tensor parallelism alone in half of the mesh, data parallelism by hand over the other dim
torch.manual_seed(0)
model = parallelize_module(layers(), dp_tp["tp"], plan)
def average(model, group):
    for parameter in model.parameters():
        gradient = parameter.grad
        part = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        dist.all_reduce(part, group=group)
        part /= 2
train(
    model,
    "tp x dp",
    lambda model, step: model(half(batch(step), replica)).square().mean(),
    lambda model: average(model, dp_tp["dp"].get_group()),
)

# FSDP2 on top of tensor parallelism
torch.manual_seed(0)
model = parallelize_module(layers(), dp_tp["tp"], plan)
fully_shard(model, mesh=dp_tp["dp"])
train(model, "fsdp2 x tp", lambda model, step: model(batch(step)).square().mean())

# The same, clipped adaptively
for granularity in ("unit", "tensor"):
    torch.manual_seed(0)
    whole = layers()
    torch.manual_seed(0)
    model = parallelize_module(layers(), dp_tp["tp"], plan)
    fully_shard(model, mesh=dp_tp["dp"])
    for each in (whole, model):
        (9 * each(batch(0))).square().mean().backward()
        gradwatch.adaptive_clip_grad_(each, 0.02, granularity=granularity)
    for one, many in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(many.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-7)

# FSDP1, in parts and as a whole, clipped by its own function
for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"):
    torch.manual_seed(0)
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    options["sharding_strategy"] = ShardingStrategy[strategy]
    if strategy == "HYBRID_SHARD":
        options["device_mesh"] = dp_tp
    model = layers()
    model[3] = FullyShardedDataParallel(model[3], **options)
    model = FullyShardedDataParallel(model, **options)
    train(
        model,
        f"fsdp1 {strategy}",
        lambda model, step: model(batch(step)).square().mean(),
        lambda model: model.clip_grad_norm_(0.05),
    )

# Each pair of ranks trains a stage of its own, with the same names in both
torch.manual_seed(stage)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
fully_shard(model, mesh=pp_dp["dp"])
train(model, "pp x fsdp2", lambda model, step: model(batch(step)).square().mean() * (1, 100)[stage])

# A pipeline of two stages, each of which is replicated
torch.manual_seed(0)
whole = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
mine = whole[2 * stage : 2 * stage + 2]
pipeline = PipelineStage(mine, stage, 2, torch.device("cpu"), group=pp_dp["pp"].get_group())
schedule = Schedule1F1B(pipeline, n_microbatches=2, loss_fn=nn.functional.mse_loss)
optimizer, agent = attach(mine, "pp x dp")
replica = pp_dp["dp"].get_local_rank()
for step in range(STEPS):
    optimizer.zero_grad()
    if stage == 0:
        schedule.step(half(batch(step), replica))
    else:
        schedule.step(target=half(batch(100 + step), replica), losses=[])
    average(mine, pp_dp["dp"].get_group())
    optimizer.step()

# The usual last line: the last agent is closed when the interpreter ends
dist.destroy_process_group()
"""


class Run(NamedTuple):
    """What arrived of one run."""

    names: list[str]
    samples: dict[int, wire.Sample]
    losses: dict[int, float]
    ends: list[str]


def runs_on_ranks(server: Server, program: str, size: int) -> dict[str, Run]:
    """Run a program on several ranks to its end; return what arrived, by the names of the runs."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _BEGINNING + program, str(rank), str(size), port, server.url],
            env=environment(GRADWATCH_SPOOL_DIR=os.environ["GRADWATCH_SPOOL_DIR"]),
        )
        for rank in range(size)
    ]
    try:
        assert [rank.wait(4 * PATIENCE_SECONDS) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = {}
    for registration in server.registrations:
        batches = [batch for batch in server.batches if server.run_of[batch.id] == registration.id]
        found[registration.name] = Run(
            [parameter.name for parameter in registration.parameters],
            {sample.step: sample for batch in batches for sample in batch.samples},
            {
                step: wire.deserialise(value)
                for batch in batches
                if "loss" in batch.trail
                for step, value in zip(batch.trail["loss"].steps, batch.trail["loss"].values, strict=True)
            },
            [batch.end.status for batch in batches if batch.end is not None],
        )
    return found


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).double()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 3)).double()


def mean_square(model: nn.Module, step: int) -> torch.Tensor:
    loss: torch.Tensor = model(batch(step)).square().mean()
    return loss


def stages() -> nn.ModuleDict:
    found = nn.ModuleDict()
    for place in range(2):
        torch.manual_seed(place)
        found[f"stage{place}"] = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    return found


def pipeline() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]).double()


def check(
    run: Run, model: nn.Module, loss: Callable[[int], torch.Tensor], max_norm: float | None = None
) -> dict[int, float]:
    """Compare a run with the same training of the whole model in float64; return its losses."""
    assert run.names == [name for name, _ in model.named_parameters()]
    assert run.ends == ["completed"]
    assert list(run.samples) == list(range(1, STEPS + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        losses[step + 1] = value.item()
        sample = run.samples[step + 1]
        gradients = [norm(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        assert sample.statistics["grad_norm"].tolist() == pytest.approx(gradients, rel=1e-5)
        assert sample.statistics["weight_norm"].tolist() == pytest.approx([*map(norm, model.parameters())], rel=1e-5)
        total = torch.tensor(gradients).norm().item()
        assert wire.deserialise(sample.scalars["global_grad_norm"]) == pytest.approx(total, rel=1e-5)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            clipped = [norm(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
            assert sample.statistics["clipped_grad_norm"].tolist() == pytest.approx(clipped, rel=1e-5)
        optimizer.step()
    return losses


def test_every_parallelism_reports_the_whole_model(server: Server) -> None:
    """Norms, losses and the end of the run, with the process group destroyed before the last agent is closed."""
    runs = runs_on_ranks(server, _PROGRAM, 4)
    assert [event.kind for event in server.events] == []

    parallel = layers()
    check(runs["tp x dp"], parallel, partial(mean_square, parallel))

    sharded = layers()
    losses = check(runs["fsdp2 x tp"], sharded, partial(mean_square, sharded))
    assert runs["fsdp2 x tp"].losses == pytest.approx(losses, rel=1e-5)

    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"):
        flat = layers()
        losses = check(runs[f"fsdp1 {strategy}"], flat, partial(mean_square, flat), 0.05)
        assert runs[f"fsdp1 {strategy}"].losses == pytest.approx(losses, rel=1e-5)

    both = stages()

    def weighted(step: int) -> torch.Tensor:
        first, second = (each(batch(step)).square() for each in both.values())
        return torch.stack((first, 100 * second)).mean() * 2

    check(runs["pp x fsdp2"], both, weighted)

    piped = pipeline()
    halves: list[float] = []

    def loss(step: int) -> torch.Tensor:
        outputs, targets = piped(batch(step)), batch(100 + step)
        halves.append(nn.functional.mse_loss(outputs[:8], targets[:8]).item())
        return nn.functional.mse_loss(outputs, targets)

    check(runs["pp x dp"], piped, loss)
    # The loss of the first replica of the last stage, which is the sum over its two micro-batches.
    assert runs["pp x dp"].losses == pytest.approx({1: 2 * halves[0], 2: 2 * halves[1]}, rel=1e-5)


@pytest.fixture
def every_rank() -> Iterator[Callable[[int], None]]:
    """Return a function that makes this process a rank of eight, among which nothing is sent."""

    def become(rank: int) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)

    yield become
    distributed.destroy_process_group()


def on_a_mesh(
    names: tuple[str, str, str], placements: dict[str, tuple[tuple[str, ...], tuple[Placement, ...]]]
) -> nn.Module:
    """Return a module whose parameters lie on parts of a mesh of 2 x 2 x 2 ranks."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=names)
    module = nn.Module()
    for name, (dims, how) in placements.items():
        local = torch.zeros(2, 2)
        module.register_parameter(name, nn.Parameter(DTensor.from_local(local, mesh[dims], how, run_check=False)))
    module.register_parameter("plain", nn.Parameter(torch.zeros(3)))
    return module


def whole_model(become: Callable[[int], None], make: Callable[[], nn.Module]) -> tuple[WholeModel, dict[int, Holdings]]:
    holdings = {}
    for rank in range(8):
        become(rank)
        module = make()
        watched = list(find_parameters([module]))
        described = [info.to_wire(place) for place, info in enumerate(watched)]
        holdings[rank] = Holdings(described, holdings_of(watched, [module], rank), peers_of([module], rank))
    whole = WholeModel()
    whole.resolve(holdings)
    return whole, holdings


def reporters(whole: WholeModel, name: str) -> list[int]:
    index = [parameter.name for parameter in whole.parameters].index(name)
    return [rank for rank, indices in sorted(whole.reported.items()) if index in indices]


def test_each_shard_on_three_dims_is_reported_once(every_rank: Callable[[int], None]) -> None:
    """HSDP x tensor parallelism: of the copies along any dim, in the mesh of the parameter or outside of it, one."""

    def make() -> nn.Module:
        return on_a_mesh(
            ("replicate", "shard", "tp"),
            {
                "planned": (("replicate", "shard", "tp"), (Replicate(), Shard(0), Shard(1))),
                "copied": (("replicate", "shard", "tp"), (Replicate(), Shard(0), Replicate())),
                "outside": (("replicate", "shard"), (Replicate(), Shard(0))),
                "tensor_parallel": (("tp",), (Shard(1),)),
            },
        )

    whole, _ = whole_model(every_rank, make)
    assert whole.refused == []
    assert reporters(whole, "planned") == [0, 1, 2, 3]
    assert reporters(whole, "copied") == [0, 2]
    assert reporters(whole, "outside") == [0, 2]
    assert reporters(whole, "tensor_parallel") == [0, 1]
    assert reporters(whole, "plain") == [0]
    assert whole.stage_ranks == [0]


def test_stages_of_the_same_names_are_two_sets_of_parameters(every_rank: Callable[[int], None]) -> None:
    def make() -> nn.Module:
        return on_a_mesh(("pp", "shard", "tp"), {"weight": (("shard", "tp"), (Shard(0), Shard(1)))})

    whole, _ = whole_model(every_rank, make)
    assert whole.refused == []
    assert [parameter.name for parameter in whole.parameters] == [
        f"stage{stage}.{name}" for stage in (0, 1) for name in ("weight", "plain")
    ]
    assert reporters(whole, "stage0.weight") == [0, 1, 2, 3]
    assert reporters(whole, "stage1.weight") == [4, 5, 6, 7]
    assert [parameter.depth for parameter in whole.parameters] == [0, 1, 2, 3]


def test_what_does_not_fit_is_refused_and_never_summed(every_rank: Callable[[int], None]) -> None:
    """Names that PyTorch does not explain, a rank that did not attach, and shapes that differ."""
    whole, holdings = whole_model(
        every_rank, lambda: on_a_mesh(("a", "b", "c"), {"weight": (("b", "c"), (Shard(0), Shard(1)))})
    )
    without = {rank: known for rank, known in holdings.items() if rank != 2}
    partial = WholeModel()
    partial.resolve(without)
    assert "not every shard is reported" in partial.refused[0]
    assert reporters(whole, "weight") == [0, 1, 2, 3]
    unexplained = {
        rank: Holdings(known.parameters, known.held, list(known.held[0].ranks)) for rank, known in holdings.items()
    }
    refusing = WholeModel()
    refusing.resolve(unexplained)
    assert "ranks [4, 5, 6, 7] hold parameters of the same names as ranks [0, 1, 2, 3]" in refusing.refused[0]
    assert reporters(refusing, "weight") == [0, 1, 2, 3]
