"""The alerts of other tools on the same runs, computed from the gradients themselves, as such tools see them.

A baseline alerts where its condition holds for three samples in a row, as ours have to. It is counted generously: any
alert of it on a sick run, after the onset, is a hit, whatever the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

NAMES = ("SageMaker Debugger", "global norm", "layer ratio")
HOLD_SAMPLES = 3

SMALLEST_MEAN = 1e-7
"""SageMaker Debugger's VanishingGradient: mean of |gradient| of a tensor below this. Its ExplodingTensor: NaN, Inf."""
GLOBAL_LIMITS = (1e-6, 100.0)
RATIO_LIMITS = (1e-6, 1.0)


@dataclass
class Baselines:
    """Watches the optimizer steps of one training; a context manager."""

    models: Sequence[nn.Module]
    alerts: dict[str, list[int]] = field(default_factory=dict)
    """For each baseline, the steps at which it alerts."""

    def __post_init__(self) -> None:
        self._parameters = {
            id(parameter): parameter for model in self.models for parameter in model.parameters() if parameter.numel()
        }
        self._held = dict.fromkeys(NAMES, 0)
        self.step = 0

    def __enter__(self) -> "Baselines":
        self._hook = register_optimizer_step_pre_hook(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _look(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        pairs = [
            (parameter, parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._parameters and parameter.grad is not None
        ]
        if not pairs:
            return
        for name, holds in zip(NAMES, _conditions(pairs), strict=True):
            self._held[name] = self._held[name] + 1 if holds else 0
            if self._held[name] >= HOLD_SAMPLES:
                self.alerts.setdefault(name, []).append(self.step)


@torch.no_grad()
def _conditions(pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> tuple[bool, bool, bool]:
    means = torch.stack([gradient.abs().mean().double() for _, gradient in pairs])
    norms = torch.stack([gradient.double().norm() for _, gradient in pairs])
    weights = torch.stack([parameter.detach().double().norm() for parameter, _ in pairs])
    bad = not bool(torch.isfinite(norms).all())
    total = float(norms.norm())
    ratios = norms / (weights + 1e-3)
    return (
        bad or bool((means < SMALLEST_MEAN).any()),
        bad or not GLOBAL_LIMITS[0] <= total <= GLOBAL_LIMITS[1],
        bad or bool((ratios > RATIO_LIMITS[1]).any()) or bool((ratios < RATIO_LIMITS[0]).any()),
    )
