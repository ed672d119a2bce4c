"""Attaching the agent in a training loop that uses Hugging Face Accelerate.

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
    """Attach to a model and its optimizer after ``accelerator.prepare``.

    Call ``agent.close()`` after ``accelerator.end_training()``.

    Args:
        accelerator: unwraps the model.
        model: the prepared model.
        optimizer: the prepared optimizer or several; None: every optimizer that steps the model.
        options: those of ``gradwatch.attach``. A resumed run needs ``step=`` if its optimizer does not count steps
            (SGD), because Accelerate does not count them either.
    """
    return attach(accelerator.unwrap_model(model), optimizer, **options)
