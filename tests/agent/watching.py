"""A network whose gradients are what a test says, and how tests watch it."""

from typing import Any

import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.monitor.monitor import Monitor

from .conftest import Server


class Two(nn.Module):
    """Two vectors whose gradients are what the test says: loss = sum(weight * gradient)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 2.0]]))
        self.b = nn.Parameter(torch.tensor([4.0]))

    def forward(self, a: list[list[float]], b: float) -> Tensor:
        return (self.a * torch.tensor(a)).sum() + (self.b * b).sum()


GRAD_A = [[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]
"""Norm 5; second unit zero."""


def watch(model: nn.Module, server: Server, optimizer: Any = None, **options: Any) -> gradwatch.Agent:
    return gradwatch.attach(model, optimizer, url=server.url, every=1, **options)


def monitor_of(agent: gradwatch.Agent) -> Monitor:
    """Return the monitor of an agent, for tests of what shows nowhere else."""
    return agent._session.monitor
