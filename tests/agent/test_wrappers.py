"""Optimizers that have others step: one step of the training, measured and clipped once."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from tests.processes import LEAVE, free_port

from .conftest import OwnErrors, Server
from .watching import GRAD_A, Two, watch


class Around(torch.optim.Optimizer):
    """Has one or several others step, as those do that look ahead or join several."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        parameters = [p for one in inner for group in one.param_groups for p in group["params"]]
        super().__init__(parameters, {"lr": 0.0})
        self.inner = list(inner)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return [one.step(closure) for one in self.inner]


class Sam(torch.optim.Optimizer):
    """Steps from where it is with the gradient of where that would lead to."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.base = torch.optim.SGD(self.param_groups[0]["params"], lr=0.5)
        self.before: list[Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = self.param_groups[0]["params"]
        self.before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(100.0)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, before in zip(self.param_groups[0]["params"], self.before, strict=True):
            p.copy_(before)
        self.base.step()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def joined(model: Two) -> Around:
    return Around(torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0))


def single(model: Two) -> Around:
    return Around(torch.optim.SGD(model.parameters(), lr=0.0))


@pytest.mark.parametrize("make", [single, joined])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_clipping_by_norm_is_taken_out_once(
    server: Server, make: Callable[[Two], Around], closure: bool, given: bool
) -> None:
    model = Two()
    optimizer = make(model)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(GRAD_A, 12.0)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.3)
        return loss

    with watch(model, server, optimizer if given else None):
        for _ in range(2):
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 2]
    for step in (1, 2):
        assert server.values("grad_norm", step) == pytest.approx({"a": 5.0, "b": 12.0}, rel=1e-5)
        assert server.values("clipped_grad_norm", step) == pytest.approx({"a": 0.5, "b": 1.2}, rel=1e-5)
    assert server.trail("clip_norm") == pytest.approx({1: 13.0, 2: 13.0})


@pytest.mark.parametrize("make", [single, joined])
def test_agc_clips_once(server: Server, make: Callable[[Two], Around]) -> None:
    model = Two()
    optimizer = make(model)
    with watch(model, server, clip=gradwatch.AGC(0.013, exclude=())):
        for _ in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            optimizer.step()
    for step in (1, 2):
        assert server.values("grad_norm", step) == {"a": 5.0, "b": 12.0}
        assert server.values("clipped_unit_share", step) == {"a": 0.5, "b": 1.0}
        assert server.scalar("removed_grad_norm", step) == pytest.approx(12.937, rel=1e-4)


def test_agc_clips_once_to_the_last_bit(server: Server) -> None:
    """What is clipped again is not what it was, in some of many units: 0.1 times a norm, rounded, may be above it."""
    model, alike = nn.Linear(7, 500), nn.Linear(7, 500)
    alike.load_state_dict(model.state_dict())
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.randn(1, 7)
    with watch(model, server, clip=gradwatch.AGC(0.1, exclude=())):
        model(x).square().sum().backward()
        optimizer.step()
    alike(x).square().sum().backward()
    gradwatch.adaptive_clip_grad_(alike, 0.1)
    assert model.weight.grad is not None
    assert alike.weight.grad is not None
    assert torch.equal(model.weight.grad, alike.weight.grad)


def test_what_an_outer_one_clips_itself_is_known(server: Server) -> None:
    class Clipping(Around):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            clip_grad_norm_([p for one in self.inner for p in one.param_groups[0]["params"]], 1.3)
            return super().step(closure)

    model = Two()
    optimizer = Clipping(torch.optim.SGD(model.parameters(), lr=0.0))
    with watch(model, server):
        for _ in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            optimizer.step()
    for step in (1, 2):
        assert server.values("grad_norm", step) == pytest.approx({"a": 5.0, "b": 12.0}, rel=1e-5)
    assert server.trail("clip_norm") == pytest.approx({1: 13.0, 2: 13.0})


def test_the_inner_one_that_was_given_is_measured_in_silence(server: Server, own_errors: OwnErrors) -> None:
    """``attach`` is handed the outer one, and takes what it finds under ``optimizer`` for the one that steps."""

    class Ahead(Around):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner)
            self.optimizer = inner

    model = Two()
    optimizer = Ahead(torch.optim.SGD(model.parameters(), lr=0.0))
    with watch(model, server, optimizer):
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert not own_errors.warnings


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_sam_is_measured_where_it_steps(server: Server, own_errors: OwnErrors, closure: bool, given: bool) -> None:
    """Its second gradient, with the weights as they are before the step, not 100 further on."""
    model = Two()
    optimizer = Sam(model.parameters())

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(GRAD_A, 12.0)
        loss.backward()
        return loss

    with watch(model, server, optimizer if given else None):
        for _ in range(3):
            optimizer.zero_grad()
            model([[1.0] * 3] * 2, 1.0).backward()
            if closure:
                optimizer.step(evaluate)
            else:
                optimizer.first_step()
                evaluate()
                optimizer.second_step()
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.values("grad_norm", 1) == {"a": 5.0, "b": 12.0}
    assert server.values("weight_norm", 1) == pytest.approx({"a": 13**0.5, "b": 4.0})
    updates = [server.values("update_norm", step) for step in (1, 2, 3)]
    assert {name: max(values[name] for values in updates) for name in ("a", "b")} == pytest.approx({"a": 2.5, "b": 6.0})
    assert not own_errors.warnings


def test_a_step_that_raised_leaves_no_trace(server: Server) -> None:
    """The next optimizer that steps is not taken for a part of it."""
    model = Two()

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ValueError("out of memory")

    failing, optimizer = Failing([model.a], lr=0.0), torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server):
        for _ in range(3):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            with pytest.raises(ValueError, match="out of"):
                failing.step()
            optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}


_ZERO = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
import gradwatch
from gradwatch.monitor.guard import Guard
Guard.raises_own_errors = True
rank, port, url, kind = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
def trained(watched):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.SGD, lr=0.1)
    clip = gradwatch.AGC(0.02, exclude=()) if kind == "agc" else None
    agent = gradwatch.attach(parallel, url=url, every=1, clip=clip) if watched else None
    norms = {}
    for step in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(4, 6, generator=torch.Generator().manual_seed(2 * step + rank))).square().sum().backward()
        norms = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
        if kind == "norm":
            nn.utils.clip_grad_norm_(parallel.parameters(), 0.1)
        if kind == "agc" and not watched:
            gradwatch.adaptive_clip_grad_(model, 0.02)
        optimizer.step()
    if watched:
        agent.close()
        assert not agent._session.monitor.dropped.errors
    return [p.tolist() for p in model.parameters()], norms
plain, norms = trained(False)
assert trained(True)[0] == plain
if rank == 0:
    print(json.dumps(norms))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["norm", "agc"])
def test_zero_redundancy_on_two_ranks(server: Server, kind: str) -> None:
    """Rank 0 knows all gradients, although it steps only its share of the weights."""
    port = str(free_port())
    command = [sys.executable, "-W", "ignore", "-c", _ZERO + LEAVE]
    ranks = [
        subprocess.Popen([*command, str(rank), port, server.url, kind], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    (out, _), _ = (process.communicate(timeout=400) for process in ranks)
    assert [process.returncode for process in ranks] == [0, 0]
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    expected = json.loads(out)
    assert server.values("grad_norm", 3) == pytest.approx(expected, rel=1e-4)
    if kind == "norm":
        total = sum(norm**2 for norm in expected.values()) ** 0.5
        clipped = {name: norm * 0.1 / total for name, norm in expected.items()}
        assert server.values("clipped_grad_norm", 3) == pytest.approx(clipped, rel=1e-4)
    else:
        assert max(server.values("clipped_unit_share", 3).values()) > 0
