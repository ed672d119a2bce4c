"""Models, parameters and agents come and go: what is watched, and that nothing is kept alive."""

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch
from gradwatch import wire
from gradwatch.session import running_sessions

from .conftest import Server
from .watching import GRAD_A, Two, monitor_of, watch


def test_parameters_added_and_removed_later(server: Server) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2)).sum().backward()
        optimizer.step()

    with watch(model, server, optimizer):
        step()
        model.append(nn.Linear(2, 3, bias=False))
        optimizer.add_param_group({"params": model[1].parameters()})
        step()
        del optimizer.param_groups[1]
        step()
    assert server.names == ["0.weight", "1.weight"]
    assert [len(sample.statistics["grad_norm"]) for sample in server.samples] == [1, 2, 2]
    assert server.values("grad_norm", 2)["1.weight"] > 0
    assert server.values("grad_norm", 3)["1.weight"] == wire.MISSING


def test_a_watched_model_copies_and_pickles(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        for place in range(2):
            twin = copy.deepcopy(model)
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            assert torch.equal(torch.load(buffer, weights_only=False).a, model.a)
            twin(GRAD_A, 99.0).backward()
            torch.optim.SGD(twin.parameters(), lr=1.0).step()
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            optimizer.step()
            assert place + 1 == 1 or not model.a._post_accumulate_grad_hooks
    assert [sample.step for sample in server.samples] == [1, 2]
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}


def test_a_model_that_holds_its_agent_copies_and_pickles(server: Server) -> None:
    model: Any = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer) as agent:
        model.agent = agent
        assert copy.deepcopy(model).agent is copy.copy(model).agent is agent
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert (loaded.agent.run_id, loaded.agent.run_url) == (agent.run_id, agent.run_url)
    assert not monitor_of(loaded.agent).guard.watching
    loaded.agent.log(loss=1.0)
    loaded.agent.close()
    assert [sample.step for sample in server.samples] == [1]
    assert len(server.registrations) == 2  # the second when the depth was known


def test_a_lazy_module_is_watched_when_it_has_a_shape(server: Server) -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    with watch(model, server):
        out = model(torch.ones(1, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        out.sum().backward()
        optimizer.step()
        assert isinstance(model[0].weight.grad, Tensor)
    assert sorted(server.names) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert server.values("grad_norm")["0.weight"] == pytest.approx(float(model[0].weight.grad.norm()))


def test_two_agents_at_once(server: Server) -> None:
    first, second = Two(), nn.Linear(2, 1, bias=False)
    one, two = torch.optim.SGD(first.parameters(), lr=0.0), torch.optim.SGD(second.parameters(), lr=0.0)
    with watch(first, server) as a, watch(second, server) as b:
        for _ in range(2):
            one.zero_grad()
            first(GRAD_A, 12.0).backward()
            second(torch.ones(2)).sum().backward()
            one.step()
            two.step()
    by_run = {registration.id: registration for registration in server.registrations}
    assert [p.name for p in by_run[a.run_id].parameters] == ["a", "b"]
    assert [p.name for p in by_run[b.run_id].parameters] == ["weight"]
    own = [batch for batch in server.batches if batch.samples and len(batch.samples[0].statistics["grad_norm"]) == 2]
    trails = [batch.trail["loss"] for batch in own]
    assert dict(pair for trail in trails for pair in zip(trail.steps, trail.values, strict=True)) == {1: 59.0, 2: 59.0}


def test_an_agent_whose_model_is_gone_retires(server: Server) -> None:
    gradwatch.attach(nn.Linear(2, 2), url=server.url)
    gc.collect()
    kept = nn.Linear(2, 2)
    wrapped = gradwatch.attach(nn.Sequential(kept), url=server.url)  # only the wrapper is gone
    with gradwatch.attach(nn.Linear(3, 3), url=server.url) as last:
        assert [session for session in running_sessions() if session is not last._session] == [wrapped._session]
    wrapped.close()


def test_an_agent_that_is_never_closed_keeps_nothing_alive(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch(model, server)
    for _ in range(2):
        optimizer.zero_grad()
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 6.5)
        clip_grad_value_([model.a], 1.0)
        optimizer.step()
    kept = weakref.ref(model.a), weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


def test_a_parameter_with_the_id_of_one_that_is_gone(server: Server) -> None:
    model = Two()
    model.old = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(50))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server) as agent:
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_(model.parameters(), 6.5)
        optimizer.step()
        gone = set(map(id, model.old))
        del model.old, optimizer.param_groups[0]["params"][2:]
        gc.collect()
        made = [nn.Parameter(torch.ones(2))]
        while id(made[-1]) not in gone:
            made.append(nn.Parameter(torch.ones(2)))
            assert len(made) < 10_000
        model.new = made[-1]
        optimizer.param_groups[0]["params"].append(model.new)
        optimizer.zero_grad()
        (model(GRAD_A, 12.0) + (model.new * torch.tensor([84.0, 0.0])).sum()).backward()
        clip_grad_norm_(model.parameters(), 8.5)  # of a norm of 85
        optimizer.step()
        assert monitor_of(agent).dropped.errors == 0
    before, after = server.values("grad_norm", 2), server.values("clipped_grad_norm", 2)
    assert {name: before[name] for name in ("a", "b", "new")} == pytest.approx({"a": 5.0, "b": 12.0, "new": 84.0})
    assert {name: after[name] for name in ("a", "b", "new")} == pytest.approx(
        {"a": 0.5, "b": 1.2, "new": 8.4}, rel=1e-5
    )
    assert {value for name, value in before.items() if name.startswith("old")} == {wire.MISSING}


def test_repeated_attach_replaces_the_earlier_agent(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first = watch(model, server, optimizer)
    with watch(model, server, optimizer) as second:
        assert not monitor_of(first).guard.watching
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert first.run_id != second.run_id
    assert len(server.samples) == 1
