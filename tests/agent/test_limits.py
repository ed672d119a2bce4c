"""What the server's limits refuse is not sent, or is sent in pieces: nothing goes with what cannot be taken."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import settings, wire
from gradwatch.agent import Agent
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.sender import Sender
from gradwatch.delivery.splitting import split_batch
from gradwatch.delivery.spool import Entry
from gradwatch.delivery.transport import DeliveryResult, HttpTransport
from gradwatch.monitor.notices import Notices
from gradwatch.steps.state import StepRecord
from tests.processes import PATIENCE_SECONDS, GradwatchServer

from .conftest import OwnErrors, Server
from .watching import monitor_of


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradwatchServer]:
    with GradwatchServer(tmp_path_factory.mktemp("limits") / "gradwatch.db") as serving:
        yield serving


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def one_layer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 4)
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def kept(real: GradwatchServer, agent: Agent) -> dict[str, Any]:
    found: dict[str, Any] = real.get(f"/api/v1/runs/{agent.run_id}")
    return found


def test_a_model_with_hundreds_of_parameter_groups_arrives(real: GradwatchServer) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(150)])
    groups = [{"params": [p], "lr": 1e-6 * (1 + place)} for place, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    with gradwatch.attach(model, optimizer, url=real.url, every=1) as agent:
        for _ in range(5):
            step(model, optimizer)
    run = kept(real, agent)
    assert run["sample_count"] == 5
    rates = {name: value for name, value in run["scalars"].items() if name.startswith("learning_rate")}
    assert rates == pytest.approx({"learning_rate": 1e-6, "learning_rate.lowest": 1e-6, "learning_rate.highest": 3e-4})


def test_the_rates_of_many_groups_cost_no_more_than_the_groups(server: Server) -> None:
    """A sample of 2,000 groups took 220 ms: names were counted for each group."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(1000)])
    spent = {False: math.inf, True: math.inf}
    for several in (False, True) * 3:
        listed = [{"params": [p]} for p in model.parameters()] if several else list(model.parameters())
        optimizer = torch.optim.SGD(listed, lr=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
            taken = []
            for _ in range(8):
                before = monitor_of(agent).guard.spent_seconds
                optimizer.step()
                taken.append(monitor_of(agent).guard.spent_seconds - before)
        spent[several] = min(spent[several], *taken)
    assert spent[True] < 5 * spent[False]


def test_hundreds_of_logged_names_arrive_with_the_samples(real: GradwatchServer, own_errors: OwnErrors) -> None:
    model, optimizer = one_layer()
    with gradwatch.attach(model, optimizer, url=real.url, every=1) as agent:
        for place in range(5):
            agent.log(**({f"class_{name}": 0.5 for name in range(300)} if place == 2 else {}))
            step(model, optimizer)
    run = kept(real, agent)
    assert run["sample_count"] == 5
    assert len([name for name in run["scalars"] if name.startswith("class_")]) == 300
    assert run["dropped"] == {"samples": 0, "bytes": 0, "errors": 0, "values": 0}
    assert own_errors.warnings == 0


def test_names_that_never_end_are_bounded_counted_and_said_once(real: GradwatchServer, own_errors: OwnErrors) -> None:
    model, optimizer = one_layer()
    with gradwatch.attach(model, optimizer, url=real.url, every=1) as agent:
        for place in range(6):
            agent.log(**{f"{place}_{name}": 0.5 for name in range(250)}, **{"x" * 600: 1.0, "nul\0": 1.0})
            step(model, optimizer)
    run = kept(real, agent)
    assert run["sample_count"] == 6
    assert run["last_step"] == 6
    assert len([name for name in run["scalars"] if "_" in name and name[0].isdigit()]) == 1000
    assert run["dropped"]["values"] == monitor_of(agent).dropped.values == 500 + 12
    assert own_errors.warnings == 1


def test_a_backlog_of_a_fast_training_arrives(real: GradwatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server is away batches grow: to what it takes at once, not beyond."""
    from gradwatch.samples import builder, collector

    monkeypatch.setattr(collector, "_BACKLOG", 0)
    monkeypatch.setattr(collector, "_GROWN_BATCH_SECONDS", 3600.0)
    draft, drafted = builder.SampleBuilder.draft, threading.Semaphore(0)
    post, away = HttpTransport.post, [True]

    def counted(self: builder.SampleBuilder, record: StepRecord) -> Any:
        drafted.release()
        return draft(self, record)

    def reached(self: HttpTransport, *args: Any) -> DeliveryResult:
        return DeliveryResult("retry", "away") if away[0] else post(self, *args)

    monkeypatch.setattr(builder.SampleBuilder, "draft", counted)
    monkeypatch.setattr(HttpTransport, "post", reached)
    model, optimizer = one_layer()
    agent = gradwatch.attach(model, optimizer, url=real.url, every=1)
    for _ in range(10):
        for _ in range(250):
            step(model, optimizer)
        for _ in range(250):
            assert drafted.acquire(timeout=PATIENCE_SECONDS)
    away[0] = False
    agent.close()
    run = kept(real, agent)
    assert (run["sample_count"], run["last_step"], run["dropped"]["samples"]) == (2500, 2500, 0)


class Limited:
    """A transport to a server that takes no batch with more than some samples, and none with a bad one."""

    def __init__(self, most_samples: int = 1000, bad: frozenset[int] = frozenset()) -> None:
        self.most_samples = most_samples
        self.bad = bad
        self.taken: dict[str, wire.Batch] = {}
        self.posts = 0
        self.away_at = -1

    def post(self, path: str, body: bytes, timeout_seconds: float) -> DeliveryResult:
        self.posts += 1
        if self.posts == self.away_at:
            return DeliveryResult("retry", "away")
        try:
            batch = wire.decode(body, wire.Batch)
        except wire.BoundsError as error:
            return DeliveryResult("rejected", f"422 {error}", divisible=True)
        steps = [sample.step for sample in batch.samples]
        if len(steps) > self.most_samples or self.bad & set(steps):
            return DeliveryResult("rejected", "422", divisible=True)
        self.taken.setdefault(batch.id, batch)
        return DeliveryResult("committed")

    @property
    def steps(self) -> list[int]:
        return [sample.step for batch in self.taken.values() for sample in batch.samples]

    @property
    def losses(self) -> list[int]:
        trails = [batch.trail["loss"] for batch in self.taken.values() if "loss" in batch.trail]
        return [step for trail in trails for step in trail.steps]


class Queue:
    run = "run-x"

    def __init__(self, *batches: wire.Batch) -> None:
        self.entries = [Entry(n, "batch", len(b.samples), wire.encode(b)) for n, b in enumerate(batches)]

    def first(self) -> Entry | None:
        return self.entries[0] if self.entries else None

    def forget(self, entry: Entry) -> None:
        self.entries.remove(entry)


def grown(count: int) -> wire.Batch:
    return wire.Batch(
        id="grown",
        samples=[wire.Sample(step=step, at=0.0, scalars={"x": 1.0}) for step in range(count)],
        trail={"loss": wire.Trail(steps=list(range(count)), values=[1.0] * count)},
        events=[wire.Event(step=count - 1, at=0.0, kind="nonfinite_module")],
        end=wire.End(at=1.0),
    )


def test_a_batch_that_is_too_large_is_sent_in_pieces_in_order() -> None:
    limited, dropped = Limited(most_samples=100), Dropped()
    assert Sender(Queue(grown(450)), limited, dropped, print).deliver()
    assert limited.steps == limited.losses == list(range(450))
    assert (dropped.samples, dropped.values) == (0, 0)
    assert [batch.end is not None for batch in limited.taken.values()] == [False] * (len(limited.taken) - 1) + [True]
    assert sum(len(batch.events) for batch in limited.taken.values()) == 1


def test_only_what_is_refused_is_lost_and_counted() -> None:
    limited, dropped, said = Limited(bad=frozenset({77})), Dropped(), list[str]()
    assert Sender(Queue(grown(200)), limited, dropped, said.append).deliver()
    assert limited.steps == [step for step in range(200) if step != 77]
    assert limited.losses == list(range(200))
    assert (dropped.samples, dropped.values, len(said)) == (1, 0, 1)


def test_a_value_beyond_its_bounds_costs_only_its_own_sample() -> None:
    limited, dropped, batch = Limited(), Dropped(), grown(20)
    batch.samples[7] = msgspec.structs.replace(batch.samples[7], scalars={"x" * 600: 1.0})
    assert Sender(Queue(batch), limited, dropped, lambda _text: None).deliver()
    assert limited.steps == [step for step in range(20) if step != 7]
    assert (dropped.samples, dropped.values) == (1, 0)


def test_pieces_that_are_interrupted_are_neither_lost_nor_counted_twice() -> None:
    for away_at in range(1, 18):
        limited, dropped = Limited(bad=frozenset({3})), Dropped()
        limited.away_at = away_at
        sender = Sender(Queue(grown(20)), limited, dropped, lambda _text: None)
        if not sender.deliver():
            assert sender.deliver()
        assert limited.steps == [step for step in range(20) if step != 3]
        assert dropped.samples == 1


def test_a_batch_of_which_nothing_is_taken_is_given_up_after_some_pieces() -> None:
    limited, dropped = Limited(bad=frozenset(range(500))), Dropped()
    assert Sender(Queue(grown(500)), limited, dropped, lambda _text: None).deliver()
    assert dropped.samples + len(limited.steps) == 500
    assert dropped.values + len(limited.losses) == 500
    assert limited.posts < 100


def test_halves_hold_the_whole() -> None:
    parts = split_batch(grown(5))
    assert parts is not None
    assert [part.id for part in parts] == ["grown.0", "grown.1"]
    assert split_batch(wire.Batch(id="one", end=wire.End(at=0.0))) is None


def test_names_longer_than_a_server_takes_are_shortened(real: GradwatchServer) -> None:
    model: nn.Module = nn.Linear(4, 4)
    for _ in range(30):
        model = nn.Sequential(OrderedDict({"a_block_inside_another_block": model}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, url=real.url, every=1) as agent:
        for _ in range(3):
            step(model, optimizer)
        model(torch.full((2, 4), float("nan"))).sum().backward()
        optimizer.step()
    run = kept(real, agent)
    assert run["sample_count"] == 4
    names = [entry["name"] for entry in run["parameters"]]
    assert len(set(names)) == 2
    assert {len(name) for name in names} == {512}
    assert [name.endswith((".weight", ".bias")) for name in names] == [True, True]
    assert run["dropped"]["bytes"] == 0


def test_a_run_that_cannot_be_registered_is_said_to_be(real: GradwatchServer, own_errors: OwnErrors) -> None:
    model, optimizer = one_layer()
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(Notices, "warn", lambda _self, text: said.append(text))
        patch.setattr(settings, "LONGEST_NAME", 1000)  # of a server that takes longer names than this one
        agent = gradwatch.attach(model, optimizer, url=real.url, every=1, project="x" * 600)
        step(model, optimizer)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not said and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        told = list(said)  # what it says while it ends may be about the time that it had left
        agent.close(timeout_seconds=0.1)
    assert len(told) == 1
    assert "refuses to register" in told[0]
    assert "project has 600 characters" in told[0]
    assert monitor_of(agent).dropped.samples == 0
