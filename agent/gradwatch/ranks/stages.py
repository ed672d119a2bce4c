"""Pipeline stages: which parameters belong to which stage, as ``torch.distributed.pipelining`` knows it."""

import gc
import sys
from typing import Final

from torch import nn

_MODULE: Final = "torch.distributed.pipelining.stage"


def stages_of_parameters() -> dict[int, int]:
    """Return the stage of each parameter that belongs to one on this rank: id of the parameter -> index of its stage.

    A stage is an object of the program's that nothing of the model refers to, so all objects are looked at; only where
    the program has loaded the pipelines of PyTorch.
    """
    module = sys.modules.get(_MODULE)
    if module is None:
        return {}
    kind: type = module._PipelineStageBase  # noqa: SLF001
    found: dict[int, int] = {}
    for stage in gc.get_objects():
        # The type is asked, as isinstance may run code of the object.
        if issubclass(type(stage), kind) and isinstance(getattr(stage, "submod", None), nn.Module):
            found.update((id(parameter), int(stage.stage_index)) for parameter in stage.submod.parameters())
    return found
