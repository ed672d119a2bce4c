"""Counting the operators that a sample launches."""

import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.norms.layout import NormLayout
from gradwatch.norms.reducer import SCALED_ELEMENTS, NormReducer, Scratch
from gradwatch.norms.tensor_spec import spec_of


class Operators(TorchDispatchMode):
    """Counts the operators that are launched, and refuses those that wait for the device."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "item")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert name.partition(".")[0] not in self.WAITING, name
        self.names.append(name)
        return func(*args, **(kwargs or {}))


def launched(shapes: Sequence[tuple[int, ...]], device: str) -> int:
    """Return the operators for one sample of gradients and weights of these shapes, numpy's among them.

    Args:
        shapes: of the parameters.
        device: ``cpu``, or ``meta`` for what an accelerator launches.
    """
    shared = torch.zeros(max(map(math.prod, shapes)), device=device)
    tensors = [shared[: math.prod(shape)].view(shape) for shape in shapes]
    layout = NormLayout([spec_of(tensor, "rows") for tensor in tensors])
    buffers = {key: torch.zeros(size, dtype=key.dtype, device=device) for key, size in layout.sizes.items()}
    reducer = NormReducer(layout, buffers, Scratch())
    with Operators() as operators, torch.no_grad(), patch.object(np, "einsum", wraps=np.einsum) as sums:
        reducer.run(tensors)
        reducer.run(tensors)
    return len(operators.names) + sums.call_count


def allowed(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the bar: 8 for each unit width, and 20."""
    return 8 * len({spec_of(torch.zeros(1).expand(shape), "rows").width for shape in shapes}) + 20


def allowed_on_accelerator(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the bar without Triton: twice as many, and more for tensors that are reduced alone and scaled in parts.

    Each norm is computed once more of the tensor scaled down, since its squares may overflow float32. Gradients and
    weights take three operators more for each part.
    """
    parts = sum(math.prod(shape) // SCALED_ELEMENTS for shape in shapes)
    return 2 * allowed(shapes) + 2 * 3 * parts
