"""Advice on the threshold of adaptive clipping: from a real training to what the API answers."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import wire
from gradwatch_server.diagnosis.clip_advice import THRESHOLDS, advise
from tests.processes import GradwatchServer, sample


def histograms(ratios: list[list[float]]) -> np.ndarray:
    """Return the histograms of samples whose units, all in the middle third, have these ratios."""
    bins = wire.HISTOGRAM_EDGES.size + 1
    found = np.zeros((len(ratios), 3, bins))
    for counted, values in zip(found, ratios, strict=True):
        places = np.searchsorted(wire.HISTOGRAM_EDGES, np.array(values), side="left")
        counted[1] = np.bincount(places, minlength=bins)
    return found


def test_shares_are_counted_by_hand() -> None:
    usual = [0.001] * 18 + [0.015, 0.015]
    found = advise(range(10), histograms([*[usual] * 9, [0.5] * 20]))
    assert found.rates[0].tolist() == [0.1, 0.1, 0, 0, 0, 0, 0]
    assert found.rates[9].tolist() == [1.0] * 7
    assert found.shares.tolist() == pytest.approx([0.19, 0.19, *[0.1] * 5])
    assert found.thirds[0].tolist() == [0.0] * 7
    assert found.thirds[1].tolist() == pytest.approx(found.shares.tolist())
    assert found.recommended == 0.02
    assert "0.0% of the units at the median step and 100.0% at step 9" in found.reason


def test_a_ratio_at_the_threshold_is_not_clipped() -> None:
    found = advise(range(5), histograms([[threshold] for threshold in THRESHOLDS[:5]]))
    for place, rates in enumerate(found.rates):
        assert rates.tolist() == [1.0] * place + [0.0] * (len(THRESHOLDS) - place)


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        ([[0.5]] * 4, "Too few samples"),
        ([[0.001]] * 9, "would change nothing"),
        ([[2.0]] * 9, "Lower the learning rate"),
        ([], "Too few samples"),
    ],
)
def test_where_no_threshold_can_be_recommended(ratios: list[list[float]], reason: str) -> None:
    found = advise(range(len(ratios)), histograms(ratios))
    assert found.recommended is None
    assert reason in found.reason


def test_a_dry_run_says_what_clipping_would_have_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the advice says of one threshold is what AGC with this threshold does at that step."""
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path / "spool"))
    torch.manual_seed(0)
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        truth = []
        with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
            for step in range(12):
                optimizer.zero_grad()
                inputs = torch.randn(32, 8) * (20.0 if step == 7 else 1.0)
                nn.functional.cross_entropy(model(inputs), torch.randint(4, (32,))).backward()
                before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                optimizer.step()
                after = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                assert all(map(torch.equal, before, after))  # a dry run
                gradwatch.adaptive_clip_grad_(model, 0.02, exclude=["4.weight"])
                clipped = [
                    (b != p.grad).flatten(1).any(1) if p.dim() > 1 else (b != p.grad).any()[None]
                    for b, (name, p) in zip(before, model.named_parameters(), strict=True)
                    if name != "4.weight" and p.grad is not None
                ]
                truth.append(float(torch.cat(clipped).double().mean()))
        advice = server.get(f"/api/v1/runs/{agent.run_id}/clip-advice")
        assert advice["thresholds"] == list(THRESHOLDS)
        assert advice["steps"] == list(range(1, 13))
        place = advice["thresholds"].index(0.02)
        assert [rates[place] for rates in advice["rates"]] == pytest.approx(truth)
        assert advice["shares"][place] == pytest.approx(sum(truth) / 12)
        assert advice["clip"] is None
        assert max(truth) > 0
        part = server.get(f"/api/v1/runs/{agent.run_id}/clip-advice", from_step=3, to_step=6)
        assert part["steps"] == [3, 4, 5, 6]
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with gradwatch.attach(model, url=server.url, clip=0.04) as agent:
            model(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        advice = server.get(f"/api/v1/runs/{agent.run_id}/clip-advice")
        assert advice["clip"] == 0.04
        assert advice["recommended"] is None


def test_a_run_without_parameters_or_samples_has_no_advice(server: GradwatchServer) -> None:
    for names in ((), ("a.weight",)):
        run = server.register(names)
        assert server.get(f"/api/v1/runs/{run}/clip-advice")["recommended"] is None
    server.store(run, wire.Batch(id="1", samples=[sample(step, 1.0) for step in range(700)]))
    assert server.get(f"/api/v1/runs/{run}/clip-advice")["samples"] == 0


def test_histograms_are_found_where_not_every_sample_carries_them(shared_server: GradwatchServer) -> None:
    run = shared_server.register(["a.weight"])
    carried = {name: [1.0] * (wire.HISTOGRAM_EDGES.size + 1) for name in wire.HISTOGRAMS}
    for first in range(0, 3_200, 800):
        plain = [sample(step, 1.0) for step in range(first, first + 800)]
        samples = [msgspec.structs.replace(one, histograms={} if one.step % 10 else carried) for one in plain]
        assert shared_server.store(run, wire.Batch(id=str(first), samples=samples)).status_code == 200
    for points in (10_000, 500, 100, 20):
        advice = shared_server.get(f"/api/v1/runs/{run}/clip-advice", points=points)
        assert min(points, 320) / 3 <= advice["samples"] <= points
        assert not any(step % 10 for step in advice["steps"])
        assert advice["steps"] == sorted(set(advice["steps"]))
        assert advice["steps"][0] < 3_200 / 3
        assert advice["steps"][-1] > 3_200 * 2 / 3
    part = shared_server.get(f"/api/v1/runs/{run}/clip-advice", from_step=1_005, to_step=1_035)
    assert part["steps"] == [1_010, 1_020, 1_030]


def test_the_remedy_of_an_explosion_names_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(tmp_path / "spool"))
    torch.manual_seed(0)
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
            for step in range(60):
                optimizer.param_groups[0]["lr"] = 0.5 if step < 40 else 1500.0
                optimizer.zero_grad()
                inputs = torch.randn(32, 8)
                (0.02 * (model(inputs) - inputs[:, :1]).square().mean()).backward()
                optimizer.step()
        (alert,) = server.get("/api/v1/alerts", run=agent.run_id, rule="exploding")
        before = server.get(f"/api/v1/runs/{agent.run_id}/clip-advice", to_step=alert["first_step"] - 1)
    assert before["recommended"] is not None
    assert f"clip={before['recommended']:g}), which leaves this run's usual steps alone" in alert["remedy"]
