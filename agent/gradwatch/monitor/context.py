"""The context of a listener: the parts of its monitor that it uses, and the callbacks of the agent."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from gradwatch.monitor.notices import Notices
from gradwatch.monitor.watched_models import WatchedModels
from gradwatch.recording.loss_scaling import LossScaling
from gradwatch.recording.optimizers import WatchedOptimizers
from gradwatch.recording.recorder import NormRecorder
from gradwatch.samples.collector import Message
from gradwatch.samples.origin import OriginFinder
from gradwatch.steps.core import StepCore


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Callbacks of the agent that a listener calls."""

    exiting: Callable[[object], None]
    """Takes the argument of ``sys.exit``."""
    forked: Callable[[], None]
    """Called in a forked child."""
    unknown_step: Callable[[Optimizer], None]
    """Called with an optimizer that does not say how many steps a resumed training has made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a monitor."""

    steps: StepCore
    models: WatchedModels
    optimizers: WatchedOptimizers
    recorder: NormRecorder
    scaling: LossScaling
    notices: Notices
    origin: OriginFinder


def discard(_message: Message) -> None:
    """Discard a message: this agent reports nothing."""
