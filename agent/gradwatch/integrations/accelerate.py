"""The agent with Accelerate.

from gradwatch.integrations.accelerate import watch

agent = watch(accelerator, model, optimizer)
"""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from gradwatch.agent import Agent, attach


def watch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    **options: Any,
) -> Agent:
    """Attach to what ``accelerator.prepare`` returned; ``accelerator.end_training`` is followed by ``agent.close``.

    Args:
        accelerator: gives the model inside its wrappers.
        model: as prepared.
        optimizer: as prepared, or None: every optimizer that steps the model.
        options: those of ``gradwatch.attach``; ``step=`` among them where the run is resumed with an optimizer that
            does not count (SGD): Accelerate does not count steps either.
    """
    return attach(accelerator.unwrap_model(model), optimizer, **options)
