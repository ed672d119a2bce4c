"""``attach`` on real trainings, read back from a real server."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import gradwatch
from gradwatch.monitor.guard import Guard
from tests.agent.truth import norms
from tests.processes import GradwatchServer


@pytest.fixture(autouse=True)
def _own_spool(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setattr(Guard, "raises_own_errors", True)


NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def _batches(count: int) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, generator=generator) for _ in range(count)]


def _stored(
    server: GradwatchServer, agent: gradwatch.Agent, statistic: str, names: Sequence[str] = NAMES
) -> NDArray[np.float64]:
    """Return a statistic as the server shows it, shape (samples, parameters) in the order of ``names``."""
    seen = server.get(f"/api/v1/runs/{agent.run_id}/map", statistic=statistic)
    spelled = {None: -1.0, "NaN": np.nan, "Infinity": np.inf}
    shown = np.array([[spelled[v] if isinstance(v, str | None) else v for v in row] for row in seen["last"]])
    return shown[:, [seen["parameters"].index(name) for name in names]]


def test_what_the_server_shows_is_what_the_optimizer_saw(shared_server: GradwatchServer) -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradients, weights, losses = [], [], []
    with gradwatch.attach(model, optimizer, url=shared_server.url, project="numbers", run="plain", every=1) as agent:
        for batch in _batches(6):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            gradients.append(norms(model.parameters(), gradients=True))
            weights.append(norms(model.parameters(), gradients=False))
            losses.append(loss.item())
            optimizer.step()
    run = shared_server.get(f"/api/v1/runs/{agent.run_id}")
    assert agent.run_url == f"{shared_server.url}/runs/{agent.run_id}"
    assert (run["project"], run["name"], run["state"], run["last_step"]) == ("numbers", "plain", "finished", 6)
    units = {entry["name"]: entry["units"] for entry in run["parameters"]}
    assert units == {"0.weight": 7, "0.bias": 1, "2.weight": 3, "2.bias": 1}
    assert run["dropped"] == {"samples": 0, "bytes": 0, "errors": 0, "values": 0}
    np.testing.assert_allclose(_stored(shared_server, agent, "grad_norm"), gradients, rtol=1e-5)
    np.testing.assert_allclose(_stored(shared_server, agent, "weight_norm"), weights, rtol=1e-5)
    ratios = np.array(gradients) / (np.array(weights) + 1e-3)
    np.testing.assert_allclose(_stored(shared_server, agent, "ratio"), ratios, rtol=1e-5)
    series = shared_server.get(f"/api/v1/runs/{agent.run_id}/series", statistic="loss")
    assert series["steps"] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(series["last"], losses, rtol=1e-6)


def test_clipping_is_shown_before_and_after(shared_server: GradwatchServer) -> None:
    from torch.nn.utils import clip_grad_norm_

    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, after = [], []
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        for batch in _batches(3):
            optimizer.zero_grad()
            (100 * model(batch).square().mean()).backward()
            before.append(norms(model.parameters(), gradients=True))
            clip_grad_norm_(model.parameters(), 0.5)
            after.append(norms(model.parameters(), gradients=True))
            optimizer.step()
    np.testing.assert_allclose(_stored(shared_server, agent, "grad_norm"), before, rtol=1e-4)
    np.testing.assert_allclose(_stored(shared_server, agent, "clipped_grad_norm"), after, rtol=1e-5)
    series = shared_server.get(f"/api/v1/runs/{agent.run_id}/series", statistic="clip_norm")
    np.testing.assert_allclose(series["last"], np.sqrt(np.square(before).sum(1)), rtol=1e-5)


class _Nested(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_subclass_that_calls_super_counts_once(shared_server: GradwatchServer) -> None:
    model = _network()
    optimizer = _Nested(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        for batch in _batches(4):
            optimizer.zero_grad()
            model(batch).mean().backward()
            optimizer.step()
    assert shared_server.get(f"/api/v1/runs/{agent.run_id}")["last_step"] == 4


def test_a_closure_is_measured_after_its_first_evaluation(shared_server: GradwatchServer) -> None:
    model = _network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    first: list[NDArray[np.float64]] = []
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        for batch in _batches(3):
            fresh = True

            def closure(batch: Tensor = batch) -> Tensor:
                nonlocal fresh
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                loss.backward()
                if fresh:
                    first.append(norms(model.parameters(), gradients=True))
                    fresh = False
                return torch.as_tensor(loss)

            optimizer.step(closure)
    np.testing.assert_allclose(_stored(shared_server, agent, "grad_norm"), first, rtol=1e-5)


def test_accumulation_counts_optimizer_steps(shared_server: GradwatchServer) -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = []
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        for index, batch in enumerate(_batches(8), 1):
            (model(batch).square().mean() / 4).backward()
            if index % 4 == 0:
                truth.append(norms(model.parameters(), gradients=True))
                optimizer.step()
                optimizer.zero_grad()
    np.testing.assert_allclose(_stored(shared_server, agent, "grad_norm"), truth, rtol=1e-5)


def test_several_optimizers_make_one_round(shared_server: GradwatchServer) -> None:
    model = _network()
    halves = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.1)]
    truth = []
    with gradwatch.attach(model, url=shared_server.url, every=1) as agent:
        for batch in _batches(3):
            model.zero_grad()
            model(batch).square().mean().backward()
            truth.append(norms(model.parameters(), gradients=True))
            for optimizer in halves:
                optimizer.step()
    np.testing.assert_allclose(_stored(shared_server, agent, "grad_norm"), truth, rtol=1e-5)
    assert shared_server.get(f"/api/v1/runs/{agent.run_id}")["last_step"] == 3


def test_a_missing_gradient_is_missing_and_a_tied_parameter_counts_once(shared_server: GradwatchServer) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "unused": nn.Linear(2, 2)})
    model["head"].weight = model["embed"].weight
    frozen = model["unused"].bias
    frozen.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        model["head"](model["embed"](torch.tensor([1, 2]))).square().mean().backward()
        truth = norms(model.parameters(), gradients=True)
        optimizer.step()
    assert truth.tolist()[1:] == [-1.0, -1.0]
    names = ("embed.weight", "unused.weight", "unused.bias")
    np.testing.assert_allclose(_stored(shared_server, agent, "grad_norm", names), [truth], rtol=1e-5)
    run = shared_server.get(f"/api/v1/runs/{agent.run_id}")
    trainable = {entry["name"]: entry["trainable"] for entry in run["parameters"]}
    assert trainable == {"embed.weight": True, "unused.weight": True, "unused.bias": False}


class _Odd(nn.Module):
    """A sparse table, a scalar, a vector in bfloat16 and a complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.short = nn.Parameter(torch.full((300,), 300.0, dtype=torch.bfloat16))
        self.phase = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        self.table = nn.Embedding(10, 3, sparse=True)

    def forward(self, rows: Tensor) -> Tensor:
        found = self.table(rows).square().sum() * self.scale + self.short.float().square().sum()
        return torch.as_tensor(found + self.phase.abs().sum())


def test_sparse_complex_half_precision_and_scalar_parameters(shared_server: GradwatchServer) -> None:
    torch.manual_seed(0)
    model = _Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        model(torch.tensor([1, 1, 4])).backward()
        truth = norms(model.parameters(), gradients=True)
        optimizer.step()
    names = ("scale", "short", "phase", "table.weight")
    np.testing.assert_allclose(_stored(shared_server, agent, "grad_norm", names), [truth], rtol=1e-5)


def test_nonfinite_gradients_are_counted_exactly(shared_server: GradwatchServer) -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        model(next(iter(_batches(1)))).mean().backward()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        gradient[0, :2] = float("nan")
        gradient[3, 1] = float("inf")
        optimizer.step()
    assert _stored(shared_server, agent, "nonfinite_count").tolist() == [[3.0, 0.0, 0.0, 0.0]]
    assert np.isnan(_stored(shared_server, agent, "grad_norm")[0, 0])


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "sgd-foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_identical_with_the_agent(shared_server: GradwatchServer, name: str) -> None:
    def train(watch: bool) -> list[bytes]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        agent = gradwatch.attach(model, optimizer, url=shared_server.url, every=1) if watch else None
        for batch in _batches(20):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if agent is not None:
            agent.close()
            assert shared_server.get(f"/api/v1/runs/{agent.run_id}")["sample_count"] == 20
        return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]

    assert train(watch=True) == train(watch=False)


def test_layers_that_are_frozen_midway_are_not_dead(shared_server: GradwatchServer) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(5, 5), nn.Tanh())], nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with gradwatch.attach(model, optimizer, url=shared_server.url, every=1) as agent:
        for step, batch in enumerate(_batches(60)):
            if step == 20:
                model[:4].requires_grad_(False)
            optimizer.zero_grad()
            (model(batch) - batch[:, :3]).square().mean().backward()
            optimizer.step()
    assert shared_server.get("/api/v1/alerts", run=agent.run_id) == []
    described = shared_server.get(f"/api/v1/runs/{agent.run_id}")["parameters"]
    assert [parameter["trainable"] for parameter in described] == [False] * 4 + [True] * 6


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"every": 0}, "every=0"), ({"overhead_budget": 0.0}, "overhead_budget=0.0"), ({"model": []}, "model")],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises((TypeError, ValueError), match=reason):
        gradwatch.attach(**({"model": _network()} | arguments))
