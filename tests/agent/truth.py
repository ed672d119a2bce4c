"""An independent oracle: plain numpy in float64, one parameter at a time."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def norm(tensor: torch.Tensor) -> float:
    """Return the L2 norm of all elements."""
    values = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    values = values.to(torch.complex128 if values.is_complex() else torch.float64)
    return float(np.sqrt(np.sum(np.abs(values.cpu().numpy()) ** 2)))


def norms(parameters: Iterable[nn.Parameter], *, gradients: bool) -> NDArray[np.float64]:
    """Return the norms of parameters or of their gradients; -1 where there is none."""
    found = []
    for parameter in parameters:
        tensor = parameter.grad if gradients else parameter
        found.append(-1.0 if tensor is None else norm(tensor))
    return np.array(found)
