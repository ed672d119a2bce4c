"""The essentials: attach, train, and what was measured is at the server; the training does not notice."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import wire
from gradwatch.settings import SettingsError

from .conftest import OwnErrors, Server
from .watching import monitor_of


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = model(torch.randn(4, 5)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def truth(model: nn.Module) -> dict[str, float]:
    return {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}


def test_what_is_measured_arrives_and_is_true(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1, project="p", run="first") as agent:
        assert re.fullmatch(r"run-[0-9a-f]{16}", agent.run_id)
        assert agent.run_url == f"{server.url}/runs/{agent.run_id}"
        losses, truths, weights = {}, {}, {}
        for place in range(1, 4):
            weights[place] = {name: float(p.detach().double().norm()) for name, p in model.named_parameters()}
            losses[place] = float(step(model, optimizer))
            truths[place] = truth(model)
    registration = server.registrations[0]
    assert (registration.project, registration.name, registration.id) == ("p", "first", agent.run_id)
    described = registration.parameters[0]
    assert (described.name, described.shape, described.units, described.kind) == ("0.weight", [7, 5], 7, "Linear")
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    for place in losses:
        assert server.values("grad_norm", place) == pytest.approx(truths[place], rel=1e-6)
        assert server.values("weight_norm", place) == pytest.approx(weights[place], rel=1e-6)
    assert server.trail("loss") == pytest.approx(losses)
    assert server.scalar("learning_rate") == pytest.approx(0.1)
    assert server.scalar("global_grad_norm", 3) == pytest.approx(np.sqrt(sum(v**2 for v in truths[3].values())))
    end = server.batches[-1].end
    assert end is not None
    assert end.status == "completed"
    assert {batch.attempt for batch in server.batches} == {registration.attempt}
    assert abs(registration.attempt / 1000 - time.time()) < 60


def test_depth_is_the_order_from_input_to_output(server: Server) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(7, 3)
            self.first = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x).tanh())
            return out

    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        step(model, optimizer)
    assert [parameter.depth for parameter in server.registrations[0].parameters] == [0, 1, 2, 3]
    depths = {parameter.name: parameter.depth or 0 for parameter in server.registrations[-1].parameters}
    assert max(depths["first.weight"], depths["first.bias"]) < min(depths["last.weight"], depths["last.bias"])


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD foreach=False": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 3, None])
def test_training_is_bit_identical(server: Server, name: str, every: int | None) -> None:
    def train(*, watched: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.ReLU(), nn.Linear(9, 3))
        optimizer = OPTIMIZERS[name](model.parameters())
        agent = gradwatch.attach(model, optimizer, url=server.url, every=every) if watched else None
        for _ in range(12):
            step(model, optimizer)
        if agent is not None:
            agent.close()
        return [parameter.detach().clone() for parameter in model.parameters()]

    before = torch.get_rng_state(), torch.get_num_threads()
    plain, watched = train(watched=False), train(watched=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.get_num_threads() == before[1]
    assert server.samples


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("kind", ["LBFGS", "loss scaler", "loss scaler fused", "norm", "value", "bf16", "accumulation"])
def test_training_is_bit_identical_in_its_other_forms(server: Server, kind: str, every: int | None) -> None:
    def train(*, watched: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.3), nn.ReLU(), nn.Linear(9, 3))
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused="fused" in kind)
        if kind == "LBFGS":
            optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled="scaler" in kind)

        def closure() -> Tensor:
            optimizer.zero_grad()
            for _ in range(2 if kind == "accumulation" else 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
                    loss: Tensor = model(torch.randn(4, 5)).square().mean()
                scaler.scale(loss).backward()
            if kind == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            if kind == "value":
                nn.utils.clip_grad_value_(model.parameters(), 0.001)
            return loss

        agent = gradwatch.attach(model, optimizer, url=server.url, every=every) if watched else None
        for _ in range(8):
            if kind == "LBFGS":
                optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                scaler.step(optimizer)
                scaler.update()
        if agent is not None:
            agent.close()
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain, watched = train(watched=False), train(watched=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert server.samples


def test_every_step_keeps_what_costs_one_scalar(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, clipped = {}, {}
    with gradwatch.attach(model, optimizer, url=server.url, every=5):
        for place in range(1, 13):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 5)).square().mean()
            loss.backward()
            clipped[place] = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
            losses[place] = float(loss.detach())
            optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 6, 11]
    assert server.trail("loss") == pytest.approx(losses)
    assert server.trail("clip_norm") == pytest.approx(clipped)


def test_the_default_setting_samples_what_the_budget_allows(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url):
        for _ in range(60):
            step(model, optimizer)
    # A sample costs far more than 1% of so short a step: after the first burst none can be paid for.
    assert [sample.step for sample in server.samples] == list(range(1, 21))
    assert len(server.trail("loss")) == 60


def test_a_sample_carries_the_numbers_of_the_run_that_the_documentation_names(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    started = time.perf_counter()
    with gradwatch.attach(model, optimizer, url=server.url, every=3, clip=gradwatch.AGC(0.01, exclude=[])) as agent:
        for _ in range(7):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 5)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    took = time.perf_counter() - started
    assert [sample.step for sample in server.samples] == [1, 4, 7]
    found = {name: wire.deserialise(value) for name, value in server.samples[-1].scalars.items()}
    documentation = (Path(__file__).parents[2] / "docs" / "agent.md").read_text(encoding="utf-8")
    table = documentation.partition("| per run, at a sample |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`([a-z_.1]+)`", row.split("|")[1])}
    assert found.keys() == named - {"global_grad_norm_limit"}, "nothing here is clipped by its norm"
    assert (found["interval_steps"], found["loss_scale"], found["skipped_steps"]) == (3.0, 4.0, 0.0)
    assert (found["learning_rate"], found["learning_rate.1"]) == pytest.approx((0.1, 0.1))
    assert (found["dropped_samples"], found["dropped_bytes"]) == (0.0, 0.0)
    assert 0 < found["step_seconds"] < took
    assert 0 < found["agent_seconds"] <= monitor_of(agent).guard.spent_seconds < took
    assert found["overhead_ratio"] > 0


def test_log_adds_to_the_next_step(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        step(model, optimizer)
        agent.log(loss=7.5, accuracy=torch.tensor(0.25), precision=np.float32(0.5), share=Fraction(1, 4))
        step(model, optimizer)
        with pytest.raises(TypeError, match=r"log\(name=...\) takes a number"):
            agent.log(name="0.5")  # type: ignore[arg-type]  # what the test is about
        with pytest.raises(TypeError, match=r"log\(norms=...\) takes one number"):
            agent.log(norms=torch.zeros(3))
    assert server.trail("accuracy") == server.trail("share") == {2: 0.25}
    assert server.trail("precision") == {2: 0.5}
    assert server.trail("loss")[2] == 7.5


def test_what_is_logged_after_the_last_step_belongs_to_it(server: Server) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url) as agent:
        agent.log(accuracy=0.25)
        step(model, optimizer)
        agent.log(accuracy=0.5)
        step(model, optimizer)
        agent.log(accuracy=torch.tensor(0.75), best=2)
    assert server.trail("accuracy") == {1: 0.25, 2: 0.75}
    assert server.trail("best") == {2: 2.0}
    trails = [batch.trail["accuracy"].steps for batch in server.batches if "accuracy" in batch.trail]
    assert all(len(set(steps)) == len(steps) for steps in trails)


def test_a_run_can_be_resumed_by_its_id(server: Server) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as first:
        step(model, optimizer)
        step(model, optimizer)
    with gradwatch.attach(model, optimizer, url=server.url, every=1, run=first.run_id) as second:
        step(model, optimizer)
    assert second.run_id == first.run_id
    attempts = sorted({registration.attempt for registration in server.registrations})
    assert len(attempts) == 2
    assert [sample.step for batch in server.batches if batch.attempt == attempts[1] for sample in batch.samples] == [3]


RESUMED = f"run-{'ab' * 8}"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("run", [None, RESUMED])
def test_steps_go_on_from_where_the_user_says(server: Server, kind: Any, run: str | None) -> None:
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    step(model, optimizer)
    with gradwatch.attach(model, optimizer, url=server.url, every=1, run=run, step=41):
        step(model, optimizer)
        step(model, optimizer)
    assert [sample.step for sample in server.samples] == [42, 43]


@pytest.mark.parametrize("given", [True, False])
def test_a_state_that_is_loaded_after_attaching_tells_the_step(server: Server, given: bool) -> None:
    model = network()
    before = torch.optim.Adam(model.parameters())
    for _ in range(5):
        step(model, before)
    optimizer = torch.optim.Adam(model.parameters())
    with gradwatch.attach(model, optimizer if given else None, url=server.url, every=1, run=RESUMED):
        optimizer.load_state_dict(before.state_dict())
        step(model, optimizer)
        step(model, optimizer)
    assert [sample.step for sample in server.samples] == [6, 7]


def test_a_resumed_run_of_which_nothing_tells_the_step_says_what_to_pass(server: Server, own_errors: OwnErrors) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    with gradwatch.attach(model, optimizer, url=server.url, every=1, run=RESUMED):
        step(model, optimizer)
        step(model, optimizer)
    assert [sample.step for sample in server.samples] == [1, 2]
    assert own_errors.warnings == 1


def test_two_optimizers_that_take_turns_count_alike_after_a_resumption(server: Server) -> None:
    """One steps three times for each step of the other, which has not been seen yet when the first round ends."""
    model = network()
    often, seldom = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2]))
    for start in (0, 1000):
        with gradwatch.attach(model, [often, seldom], url=server.url, every=1, step=start):
            for _ in range(2):
                for _ in range(3):
                    step(model, often)
                step(model, seldom)
        assert [sample.step - start for sample in server.samples if sample.step > start] == [1, 2, 3, 4, 5, 6]


def test_a_number_of_steps_that_cannot_be(server: Server) -> None:
    with pytest.raises(SettingsError, match="step=-1 must be"):
        gradwatch.attach(network(), url=server.url, step=-1)


def test_arguments_win_over_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("from-file\n", encoding="utf-8")
    monkeypatch.setenv("GRADWATCH_URL", server.url)
    monkeypatch.setenv("GRADWATCH_PROJECT", "environment")
    monkeypatch.setenv("GRADWATCH_RUN", "named")
    monkeypatch.setenv("GRADWATCH_EVERY", "2")
    monkeypatch.setenv("GRADWATCH_TOKEN_FILE", str(secret))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, project="argument"):
        for _ in range(5):
            step(model, optimizer)
    assert (server.registrations[0].project, server.registrations[0].name) == ("argument", "named")
    assert [sample.step for sample in server.samples] == [1, 3, 5]
    assert server.requests[0][1]["Authorization"] == "Bearer from-file"
    assert abs(float(server.requests[0][1][wire.CLOCK_HEADER]) - time.time()) < 600


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": "ftp://x"}, "url 'ftp://x' must start with http"),
        ({"url": "http://x:84000"}, "url 'http://x:84000' must name a host, and a port from 1 to 65535"),
        ({"url": "http://x:http"}, "url 'http://x:http' must name a host"),
        ({"url": "http://"}, "url 'http:' must start with http"),
        ({"url": "http://:8321"}, "url 'http://:8321' must name a host"),
        ({"url": "https://[::1"}, "must name a host"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"overhead_budget": 0.0}, r"overhead_budget=0.0 must be over 0"),
    ],
)
def test_unusable_arguments_are_named(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gradwatch.attach(network(), **arguments)  # type: ignore[arg-type]


def test_wrong_objects_are_named() -> None:
    with pytest.raises(TypeError, match="model must be a torch"):
        gradwatch.attach([torch.zeros(3)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="optimizer must be a torch"):
        gradwatch.attach(network(), [3])  # type: ignore[list-item]


def test_without_a_gradient_is_a_state_of_its_own(server: Server) -> None:
    model = network()
    unused = nn.Linear(2, 2)
    model.add_module("unused", nn.Identity())
    model[3].add_module("inner", unused)
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        step(model, optimizer)
    norms = server.values("grad_norm")
    assert {name for name, value in norms.items() if value == wire.MISSING} == {
        "0.bias",
        "unused.inner.weight",
        "unused.inner.bias",
    }
    assert server.values("weight_norm")["unused.inner.weight"] == pytest.approx(
        float(unused.weight.detach().double().norm())
    )


def test_a_dead_server_costs_nothing_and_loses_nothing(server: Server, tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    server.answer = lambda *_: (500, {}, b"{}")
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    for _ in range(5):
        step(model, optimizer)
    server.wait(lambda: len(server.requests) >= 2)
    server.answer = None
    agent.close()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "spool").iterdir())


def test_torch_is_loaded_only_where_it_is_used() -> None:
    import subprocess

    code = "import sys, gradwatch, gradwatch.wire, gradwatch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", code.replace("gradwatch.cli", "torch")], check=False).returncode == 1
