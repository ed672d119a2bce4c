"""The monitor of one training: made of its parts, started and stopped."""

import threading
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.clipping.agc import AGC
from gradwatch.delivery.dropped import Dropped
from gradwatch.hooks import torch_hooks
from gradwatch.monitor.arrived_numbers import ArrivedNumbers
from gradwatch.monitor.context import Callbacks, Parts
from gradwatch.monitor.guard import AgentThread, Guard
from gradwatch.monitor.listener import TrainingListener
from gradwatch.monitor.notices import Notices
from gradwatch.monitor.watched_models import WatchedModels
from gradwatch.norms.streams import StreamLog
from gradwatch.norms.tensor_spec import local_part
from gradwatch.norms.transfer import sum_scalars
from gradwatch.norms.triton_reducer import compare_kernels
from gradwatch.ranks.exchange import RankExchange
from gradwatch.recording.loss_scaling import LossScaling
from gradwatch.recording.optimizers import WatchedOptimizers
from gradwatch.recording.recorder import NormRecorder
from gradwatch.recording.restored_steps import steps_made
from gradwatch.samples.collector import Message
from gradwatch.samples.origin import OriginFinder
from gradwatch.steps.core import StepCore
from gradwatch.steps.schedule import SamplingSchedule


class Monitor:
    """Watches one training, and clips.

    Args:
        models: the watched models.
        named: the optimizers whose steps count; None: every one that steps the models' parameters.
        schedule: says which steps are sampled.
        callbacks: those of the agent.
        step: steps made so far; None: the step count of a restored optimizer.
        stored_step: steps made so far where neither tells: the last one that the server has stored.
        clip: how gradients are clipped adaptively; None: not at all.
        ranks: the ranks of a sharded training; None where this rank measures alone.
        watching: whether anything is measured.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        named: Sequence[Optimizer] | None,
        schedule: SamplingSchedule,
        callbacks: Callbacks,
        *,
        step: int | None,
        stored_step: int = 0,
        clip: AGC | None,
        ranks: RankExchange | None,
        watching: bool,
    ) -> None:
        clips = clip is not None
        self.dropped = Dropped()
        streams = StreamLog()
        self.guard = Guard(self.dropped, streams, self._disarmed, watching=watching)
        self.notices = Notices(self._put, lambda: self.steps.state.number, clips=clips)
        self.guard.captured = self.notices.captured
        self.models = WatchedModels(models, clip, ranks, self.notices, put=self._put)
        self.recorder = NormRecorder(self.models.parameters, streams, self.dropped.add_sample)
        self._origin = OriginFinder(self.models.parameters)
        self._optimizers = WatchedOptimizers(
            named,
            self.models.parameters,
            self._renew,
            self.models.classifier.search_again,
            clips=clips,
            warn=self.notices.warn,
            refused=self.notices.not_measured,
        )
        made = steps_made(self._optimizers.named, wait=True) if step is None else step
        self.steps = StepCore(
            made or (stored_step if step is None else 0),
            schedule,
            self._optimizers.named_keys,
            number_is_open=step is None and not made,
            thread=threading.get_ident(),
            summed=sum_scalars,
        )
        arrived = ArrivedNumbers(self.steps)
        self.recorder.sent, self.recorder.pool.before_reuse = arrived.sent, arrived.look
        parts = Parts(
            steps=self.steps,
            models=self.models,
            optimizers=self._optimizers,
            recorder=self.recorder,
            scaling=LossScaling(),
            notices=self.notices,
            origin=self._origin,
        )
        self.listener = TrainingListener(parts, self.guard, callbacks, clips=clips)

    def check(self) -> None:
        """Find the parameters, and check that they can be watched.

        Raises:
            ValueError: clipping is on, and an optimizer that was given steps no parameter of the models.
            NotImplementedError: clipping is on, and the gradients cannot be clipped.
        """
        self.models.discover()
        self._note_devices()
        self._compare_kernels()
        self._optimizers.check_named()
        self._check_parts()

    def report_to(
        self,
        put: Callable[[Message], None],
        add_numbers: Callable[[int, float | None, float | None], None],
        threads: Sequence[AgentThread],
    ) -> None:
        """Send records, registrations and events to a collector from now on.

        Args:
            put: takes each of them; never waits.
            add_numbers: takes the number, the loss and the clip norm of each step without a record; never waits.
            threads: the agent's own threads, whose processor time counts as the agent's.
        """
        self.listener.put = put
        self.listener.add_numbers = add_numbers
        self.listener.threads = threads

    def _put(self, message: Message) -> None:
        self.listener.put(message)

    def listen(self) -> None:
        """Start listening to the training."""
        torch_hooks.listen(self.listener)

    def stop(self) -> None:
        """Stop listening and end the open step; idempotent."""
        try:
            if self.guard.watching:
                with self.guard.lock:
                    self.listener.end_step()
                    self.recorder.check_devices()
        except Exception as error:  # a device that failed must not keep the rest from ending
            self.guard.failed(error)
        self.guard.watching = False
        self._optimizers.forget_lists()
        torch_hooks.leave(self.listener)
        self.models.parameters.close()
        self._origin.close()

    def stop_watching(self) -> None:
        """Measure nothing any more, but go on clipping; another thread than the training's may call this."""
        with self.guard.lock:
            self.guard.watching = False
            self.models.stop_registering()

    def watches(self, parameter: Tensor) -> bool:
        """Return whether a parameter is watched."""
        return self.models.parameters.find(parameter) is not None

    def note_trouble(self, unclear: bool) -> None:
        """Sample every step for a while; if nothing shows the origin of a non-finite number, hook the modules."""
        self.steps.schedule.want_burst()
        if unclear:
            self._origin.request_hooks(self.steps.state.number)

    def _disarmed(self, error: Exception) -> None:
        self._origin.close()
        self.notices.disarmed(error)

    def _renew(self, unknown: bool) -> None:
        """Look for new parameters if some are not known, before those of an optimizer are looked up."""
        if unknown:
            self._optimizers.forget_lists()
            if self.models.discover():
                self._note_devices()
                self.models.register()
        self._check_parts()

    def _note_devices(self) -> None:
        parameters = (info.parameter() for info in self.models.parameters.watched)
        self.recorder.streams.add_devices(parameter.device for parameter in parameters if parameter is not None)

    def _compare_kernels(self) -> None:
        """Test the kernels now: within a step other ranks may wait in a collective."""
        infos = self.models.parameters.watched
        readable = (info for info in infos if not info.unreadable)
        specs = [info.spec(local_part(p)) for info in readable if (p := info.parameter()) is not None]
        compare_kernels({spec.buffer for spec in specs})

    def _check_parts(self) -> None:
        if self.models.check_parts(watching=self.guard.watching):
            self.recorder.stopped = True
