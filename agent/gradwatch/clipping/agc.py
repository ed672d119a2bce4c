"""How gradients are clipped adaptively: the configuration of AGC, and the parameters that its patterns stand for."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor

from gradwatch.ranks.sharding import Granularity
from gradwatch.statistics import RATIO_EPS

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class AGC:
    """How gradients are clipped: ``attach(model, optimizer, clip=AGC(0.01))``.

    A parameter group of an optimizer may carry a threshold of its own, ``agc_clip``: a number, or None for no clipping.
    ``clip`` does the same where the optimizer has no setting of that name.

    Args:
        clip: largest ratio of gradient to weight, above 0; the paper's grid is 0.01, 0.02, 0.04, 0.08, 0.16, smaller
            for larger batches.
        eps: floor for the norm of a weight, above 0.
        granularity: ``unit`` (an output row), or ``tensor``.
        exclude: names, globs or parameters that are not clipped; None: the weight of the classifier, as the graph of
            the loss shows it; an empty list: nothing.
        experts: names or globs of weights of shape (experts, rows, ...): each row of each expert is a unit.

    Raises:
        ValueError: an option cannot be right; the text names it.
    """

    clip: float = 0.01
    eps: float = RATIO_EPS
    granularity: Granularity = "unit"
    exclude: "str | Tensor | Iterable[str | Tensor] | None" = None
    experts: "str | Iterable[str]" = ()

    def __post_init__(self) -> None:
        check_clip(self.clip)
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps={self.eps}: the floor for a weight's norm is a number above 0, such as {RATIO_EPS}")
        if self.granularity not in ("unit", "tensor"):
            raise ValueError(f"granularity={self.granularity!r}: 'unit' or 'tensor'")

    @property
    def attributes(self) -> dict[str, str]:
        """Return the attributes that the run is registered with."""
        return {"agc_clip": str(self.clip), "agc_eps": str(self.eps), "agc": self.granularity}

    def excluded_indices(self, names: Sequence[str], parameters: Sequence[Tensor]) -> set[int] | None:
        """Return the indices of the parameters that the user excludes; None where the classifier is to be found.

        Raises:
            ValueError: a pattern matches nothing.
        """
        return None if self.exclude is None else match_parameters(as_list(self.exclude), names, parameters)

    def expert_indices(self, names: Sequence[str], parameters: Sequence[Tensor]) -> set[int]:
        """Return the indices of the parameters that hold the weights of several experts.

        Raises:
            ValueError: a pattern matches nothing, or a parameter with fewer than two dims.
        """
        found = match_parameters(as_list(self.experts), names, parameters)
        for index in found:
            if parameters[index].dim() < 2:
                shape = tuple(parameters[index].shape)
                raise ValueError(f"experts: {names[index]} has shape {shape}, not (experts, rows, ...)")
        return found


def check_clip(clip: object) -> float:
    """Return ``clip`` as a float.

    Raises:
        ValueError: it is not a number above 0.
    """
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip={clip!r}: the largest ratio of gradient to weight is a number above 0, such as 0.01")
    return float(clip)


def as_list(given: "str | Tensor | Iterable[_T]") -> list[str | Tensor | _T]:
    """Return one pattern or several as a list."""
    return [given] if isinstance(given, str | Tensor) else list(given)


def match_parameters(patterns: Sequence[str | Tensor], names: Sequence[str], parameters: Sequence[Tensor]) -> set[int]:
    """Return the indices of the parameters that any pattern stands for.

    Args:
        patterns: names, globs, or parameters themselves.
        names: names of all parameters.
        parameters: the parameters in the order of their names.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found: set[int] = set()
    for pattern in patterns:
        if isinstance(pattern, Tensor):
            hits = {index for index, parameter in enumerate(parameters) if parameter is pattern}
            shown = f"a tensor of shape {tuple(pattern.shape)}"
        else:
            hits = {index for index, name in enumerate(names) if fnmatchcase(name, pattern)}
            shown = repr(pattern)
        if not hits:
            raise ValueError(f"{shown} matches no parameter; there are {', '.join(names[:8])} and so on")
        found |= hits
    return found
