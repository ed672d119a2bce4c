"""How many steps a training has made, as its optimizers tell."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer


def steps_made(optimizers: Iterable[Optimizer], *, wait: bool = False) -> int:
    """Return the step that a restored optimizer says it has made; 0 where it says nothing that can be read.

    Args:
        optimizers: those of Adam's kind count their steps, SGD does not.
        wait: whether to wait for a device that holds the count; without it such a count is not read.
    """
    steps = [0]
    for optimizer in optimizers:
        waited = False
        for state in optimizer.state.values():
            step = state.get("step") if isinstance(state, dict) else None
            if isinstance(step, int):
                steps.append(step)
            elif isinstance(step, Tensor) and step.numel() == 1 and step.device.type == "cpu":
                steps.append(int(step.numpy().item()))
            elif isinstance(step, Tensor) and step.numel() == 1 and wait and not waited and not step.is_meta:
                waited = True  # one tells for all
                steps.append(int(step.item()))
    return max(steps)
