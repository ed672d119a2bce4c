"""The two kinds of work: a learning rate that is raised, and a deep network. Both run in processes of their own."""

import os
import tempfile
from collections.abc import Callable

import torch

import gradwatch
from benchmarks.paper.ladder import STABLE, Ladder, Method
from benchmarks.paper.networks import Classified, convolutional, deep
from benchmarks.paper.training import Outcome, train
from benchmarks.zoo.receiver import Recorder

STEPS = 100
FIRST_EXPONENT, LAST_EXPONENT = -3, 8
DEEP_STEPS, DEEP_BATCH = 40, 64


def climb(batch: int, method: Method, seed: int) -> Ladder:
    """Raise the learning rate until two trainings in a row diverge or collapse."""
    torch.set_num_threads(1)
    accuracies: dict[int, float] = {}
    for exponent in range(FIRST_EXPONENT, LAST_EXPONENT + 1):
        accuracies[exponent] = _once(batch, method, seed, 2.0**exponent).accuracy
        if all(accuracies.get(last, STABLE) < STABLE for last in (exponent - 1, exponent)):
            break
    return Ladder(batch, method, seed, accuracies)


def _once(batch: int, method: Method, seed: int, rate: float) -> Outcome:
    torch.manual_seed(seed)
    model = convolutional(normalised=method.normalised)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
    return train(model, optimizer, batch=batch, steps=STEPS, seed=seed, clip=_clip(model, method.clip))


def _clip(model: Classified, clip: float | None) -> Callable[[], None]:
    """Return what clips the body: the paper leaves the classifier alone."""
    return lambda: None if clip is None else gradwatch.adaptive_clip_grad_(model.body, clip)


def dive(layers: int, clip: float | None, exponent: int) -> Outcome:
    """Train a deep network, clipped by the agent."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = deep(layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**exponent, momentum=0.9, nesterov=True)
    agc = None if clip is None else gradwatch.AGC(clip, exclude=["classifier.weight"])
    with tempfile.TemporaryDirectory() as folder, Recorder() as server:
        os.environ["GRADWATCH_SPOOL_DIR"] = folder
        with gradwatch.attach(model, optimizer, url=server.url, run="deep", clip=agc):
            return train(model, optimizer, batch=DEEP_BATCH, steps=DEEP_STEPS, seed=0)
