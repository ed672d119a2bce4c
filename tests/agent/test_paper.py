"""The networks and trainings of benchmarks/paper: what its numbers rest on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.paper.__main__ import row
from benchmarks.paper.climbing import dive
from benchmarks.paper.ladder import METHODS, PLAIN, Ladder
from benchmarks.paper.networks import ScaledConv, convolutional, deep, standardised
from benchmarks.paper.plot import draw
from benchmarks.paper.training import train


def test_each_row_of_standardised_weights_has_mean_0_and_the_norm_of_its_gain() -> None:
    torch.manual_seed(0)
    layer = ScaledConv(3, 5)
    gain = torch.linspace(0.5, 2.0, 5)
    rows = standardised(layer.weight, gain).detach().flatten(1).double().numpy()
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), gain, rtol=1e-4)


def test_a_deep_stream_has_the_deviation_that_its_blocks_expect() -> None:
    torch.manual_seed(0)
    body = deep(200, width=128).body
    assert isinstance(body, torch.nn.Sequential)
    with torch.no_grad():
        measured = body[:-1](torch.randn(256, 64)).std()
    assert float(measured) == pytest.approx((1 + 198 * 0.2**2) ** 0.5, rel=0.2)


def test_a_training_that_diverges_is_stopped_and_a_sound_one_learns() -> None:
    outcomes = {}
    for rate in (0.25, 1e4):
        torch.manual_seed(0)
        model = convolutional(normalised=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
        outcomes[rate] = train(model, optimizer, batch=64, steps=40, seed=0)
    assert outcomes[0.25].accuracy > 0.6
    assert not outcomes[0.25].diverged
    assert outcomes[1e4].diverged
    assert outcomes[1e4].steps < 40


def test_the_table_and_the_picture_say_by_how_much_the_rate_was_raised(tmp_path: Path) -> None:
    clipped = METHODS[1]
    ladders = [Ladder(64, PLAIN, seed, {-1: 0.9, 0: 0.5, 1: 0.0, 2: 0.1}) for seed in (0, 1)]
    ladders += [Ladder(64, clipped, seed, {-1: 0.9, 2 + seed: 0.95, 4: 0.0}) for seed in (0, 1)]
    assert row(64, clipped, ladders) == "| 64 | AGC 0.01 | 5.7 | 5.7 (4 to 8) | 5.7 | 95.0% |"
    assert row(64, PLAIN, ladders) == "| 64 | without AGC | 1 | 1.0 (1 to 1) | 0.5 | 90.0% |"
    dives = {(clip, -1): dive(12, clip, -1) for clip in (None, 0.01)}
    assert all(outcome.steps for outcome in dives.values())
    draw(tmp_path / "paper.png", ladders, dives)
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")
