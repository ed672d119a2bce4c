"""Whether a parameter can be measured, found out by trying what the agent will do with it.

Tensor subclasses, quantised types and rare layouts know few operators, and which ones changes from release to release:
no list of types could tell. What cannot be measured is named once, and the rest goes on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradwatch.norms.tensor_spec import TensorSpec, UnitAxis, local_part, norm_function, spec_of, unit_rows


def unreadable_reason(tensor: Tensor, axis: UnitAxis, groups: int) -> str:
    """Return why the unit norms of a tensor cannot be computed; an empty text if they can.

    An ordinary dense tensor is not read: all that the agent does with tensors is made for these.
    """
    try:
        part = local_part(tensor)
        if not (_is_ordinary(part) or part.is_meta):
            with torch.no_grad():
                _try(part, spec_of(part, axis, groups))
    except Exception as error:  # whatever an operator that is missing raises
        return reason_of(error)
    return ""


def reason_of(error: Exception) -> str:
    """Return an error as the reason of a notice, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.120}"


def culprits(tensors: Sequence[Tensor], axes: Sequence[tuple[UnitAxis, int]]) -> dict[int, str]:
    """Return the positions of the tensors that cannot be measured, and why."""
    reasons = (unreadable_reason(tensor, *axis) for tensor, axis in zip(tensors, axes, strict=True))
    return {position: reason for position, reason in enumerate(reasons) if reason}


def _is_ordinary(part: Tensor) -> bool:
    wide = part.dtype.itemsize > 1 and (part.is_floating_point() or part.is_complex())
    return wide and type(part) in (Tensor, nn.Parameter) and part.layout == torch.strided and not part.is_nested


def _try(part: Tensor, spec: TensorSpec) -> None:
    """Do what the agent does: the norms, and what recomputes them where float32 does not hold their squares."""
    if not spec.units:
        return
    out = torch.zeros(spec.units, dtype=spec.norm_dtype, device=spec.device)
    norm_function(spec)(part, out)
    if not spec.sparse:
        rows = unit_rows(part.detach(), spec)
        rows[:1].amax(tuple(range(1, rows.dim())))
    if type(out) is not Tensor:
        raise TypeError(f"{type(part).__name__} computes norms of a type of its own")
