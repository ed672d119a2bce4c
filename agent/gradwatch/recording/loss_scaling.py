"""Loss scaling: losses before a loss scaler multiplied them, and the scale by which it multiplied the gradients."""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

from gradwatch.hooks.autograd_graph import NodeBudget, roots, walk
from gradwatch.norms.transfer import Scalar, copy_and_check, copy_scalar

_REMEMBERED: Final = 16
"""Scaled losses that are remembered."""
_NODES: Final = 32
"""Nodes at the end of a loss's graph among which scaled losses are searched for."""


class _Scaled(NamedTuple):
    """A loss that a loss scaler has multiplied."""

    scaled: weakref.ref[Tensor]
    original: Tensor | None
    """What it was; None of several numbers."""
    scaler: weakref.ref[Any]
    number: int
    """Of its node in the graph; -1 where there is none."""


class LossScaling:
    """Knows the scaled losses of the process, and the loss scaler of one training."""

    def __init__(self) -> None:
        self._scaled: deque[_Scaled] = deque(maxlen=_REMEMBERED)
        """Scaled losses that may still be differentiated; of any training."""
        self.has_scaled = False
        """Whether any loss was scaled."""
        self.has_scaler = False
        """Whether a loss scaler of this training was seen."""
        self._scaler: weakref.ref[Any] | None = None
        """The loss scaler of this training."""

    @property
    def scaler(self) -> Any:
        """Return the loss scaler of this training; None where there is none."""
        return None if self._scaler is None else self._scaler()

    @property
    def scale(self) -> Tensor | None:
        """Return the scale of the loss scaler, on its device; None where there is none."""
        scale = getattr(self.scaler, "_scale", None)
        return scale if isinstance(scale, Tensor) else None

    def note_scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """Remember a loss that was scaled; of a loss of several numbers, remember only its place in the graph."""
        self.has_scaled = True
        node = scaled.grad_fn
        number = -1 if node is None else node._sequence_nr()  # noqa: SLF001
        only = copy_scalar(original) if original.numel() == 1 else None
        self._scaled.append(_Scaled(weakref.ref(scaled), only, weakref.ref(scaler), number))

    def note_scaler(self, scaler: object) -> None:
        """Remember a loss scaler that steps, or skips, an optimizer of this training."""
        self._set_scaler(weakref.ref(scaler))

    def _set_scaler(self, scaler: "weakref.ref[Any]") -> None:
        self._scaler, self.has_scaler = scaler, True

    def keep(self, loss: Tensor) -> tuple[Scalar, bool]:
        """Return a loss as it was before it was scaled, and whether it is seen to be finite."""
        return copy_and_check(self._original(loss))

    def _original(self, loss: Tensor) -> Tensor:
        for known in self._scaled:
            if known.original is not None and known.scaled() is loss:
                self._set_scaler(known.scaler)
                return known.original
        computed = self._computed_from(loss)
        if computed is None:
            return copy_scalar(loss)
        self._set_scaler(computed.scaler)
        scale = self.scale
        return copy_scalar(loss) if scale is None else copy_scalar(loss) / scale.to(loss.device)

    def _computed_from(self, loss: Tensor) -> _Scaled | None:
        """Return the scaled loss that another loss was computed from, which the end of its graph shows."""
        by_number = {known.number: known for known in self._scaled if known.number >= 0}
        for node in walk(roots([loss]), NodeBudget(_NODES)):
            known = by_number.get(node._sequence_nr())  # noqa: SLF001
            if known is not None:
                return known
        return None

    def originals(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Return the losses before scaling, of those losses that were scaled."""
        known = [known for known in self._scaled if any(known.scaled() is loss for loss in losses)]
        return [scaled.original for scaled in known if scaled.original is not None]
