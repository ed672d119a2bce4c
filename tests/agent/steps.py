"""Tables of events for the step core: what a training does, as the core hears it, with texts for tensors."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from gradwatch.steps.core import Began, EndStep, Made, StepCore
from gradwatch.steps.schedule import Costs, OverheadAccount, SamplingSchedule
from gradwatch.steps.state import Measurement, NormClip, StepRecord

HERE = 1
"""Id of the thread that trains."""


class Training:
    """Feeds a step core as the torch side does, and keeps the steps that are over.

    Optimizers are named by letters; ``parts`` says which parameters each of them steps.
    """

    def __init__(self, given: str | None = "A", every: int = 1, step: int = 0, **parts: Iterable[int]) -> None:
        self.parts = {name: frozenset(indices) for name, indices in (parts or {"A": (0, 1)}).items()}
        schedule = SamplingSchedule(OverheadAccount(every, 0.01))
        expected = None if given is None else [self.key(name) for name in given]
        self.core = StepCore(step, schedule, expected, thread=HERE, keep=lambda loss: (loss, "bad" not in str(loss)))
        self.ended: list[StepRecord] = []
        self.measured: list[tuple[str, frozenset[int]]] = []
        """What was measured: ``clip`` or the optimizer, and the parameters."""
        self.now = 0.0

    def key(self, optimizer: str) -> int:
        return ord(optimizer) - ord("A") + 1

    def backward(self, loss: str, *changed: int, thread: int = HERE, during: Callable[[], object] = int) -> None:
        self.core.backward_began(thread, [loss])
        during()
        self.core.backward_ended(thread, [loss], frozenset(changed) or frozenset(self.everything))

    @property
    def everything(self) -> list[int]:
        return sorted(frozenset().union(*self.parts.values()))

    def clip(self, *indices: int, norm: str = "norm", finite: bool = True) -> NormClip:
        listed = list(indices) or self.everything
        clip = NormClip(norm, 1.0, frozenset(listed), finite=finite)
        action = self.core.norm_clipped(clip, listed, not finite)
        if action is not None:
            self.measure("clip", action.record, listed, before_clip=True, void=action.void, clips=action.clips)
        return clip

    def measure(self, by: str, record: StepRecord, indices: Iterable[int], **known: Any) -> None:
        self.measured.append((by, frozenset(indices)))
        record.measurements.append(
            dataclasses.replace(Measurement(frozenset(indices), "norms", before_clip=False), **known)
        )

    def begin(self, optimizer: str, outer: str | None = None, *, closure: bool = False, thread: int = HERE) -> Began:
        given = (self.key(optimizer), self.parts[optimizer], thread, self.now)
        around = None if outer is None else self.key(outer)
        began = self.core.step_began(*given, outer=around, closure=closure)
        if isinstance(began, EndStep):
            self.end(learn=True)
            began = self.core.step_began(*given, outer=around, closure=closure)
        assert isinstance(began, Began)
        if began.record is not None and began.record.sampled and not closure:
            self.measure(optimizer, began.record, self.parts[optimizer])
        return began

    def made(self, optimizer: str) -> None:
        self._made(self.core.step_made(self.key(optimizer)))

    def _made(self, made: Made) -> None:
        if made.ended:
            self.end()

    def step(self, optimizer: str = "A", outer: str | None = None) -> Began:
        began = self.begin(optimizer, outer)
        self.made(optimizer)
        return began

    def skip(self, optimizer: str = "A") -> None:
        """A loss scaler had its chance to step the optimizer; without a step before it, it found Inf."""
        given = (self.key(optimizer), self.parts[optimizer], HERE, self.now)
        made = self.core.scaler_stepped(*given)
        if isinstance(made, EndStep):
            self.end(learn=True)
            made = self.core.scaler_stepped(*given)
        assert isinstance(made, Made)
        self._made(made)

    def end(self, *, learn: bool = False) -> None:
        record = self.core.state.open
        if record is None:
            return
        self.now += 1.0
        self.core.step_ended(self.now, Costs(), learn=learn)
        self.ended.append(record)

    @property
    def losses(self) -> list[list[str]]:
        """Return the losses of each step that is over."""
        return [record.losses for record in self.ended]

    @property
    def stepped(self) -> list[str]:
        """Return the optimizers of each step that is over."""
        return ["".join(chr(ord("A") + key - 1) for key in record.stepped) for record in self.ended]
