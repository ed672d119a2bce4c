"""One run of a case, in a process of its own: through the real agent, to a real server, and what the server says."""

from collections.abc import Sequence
from typing import NamedTuple

import httpx
import torch
from torch import nn

import gradwatch
from benchmarks.zoo.baselines import Baselines
from benchmarks.zoo.case import holds, train
from benchmarks.zoo.score import Alert
from benchmarks.zoo.split import CASES


class Task(NamedTuple):
    """One run of one case, as it is handed to a worker process."""

    name: str
    seed: int
    url: str
    every: int | None
    """Steps between samples; None: the agent's choice."""
    step_seconds: float
    """Least time of a step."""
    verify: bool


class Found(NamedTuple):
    """What became of a task."""

    alerts: list[Alert]
    label_holds: bool
    twin_holds: bool
    onset_at: float
    """Unix seconds."""
    baselines: dict[str, list[int]]


def run(task: Task) -> Found:
    """Train a case under the agent and ask the server what it made of it."""
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == task.name)
    training = case.build(task.seed)
    models: Sequence[nn.Module] = [training.model] if isinstance(training.model, nn.Module) else training.model
    with Baselines(models) as baselines:
        agent = gradwatch.attach(
            list(models),
            None,
            url=task.url,
            project="zoo",
            run=f"{case.name}-{task.seed}",
            every=task.every,
            clip=training.clip,
        )
        result = train(training, case.steps, case.onset, baselines, least_seconds=task.step_seconds)
        agent.close(timeout_seconds=60)
    twin = True
    if task.verify and case.twin is not None:
        twin = holds(case, train(case.twin(task.seed), case.steps, case.onset), repaired=True)
    alerts = read_alerts(task.url, agent.run_id)
    return Found(alerts, holds(case, result), twin, result.onset_at, baselines.alerts)


def read_alerts(url: str, run_id: str) -> list[Alert]:
    """Return what fired for a run, from the server."""
    state = httpx.get(f"{url}/api/v1/runs/{run_id}", timeout=60, trust_env=False).raise_for_status().json()["state"]
    assert state == "finished", f"run {run_id} is {state}: the server has not got all of it"
    answer = httpx.get(f"{url}/api/v1/alerts", params={"run": run_id}, timeout=60, trust_env=False)
    answer.raise_for_status()
    return [
        Alert(
            rule=entry["rule"],
            severity=entry["severity"],
            fired_step=entry["fired_step"],
            fired_at=entry["fired_at"],
            resolved_step=entry["resolved_step"],
            blamed=tuple(blame["name"] for blame in entry["parameters"]),
            summary=entry["summary"],
        )
        for entry in answer.json()
        if entry["fired_step"] is not None
    ]
