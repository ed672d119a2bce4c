"""What was noted since the last step, and waits for the next one: losses, clippings, numbers of the user's."""

import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.buffers import SampleBuffers
from gradwatch.norms.scalars import Scalar, copy_scalar, sum_scalars
from gradwatch.rounds import Clip, Round

_LOSSES: Final = 1024
"""Losses that wait for their step, and are summed then."""
_CLIPS: Final = 1 << 14
"""Clippings that wait for their step; the oldest are forgotten then. Some clip each parameter by itself."""
_SCALED: Final = 16
"""Scaled losses that are remembered."""
_ASKED: Final = 8
"""Passes of a thread that trains something else whose graphs are searched one by one."""
_NODES: Final = 32
"""Nodes of a graph that are searched for them."""


class _Scaled(NamedTuple):
    """A loss that a loss scaler has multiplied."""

    scaled: weakref.ref[Tensor]
    original: Tensor | None
    """What it was; None of several numbers."""
    scaler: weakref.ref[Any]
    number: int
    """Of its node in the graph, where there is one."""


class Pending:
    """What belongs to a step that has not begun."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.clips: deque[Clip] = deque(maxlen=_CLIPS)
        self.value_clipped: frozenset[int] = frozenset()
        """Indices of the parameters whose gradients were clipped by value."""
        self.logged: dict[str, Scalar] = {}
        self.coming: Round | None = None
        """The next round, where something was measured of it already."""
        self.gone: frozenset[int] = frozenset()
        """Indices of the parameters whose gradients were thrown away since the last loss."""
        self._scaled: deque[_Scaled] = deque(maxlen=_SCALED)
        """Scaled losses that may still be propagated; of any training."""
        self._scaler: weakref.ref[Any] | None = None
        """The one of this training."""
        self._under_way: dict[int, list[weakref.ref[Tensor]]] = {}
        """Losses that are being differentiated, and belong to no step yet, by the thread that does it."""
        self._home = threading.get_ident()
        """The thread that trains. Others may train other models at the same time."""
        self._elsewhere = threading.local()
        """How often each other thread was found to train something else."""

    def __bool__(self) -> bool:
        """Return whether anything waits that depends on the gradients as they are."""
        return bool(self.losses or self.clips or self.value_clipped or self.coming is not None)

    @property
    def clipped(self) -> frozenset[int]:
        """Return the indices of the parameters whose gradients were clipped."""
        return self.value_clipped.union(*(clip.indices for clip in self.clips))

    def begin_backward(self, losses: Iterable[Tensor]) -> None:
        """Losses are about to be differentiated, maybe within another backward pass."""
        self._under_way.setdefault(threading.get_ident(), []).extend(map(weakref.ref, losses))

    def end_backward(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Losses were differentiated; return those that belong to no step yet."""
        known = _alive(self._under_way.pop(threading.get_ident(), ()))
        left = [weakref.ref(loss) for loss in known if not _among(loss, losses)]
        if left:
            self._under_way[threading.get_ident()] = left
        return [loss for loss in losses if _among(loss, known)]

    def is_home(self, losses: Sequence[Tensor], parameters: ParameterRegistry) -> bool:
        """Return whether the thread that differentiates losses is the one that trains; it may have changed.

        In no other may a gradient be looked at: the one that trains may be replacing it, which ends the process. And
        while another thread trains another model, gradients may change that it has not made.

        A thread that trains something else is asked again and again, ever more seldom: its graph is searched for that.
        """
        if threading.get_ident() == self._home:
            return True
        times: int = getattr(self._elsewhere, "times", 0)
        if times > _ASKED and times & (times - 1):
            self._elsewhere.times = times + 1
            return False
        if not parameters.are_reached(losses):
            self._elsewhere.times = times + 1
            return False
        self._elsewhere.times = 0
        self._home = threading.get_ident()
        return True

    def add_losses(self, losses: Iterable[Tensor]) -> None:
        """Keep what was differentiated for the next step."""
        self.gone = frozenset()
        self.losses += map(self._original, losses)
        if len(self.losses) >= _LOSSES:
            self.losses = sum_scalars(self.losses)

    def enter(self, round_: Round, parameters: ParameterRegistry) -> None:
        """An optimizer steps: within a backward pass, it steps with the gradient of what is being differentiated.

        It may do so on a thread of autograd's, for whoever waits for the pass.
        """
        stepping = threading.get_ident()
        if not self._under_way:
            self._home = stepping
        for thread in (stepping,) if stepping == self._home else tuple(self._under_way):
            losses = _alive(self._under_way.get(thread, ()))
            if thread in (stepping, self._home) or parameters.are_reached(losses):
                self._under_way.pop(thread, None)
                round_.losses += map(self._original, losses)

    def _original(self, loss: Tensor) -> Tensor:
        """Return a loss of this training as it was before a loss scaler multiplied it, which is known by that."""
        for known in self._scaled:
            if known.original is not None and known.scaled() is loss:
                self._scaler = known.scaler
                return known.original
        computed = _computed_from(loss, self._scaled)
        if computed is None:
            return copy_scalar(loss)
        self._scaler = computed.scaler
        scale = self.loss_scale
        return copy_scalar(loss) if scale is None else copy_scalar(loss) / scale.to(loss.device)

    def note_scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """Remember what a scaled loss was; of several numbers only where they are in a graph."""
        node = scaled.grad_fn
        number = -1 if node is None else node._sequence_nr()  # noqa: SLF001
        only = copy_scalar(original) if original.numel() == 1 else None
        self._scaled.append(_Scaled(weakref.ref(scaled), only, weakref.ref(scaler), number))

    def note_scaler(self, scaler: object) -> None:
        """Remember a loss scaler that steps, or skips, an optimizer of this training."""
        self._scaler = weakref.ref(scaler)

    def originals(self, scalars: Sequence[Tensor]) -> list[Tensor]:
        """Return what the scaled ones of some losses were."""
        known = [known for known in self._scaled if any(known.scaled() is scalar for scalar in scalars)]
        return [scaled.original for scaled in known if scaled.original is not None]

    @property
    def scaler(self) -> Any:
        """Return the loss scaler of this training; None where there is none."""
        return None if self._scaler is None else self._scaler()

    @property
    def loss_scale(self) -> Tensor | None:
        """Return the scale of the loss scaler, on its device."""
        scale = getattr(self.scaler, "_scale", None)
        return scale if isinstance(scale, Tensor) else None

    def move_to(self, round_: Round) -> None:
        """Hand all over to the step that it belongs to."""
        round_.losses += self.losses
        round_.clips += self.clips
        round_.value_clipped |= bool(self.value_clipped)
        self.losses.clear()
        self.clips.clear()
        self.value_clipped = frozenset()
        if self.logged:
            round_.logged.update(self.logged)
            self.logged = {}

    def forget(self, indices: frozenset[int]) -> SampleBuffers | None:
        """Forget what was noted of gradients that are not what they were.

        Returns:
            The slot of the coming round, where nothing of it is left.
        """
        for clip in self.clips:
            clip.indices -= indices
        self.clips = deque((clip for clip in self.clips if clip.indices), maxlen=_CLIPS)
        self.value_clipped -= indices
        coming = self.coming
        if coming is None:
            return None
        coming.forget(indices)
        if any(reading.live for reading in coming.readings):
            return None
        self.coming = None
        return coming.slot


def _computed_from(loss: Tensor, scaled: Collection[_Scaled]) -> _Scaled | None:
    """Return one of some scaled losses that another one was computed from, by the end of its graph."""
    if not scaled or loss.grad_fn is None:
        return None
    by_number = {known.number: known for known in scaled if known.number >= 0}
    nodes: list[Any] = [loss.grad_fn]
    for node in nodes:
        known = by_number.get(node._sequence_nr())  # noqa: SLF001
        if known is not None:
            return known
        if len(nodes) < _NODES:
            nodes += [below for below, _ in node.next_functions if below is not None]
    return None


def _alive(references: Iterable[weakref.ref[Tensor]]) -> list[Tensor]:
    return [tensor for reference in references if (tensor := reference()) is not None]


def _among(tensor: Tensor, tensors: Iterable[Tensor]) -> bool:
    return any(tensor is other for other in tensors)
