"""AGC inside the agent: the same gradients as the function gives, in every kind of training, and what is reported."""

import logging
import multiprocessing
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import wire
from gradwatch.agent import Agent
from gradwatch.clipping.classifier import ClassifierFinder
from gradwatch.clipping.executor import AgcExecutor
from gradwatch.hooks import torch_hooks
from gradwatch.monitor.guard import Guard
from gradwatch.recording import recorder
from tests.processes import LEAVE, free_port

from .conftest import OwnErrors, Server
from .watching import monitor_of

CLIP = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return 5 * torch.randn(6, 1, 6, 6, generator=generator), torch.randint(3, (6,), generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs, targets = batch(step)
    return nn.functional.cross_entropy(model(inputs), targets)


def clip_by_hand(model: nn.Module, **options: Any) -> None:
    """The reference: the stand-alone function, which has an oracle of its own, with the classifier named by hand."""
    gradwatch.adaptive_clip_grad_(model, options.pop("clip", CLIP), **{"exclude": ["6.weight"], **options})


def train(
    model: nn.Module, steps: int, before_step: Callable[[nn.Module], None] = lambda _: None, lr: float = 0.5
) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before_step(model)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def attached(model: nn.Module, server: Server, clip: Any = CLIP, every: int | None = 1) -> Agent:
    return gradwatch.attach(model, url=server.url, every=every, clip=clip)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("granularity", ["unit", "tensor"])
def test_every_step_is_clipped_as_the_function_does(server: Server, every: int, granularity: Any) -> None:
    theirs = train(network(), 8, lambda model: clip_by_hand(model, granularity=granularity))
    model = network()
    with attached(model, server, gradwatch.AGC(CLIP, granularity=granularity), every):
        ours = train(model, 8)
    assert same(ours, theirs)
    assert not same(ours, train(network(), 8))


def test_what_is_reported_is_what_was_done(server: Server) -> None:
    model = network()
    with attached(model, server, gradwatch.AGC(CLIP, exclude=["6.*"])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss_of(model, 0).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        after = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = {name: float(grad.double().norm()) for name, grad in before.items()}
    assert server.values("grad_norm") == pytest.approx(norm, rel=1e-5)
    clipped = {name: float(grad.double().norm()) for name, grad in after.items()}
    assert server.values("clipped_grad_norm") == pytest.approx(clipped, rel=1e-5)
    shares = {
        name: float((before[name] != after[name]).flatten(1).any(1).double().mean())
        if grad.dim() > 1
        else float((before[name] != after[name]).any())
        for name, grad in before.items()
    }
    assert server.values("clipped_unit_share") == pytest.approx(shares)
    assert shares["6.weight"] == shares["6.bias"] == 0.0
    assert shares["4.weight"] > 0.0
    removed = sum(float((before[name] - after[name]).double().square().sum()) for name in before) ** 0.5
    assert server.scalar("removed_grad_norm") == pytest.approx(removed, rel=1e-4)
    assert server.scalar("clipped_global_grad_norm") == pytest.approx(sum(n**2 for n in clipped.values()) ** 0.5)
    registration = server.registrations[-1]
    assert registration.attributes["agc_clip"] == str(CLIP)
    assert registration.attributes["agc"] == "unit"


def test_the_histogram_counts_every_unit_once_by_depth(server: Server) -> None:
    model = network()
    with attached(model, server, clip=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss_of(model, 0).backward()
        optimizer.step()
    counts = server.samples[-1].histograms
    assert set(counts) == {f"unit_ratio_{third}_third" for third in ("first", "middle", "last")}
    # Eight parameters in the order of depth: 0-2 in the first third, 3-5 in the middle, 6-7 in the last;
    # the classifier's weight (6) is not counted, AGC would leave it alone.
    assert [sum(counts[f"unit_ratio_{third}_third"]) for third in ("first", "middle", "last")] == [4 + 1 + 1, 10, 1]


def test_the_classifier_is_found_in_the_graph_wherever_it_is_registered(server: Server) -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)
            self.body = nn.Linear(36, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.body(x.flatten(1)).relu()))

    model = HeadFirst()
    with attached(model, server, 1e-4):
        penalty = 1e-3 * sum(parameter.square().sum() for parameter in model.parameters())
        (loss_of(model, 0) + penalty).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    left_alone = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.equal(before[name])]
    assert left_alone == ["head.weight"]


class Unrolled(nn.Module):
    """A cell written by hand that adds up what it gets, with an answer after each step: each follows all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 2)
        self.cell = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state, answers = torch.zeros(x.shape[1], 4), []
        for part in x:
            state = self.cell(part) + 0.9 * state
            answers.append(self.readout(state.tanh()))
        return torch.stack(answers)


def classifier_of(model: nn.Module) -> ClassifierFinder:
    indices = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    return ClassifierFinder(lambda tensor: indices.get(id(tensor)))


def test_the_search_for_the_classifier_visits_no_node_twice_and_gives_up_in_vain() -> None:
    model = Unrolled()
    classifier = classifier_of(model)
    loss = model(torch.randn(1000, 2, 3)).square().mean()
    started = time.thread_time()
    assert classifier.search([loss])
    assert time.thread_time() - started < 1.5, "several times as long where each answer is followed to its beginning"
    assert classifier.indices == {0}
    for _ in range(5):
        assert not classifier.search([loss])
    started = time.thread_time()
    for _ in range(1000):
        assert not classifier.search([loss])
    assert time.thread_time() - started < 0.5, "it does not look any more"
    assert classifier.indices == {0}
    assert not classifier.guessed


def test_a_graph_that_is_too_large_is_read_in_part() -> None:
    """There is no answer then, and the clipper says what it takes for the classifier.

    Of a chain of 60,000 nodes that Python has seen torch overflows the stack when it is freed.
    """
    model = Unrolled()
    classifier = classifier_of(model)
    answer = model(torch.randn(3, 1, 3)).sum()
    for _ in range(120_000):
        answer = answer + 1.0
    started = time.thread_time()
    assert not classifier.search([answer])
    assert time.thread_time() - started < 2.0
    assert not classifier.indices


def test_where_the_graph_does_not_tell_the_guess_is_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    compiled: Any = torch.compile(model, backend="aot_eager")
    theirs = train(network(), 4, clip_by_hand)
    with caplog.at_level(logging.WARNING, "gradwatch"), attached(compiled, server):
        ours = train(compiled, 4)
    assert same(ours, theirs)
    assert [record.message for record in caplog.records if "6.weight" in record.message]
    caplog.clear()
    with attached(compiled, server, gradwatch.AGC(CLIP, exclude=["6.weight"])):
        train(compiled, 1)
    assert not caplog.records


@pytest.mark.parametrize("exclude", [["4.*", "6.weight"], "6.weight", ()])
def test_what_the_user_excludes(server: Server, exclude: Any) -> None:
    theirs = train(network(), 3, lambda model: clip_by_hand(model, exclude=exclude))
    model = network()
    with attached(model, server, gradwatch.AGC(CLIP, exclude=exclude)):
        assert same(train(model, 3), theirs)


def test_unusable_options_are_refused_before_anything_starts(server: Server) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"'head\.\*' matches no parameter"):
        attached(model, server, gradwatch.AGC(exclude=["head.*"]))
    with pytest.raises(ValueError, match=r"clip=0.0: the largest ratio"):
        attached(model, server, 0.0)
    with pytest.raises(ValueError, match=r"clip='yes'"):
        attached(model, server, "yes")
    with pytest.raises(ValueError, match="granularity='row'"):
        gradwatch.AGC(granularity="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"experts: 0.bias has shape \(4,\)"):
        attached(model, server, gradwatch.AGC(experts="0.bias"))
    assert not server.requests


def test_groups_have_thresholds_of_their_own(server: Server) -> None:
    model = network()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "clip": 1e-3},
        {"params": [*model[1].parameters(), *model[4].parameters()]},
        {"params": model[6].parameters(), "clip": None},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with attached(model, server):
        loss_of(model, 0).backward()
        reference = network()
        loss_of(reference, 0).backward()
        optimizer.step()
        gradwatch.adaptive_clip_grad_(reference[0], 1e-3)
        gradwatch.adaptive_clip_grad_(nn.Sequential(reference[1], reference[4]), CLIP)
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        assert all(
            ours.grad is not None and theirs.grad is not None and ours.grad.equal(theirs.grad) for ours, theirs in pairs
        )
        optimizer.param_groups[0]["clip"] = -1.0
        with pytest.raises(ValueError, match=r"clip=-1.0"):
            optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_loss_scaler(server: Server, fused: bool) -> None:
    def run(model: nn.Sequential, before_step: Callable[[nn.Module, float], None]) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 1:
                gradients(model)[0][0, 0, 0, 0] = float("inf")
            before_step(model, scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        return [parameter.detach().clone() for parameter in model.parameters()]

    def clip_scaled(model: nn.Module, scale: float) -> None:
        """Unscale, clip and scale again: a power of two changes nothing but the exponent."""
        grads = gradients(model)
        if all(bool(grad.isfinite().all()) for grad in grads):
            torch._foreach_mul_(grads, 1 / scale)
            clip_by_hand(model)
            torch._foreach_mul_(grads, scale)

    theirs = run(network(), clip_scaled)
    model = network()
    with attached(model, server):
        ours = run(model, lambda _model, _scale: None)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)
    assert len(server.samples) == 3


def test_accumulation_clips_once_the_sum(server: Server) -> None:
    def run(model: nn.Module, before_step: Callable[[nn.Module], None] = lambda _: None) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(3):
                loss_of(model, 10 * step + part).backward()
            before_step(model)
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    theirs = run(network(), clip_by_hand)
    model = network()
    with attached(model, server):
        assert same(run(model), theirs)


def test_every_evaluation_of_a_closure_is_clipped(server: Server) -> None:
    def run(model: nn.Module, after: Callable[[nn.Module], None] = lambda _: None) -> list[Tensor]:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            after(model)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return [parameter.detach().clone() for parameter in model.parameters()]

    theirs = run(network(), clip_by_hand)
    model = network()
    with attached(model, server):
        assert same(run(model), theirs)
    assert len(server.samples) == 3


def test_a_compiled_step_is_clipped(server: Server) -> None:
    theirs = train(network(), 3, clip_by_hand)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    step: Any = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings(), attached(model, server):
        warnings.simplefilter("ignore")
        for index in range(3):
            optimizer.zero_grad()
            loss_of(model, index).backward()
            step()
    assert same([parameter.detach() for parameter in model.parameters()], theirs)


def test_half_precision_and_a_bad_unit(server: Server) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).to(torch.bfloat16)
    nn.init.ones_(next(model.parameters()))
    with attached(model, server, gradwatch.AGC(0.5, exclude=())):
        model[0].weight.grad = torch.tensor(
            [[4.0, 0, 0, 0], [float("nan"), 100.0, 0, 0], [0.25, 0, 0, 0]], dtype=torch.bfloat16
        )
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        grad = model[0].weight.grad.float()
    assert grad[0].tolist() == [1.0, 0, 0, 0]
    assert grad[1].isnan().tolist() == [True, False, False, False]
    assert grad[1, 1] == 100.0
    assert grad[2].tolist() == [0.25, 0, 0, 0]
    assert server.values("clipped_unit_share") == pytest.approx({"0.weight": 1 / 3})
    assert server.values("nonfinite_count") == {"0.weight": 1.0}


def test_experts_are_clipped_row_by_row(server: Server) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stacked = nn.Parameter(torch.ones(2, 3, 4))
            self.flat = nn.Parameter(torch.ones(2, 3, 4))

        def forward(self) -> Tensor:
            return (self.stacked * torch.arange(24.0).view(2, 3, 4)).sum()

    model, reference = Experts(), Experts()
    loss: Tensor = reference()
    loss.backward()
    gradwatch.adaptive_clip_grad_(reference, 1.0, experts=["stacked"])
    with attached(model, server, gradwatch.AGC(1.0, exclude=(), experts="stacked")):
        model().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert model.stacked.grad is not None
    assert reference.stacked.grad is not None
    assert model.stacked.grad.equal(reference.stacked.grad)
    assert model.stacked.grad.norm(dim=2).flatten().tolist() == pytest.approx([2.0] * 6)
    assert [parameter.units for parameter in server.registrations[-1].parameters] == [6, 2]


def test_an_error_in_clipping_is_raised_and_one_in_monitoring_is_not(
    server: Server, monkeypatch: pytest.MonkeyPatch, own_errors: OwnErrors
) -> None:
    monkeypatch.setattr(Guard, "raises_own_errors", False)
    theirs = train(network(), 6, clip_by_hand)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken on purpose")

    model = network()
    with monkeypatch.context() as patch, attached(model, server):
        patch.setattr(recorder, "recompute", broken)
        assert same(train(model, 6), theirs)
    # Monitoring has disarmed after three errors, clipping went on.
    assert len(own_errors.seen) == 3
    own_errors.seen.clear()
    model = network()
    with monkeypatch.context() as patch, attached(model, server):
        patch.setattr(AgcExecutor, "clip", broken)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            train(model, 1)


def test_a_closed_agent_clips_no_more(server: Server) -> None:
    model = network()
    attached(model, server).close()
    assert same(train(model, 2), train(network(), 2))


def _train_in_child(model: nn.Module, path: str) -> None:
    torch.save(train(model, 3), path)


def test_a_forked_child_is_clipped_too(server: Server, tmp_path: Path) -> None:
    model = network()
    with attached(model, server, gradwatch.AGC(CLIP, exclude=["6.weight"])):
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_train_in_child, args=(model, str(tmp_path / "child.pt")))
        child.start()
        child.join(60)
    assert child.exitcode == 0
    assert same(torch.load(tmp_path / "child.pt"), train(network(), 3, clip_by_hand))
    assert not server.samples


_RANKS = """
import sys
import torch, torch.distributed as dist
from torch import nn
import gradwatch, gradwatch.samples.collector
rank, port, url, kind, granularity, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 7, bias=False), nn.Linear(7, 1))
net = model
if kind == "ddp":
    net = nn.parallel.DistributedDataParallel(model)
elif kind == "fsdp":
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
gradwatch.samples.collector._LAST_PARTS_SECONDS = 60.0
with gradwatch.attach(net, optimizer, url=url, every=1, clip=gradwatch.AGC(0.05, granularity=granularity)):
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(step))
        part = x if kind == "alone" else x[:, rank]
        (9 * net(part)).square().mean().backward()
        optimizer.step()
full = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
if rank == 0 or kind == "alone":
    torch.save(full, out)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("granularity", ["unit", "tensor"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_several_ranks_clip_what_one_would(server: Server, tmp_path: Path, kind: str, granularity: str) -> None:
    port = str(free_port())
    out = tmp_path / "ranks.pt"
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                _RANKS + LEAVE,
                str(rank),
                port,
                server.url,
                kind,
                granularity,
                str(out),
            ]
        )
        for rank in range(2)
    ]
    assert [process.wait(300) for process in ranks] == [0, 0]

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 7, bias=False), nn.Linear(7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(step))
        (9 * model(x)).square().mean().backward()
        gradwatch.adaptive_clip_grad_(model, 0.05, granularity=granularity, exclude=["4.weight"])  # type: ignore[arg-type]
        optimizer.step()
    for ours, theirs in zip(torch.load(out), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert np.all(server.samples[0].statistics["grad_norm"] != wire.MISSING)


def test_a_layer_that_is_replaced_is_clipped_and_watched(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, url=server.url, every=1, clip=gradwatch.AGC(CLIP, exclude=())):
        loss_of(model, 0).backward()
        optimizer.step()
        model[4] = nn.Linear(64, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        (1e3 * loss_of(model, 1)).backward()
        optimizer.step()
    weight = next(model[4].parameters())
    assert weight.grad is not None
    ratios = weight.grad.norm(dim=1) / weight.detach().norm(dim=1)
    assert float(ratios.max()) <= CLIP * 1.001
    assert server.values("grad_norm")["4.weight"] > 1.0


def test_an_optimizer_made_anew_takes_the_place_of_the_one_that_is_gone(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with gradwatch.attach(model, optimizer, url=server.url, every=1, clip=CLIP):
        del optimizer
        assert same(train(model, 3), train(network(), 3, clip_by_hand))
    assert len(server.samples) == 3


def test_what_is_not_clipped_is_said(server: Server, own_errors: OwnErrors) -> None:
    model, other = network(), nn.Linear(2, 2)
    listed = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with gradwatch.attach(model, listed, url=server.url, every=1, clip=gradwatch.AGC(CLIP, exclude=())):
        loss_of(model, 0).backward()
        listed.step()
        assert own_errors.warnings == 1
        with pytest.raises(RuntimeError, match="was not given to attach"):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert own_errors.warnings == 2


def test_an_optimizer_of_copies_is_refused(server: Server) -> None:
    """Float32 copies of the parameters are what it steps: their gradients were never seen."""
    model = network().bfloat16()
    optimizer = torch.optim.SGD([p.detach().float() for p in model.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="SGD steps no parameter of the model"):
        gradwatch.attach(model, optimizer, url=server.url, clip=CLIP)
    assert not torch_hooks.listeners()


def test_an_optimizer_of_copies_is_said_where_nothing_is_clipped(server: Server, own_errors: OwnErrors) -> None:
    model = network()
    optimizer = torch.optim.SGD([p.detach().clone() for p in model.parameters()], lr=0.1)
    gradwatch.attach(model, optimizer, url=server.url).close()
    assert own_errors.warnings == 1


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("how", ["copies", "by hand"])
def test_what_no_optimizer_steps_is_said_once(
    server: Server, own_errors: OwnErrors, how: str, clip: float | None
) -> None:
    model = network()
    copies = torch.optim.SGD([p.detach().clone() for p in model.parameters()], lr=0.1)
    with gradwatch.attach(model, url=server.url, clip=clip):
        for batch in range(30 if how == "copies" else 250):
            model.zero_grad()
            loss_of(model, batch % 3).backward()
            if how == "copies":
                copies.step()
    assert own_errors.warnings == 1
    [event] = server.events
    assert event.kind == "not_stepped"
    assert ("nothing is clipped" in event.message) == (clip is not None)


@pytest.mark.parametrize("how", ["accumulation", "evaluation", "another optimizer beside"])
def test_what_is_stepped_in_its_own_time_is_not_complained_of(server: Server, own_errors: OwnErrors, how: str) -> None:
    model, other = network(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    with gradwatch.attach(model, url=server.url, clip=gradwatch.AGC(CLIP, exclude=())):
        for batch in range(150 if how == "accumulation" else 30):
            if how == "evaluation":
                torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
                others.step()
            else:
                loss_of(model, batch % 3).backward()
            if how == "another optimizer beside" and batch % 10 == 9:
                others.step()
                optimizer.step()
        optimizer.step()
    assert own_errors.warnings == 0


def test_a_norm_beyond_float32_is_clipped_all_the_same(server: Server) -> None:
    model = nn.Linear(4, 3, bias=False)
    nn.init.ones_(model.weight)
    with attached(model, server, gradwatch.AGC(0.5, exclude=())):
        model.weight.grad = torch.full((3, 4), 1e25)
        model.weight.grad[1] = float("inf")
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert model.weight.grad[0].norm() == pytest.approx(1.0)
    assert model.weight.grad[1].isinf().all()


def test_a_frozen_classifier_leaves_nobody_alone(server: Server) -> None:
    model = network()
    model[6].requires_grad_(requires_grad=False)
    with attached(model, server, 1e-4):
        loss_of(model, 0).backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert server.values("clipped_unit_share")["4.weight"] > 0


def test_the_spectral_norm_does_not_hide_the_layers(server: Server) -> None:
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(spectral(nn.Linear(4, 6)), nn.Tanh(), spectral(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2))
    with attached(model, server, 1e-5):
        model(torch.randn(5, 4)).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    shares = server.values("clipped_unit_share")
    assert shares["2.parametrizations.weight.original"] > 0
    assert shares["4.weight"] == 0


def test_a_child_can_stop_clipping(server: Server, tmp_path: Path) -> None:
    model = network()
    agent = attached(model, server, gradwatch.AGC(CLIP, exclude=()))

    def work() -> None:
        agent.close()
        torch.save(train(model, 2), tmp_path / "child.pt")

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    agent.close()
    assert child.exitcode == 0
    assert same(torch.load(tmp_path / "child.pt"), train(network(), 2))


def test_two_threads_step_what_one_agent_watches(server: Server) -> None:
    """Each step is clipped by its own gradients, and reported with their norms."""
    models = [nn.ParameterList(nn.Parameter(torch.ones(50, 50)) for _ in range(10)) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    wrong: list[str] = []

    def go(number: int) -> None:
        for step in range(1, 201):
            size = step + 1000.0 * number
            for parameter in models[number]:
                parameter.grad = torch.full((50, 50), size)
            optimizers[number].step()
            clipped = torch.full((50, 50), min(size, CLIP))
            grads = [parameter.grad for parameter in models[number] if parameter.grad is not None]
            wrong.extend(f"{step} of {number}" for grad in grads if not torch.allclose(grad, clipped))

    with gradwatch.attach(models, optimizers, url=server.url, every=1, clip=gradwatch.AGC(CLIP, exclude=())) as agent:
        threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert monitor_of(agent).guard.watching
    assert not wrong
    places = np.array([int(name.partition(".")[0]) for name in server.names])
    assert server.samples
    for sample in server.samples:
        sizes = sample.statistics["grad_norm"] / 50.0
        known = np.isfinite(sizes) & (sizes >= 0)
        steps = (sizes - 1000.0 * places)[known]
        assert steps == pytest.approx(steps.round(), abs=1e-2)
        assert ((steps > 0.5) & (steps < 200.5)).all()


def test_a_step_in_inference_mode_comes_first(server: Server) -> None:
    """What is made there could not be written to afterwards."""
    model = nn.Sequential(*(nn.Linear(3, 2, bias=False) for _ in range(4)))
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=1, clip=gradwatch.AGC(1e6, exclude=())) as agent:
        for step in range(4):
            for weight in weights:
                weight.grad = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
            with torch.inference_mode(step == 0):
                optimizer.step()
        assert monitor_of(agent).guard.watching
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4]
    for sample in server.samples:
        assert sample.statistics["grad_norm"].tolist() == [5.0] * 4
    for step in range(3):
        with torch.inference_mode(step == 0):
            gradwatch.adaptive_clip_grad_(model, 1e6)


def test_a_default_device_is_not_the_agents(server: Server) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=1, clip=gradwatch.AGC(CLIP, exclude=())):
        model.weight.grad = torch.full((2, 3), 100.0)
        with torch.device("meta"):
            optimizer.step()
    limit = model.weight.detach().norm(dim=1).clamp(min=1e-3) * CLIP
    assert model.weight.grad.norm(dim=1).tolist() == pytest.approx(limit.tolist(), rel=1e-5)
    assert len(server.samples) == 1
