"""The session of one watched training: its monitor, collector and delivery, from the first parameter to the last batch.

``Agent`` is its public interface; ``gradwatch run`` works with sessions themselves.
"""

import os
import threading
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import wire
from gradwatch.clipping.agc import AGC
from gradwatch.delivery.delivery import Delivery
from gradwatch.lifecycle import shutdown
from gradwatch.lifecycle.launcher import RunNote, is_launched_command, write_note
from gradwatch.lifecycle.process import attributes, default_run_name, name_parent, rank
from gradwatch.lifecycle.resumption import begin_run, unwatched
from gradwatch.lifecycle.shutdown import CLOSING_SECONDS
from gradwatch.monitor.context import Callbacks, discard, discard_numbers
from gradwatch.monitor.guard import AgentThread
from gradwatch.monitor.monitor import Monitor
from gradwatch.norms.transfer import Scalar, copy_scalar
from gradwatch.ranks.exchange import exchange_for
from gradwatch.samples.collector import Collector
from gradwatch.samples.loggers import LoggerName, open_logger
from gradwatch.settings import RUN_TAKEN, Settings
from gradwatch.steps.event_log import write_events
from gradwatch.steps.schedule import OverheadAccount, SamplingSchedule
from gradwatch.steps.state import StepRecord

_running: tuple["Session", ...] = ()


def running_sessions() -> tuple["Session", ...]:
    """Return the sessions that have begun and not ended, the newest last."""
    return _running


class Session:
    """Watches one training, or only clips where another rank reports.

    Args:
        models: the watched models.
        optimizers: the optimizers whose steps count; None: every one that steps the models' parameters.
        settings: where it reports to, and how often.
        automatic: whether ``gradwatch run`` attached it.
        clip: how gradients are clipped adaptively; None: not at all.
        retired: whether the session does nothing, because it stands for one of another process.
        checkpoint: the run that the checkpoint names which the training was restored from, empty where it names none;
            None: nobody keeps it with checkpoints.

    Raises:
        ValueError: clipping is on, and an optimizer that was given steps no parameter of the models.
        NotImplementedError: clipping is on, and the gradients cannot be clipped.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] | None,
        settings: Settings,
        *,
        automatic: bool = False,
        clip: AGC | None = None,
        retired: bool = False,
        checkpoint: str | None = None,
    ) -> None:
        self._ranks = exchange_for(models)
        watching = not retired and (rank() == 0 or self._ranks is not None)
        self._attempt = time.time_ns() // 1_000_000
        told = attributes() | ({} if clip is None else clip.attributes)
        begun = self._begun = (
            begin_run(settings, models, self._ranks, self._attempt, told, checkpoint=checkpoint)
            if watching
            else unwatched(settings)
        )
        self.run_id = begun.id
        self.run_url = f"{settings.url}/runs/{self.run_id}"
        self._left_to_launcher = automatic
        """Whether ``gradwatch run`` ends the run where this is the process of its command: it sees the exit status."""
        self._exit: tuple[int, int | None] = (0, None)
        """Step at which ``sys.exit`` was called last, and with what."""
        self._lock = threading.Lock()
        self._collector: Collector | None = None
        """None where nothing is reported: on another rank, in a forked child, in a retired session."""
        self._delivery: Delivery | None = None
        self._note: RunNote | None = None
        self._event_log: FileIO | None = None
        self.threads: list[AgentThread] = []
        self._closed = not watching and clip is None
        account = self._account = OverheadAccount(
            settings.every_steps, settings.overhead_budget_ratio, aligned=self._ranks is not None
        )
        callbacks = Callbacks(
            exiting=self._exiting,
            forked=self._forked,
            unknown_step=self._warn_of_unknown_step,
        )
        self.monitor = Monitor(
            models,
            optimizers,
            SamplingSchedule(account),
            callbacks,
            step=settings.step if begun.resumed else settings.step or 0,
            stored_step=begun.last_step,
            clip=clip,
            ranks=self._ranks,
            watching=watching,
        )
        if settings.step_log is not None and watching:
            self._write_events(settings.step_log, account)
        if not self._closed:
            self._begin(settings, clip, watching=watching)

    def _write_events(self, path: Path, account: OverheadAccount) -> None:
        """Write the events of the training to a file for a later replay (see ``gradwatch.steps.event_log``)."""
        try:
            log = path.open("wb", buffering=0)
        except OSError as error:
            self.monitor.notices.warn(f"GRADWATCH_STEP_LOG={path} cannot be written: {error.strerror}")
            return
        self._event_log = log
        write_events(self.monitor.steps, account, log.write)

    def _begin(self, settings: Settings, clip: AGC | None, *, watching: bool) -> None:
        global _running
        try:
            self.monitor.check()
            self.monitor.listen()  # before an earlier one leaves: the last listener drops all references to tensors
            clipped = self._replace_earlier()
            if watching:
                self._report(settings, clip)
            for run in clipped if clip is None else ():
                self.monitor.notices.clipping_ended(run)
        except BaseException:
            self.monitor.stop()  # no hook and no reference stays behind
            raise
        if self._begun.resumed and settings.run == os.environ.get("GRADWATCH_RUN"):
            os.environ[RUN_TAKEN] = f"{settings.run} {os.getpid()}"  # a child that trains has a run of its own
        _running = (*_running, self)
        shutdown.close_at_exit(running_sessions)

    def _report(self, settings: Settings, clip: AGC | None) -> None:
        """Start the threads that build samples and send them."""
        monitor = self.monitor
        warn, failed = monitor.notices.warn, monitor.guard.failed
        if self._ranks is None or self._ranks.rank == 0:
            self._delivery = Delivery(self.run_id, settings, monitor.dropped, warn, failed)
        template = wire.Registration(
            project=settings.project,
            name="" if self._begun.resumed else settings.run or default_run_name(),
            parameters=[],
            id=self.run_id,
            started_at=self._attempt / 1000,
            attempt=self._attempt,
            attributes=self._begun.attributes,
        )
        self._collector = Collector(
            None if self._delivery is None else self._delivery.spool,
            monitor.recorder.pool,
            monitor.dropped,
            template,
            clip,
            self._ranks,
            written=_nothing if self._delivery is None else self._delivery.sender.notify,
            trouble=monitor.note_trouble,
            failed=failed,
            not_measured=monitor.models.note_not_measured,
            needless=self._other_ranks_are_needless,
            agreed=monitor.steps.schedule.sample_from,
            warn=warn,
        )
        self.threads.append(self._collector)
        monitor.report_to(self._collector.put, self._collector.add_numbers, self.threads)
        monitor.steps.schedule.ask = self._collector.ask_burst
        monitor.models.start_registering()
        self._collector.start()
        if self._delivery is not None:
            self.threads.append(self._delivery.sender)
            self._delivery.sender.start()
            name_parent(self.run_id)
            self._note = RunNote(run=self.run_id, url=settings.url, attempt=self._attempt, pid=os.getpid())
            write_note(self._note)

    def _other_ranks_are_needless(self) -> None:
        """Measure nothing on a rank of which nothing is needed; on rank 0, sample without regard to the others."""
        if self._delivery is not None:
            self._account.aligned = False
        else:
            self.monitor.stop_watching()

    def _replace_earlier(self) -> list[str]:
        """Close the session that watches exactly these parameters: a notebook cell was run again.

        Returns:
            The ids of the runs that have ended by this and whose gradients were clipped.
        """
        mine = self.monitor.models.parameters
        clipped = []
        for other in _running:
            theirs = other.monitor.models.parameters
            if theirs.ids == mine.ids or theirs.are_gone:
                if other.monitor.models.clipper is not None and not theirs.are_gone:
                    clipped.append(other.run_id)
                other.close(time.monotonic() + 1.0, "completed")
        return clipped

    @property
    def step(self) -> int:
        """Return the number of the last step."""
        return self.monitor.steps.state.number

    @property
    def interval_steps(self) -> int:
        """Return the number of steps between the last two samples, or the fixed interval."""
        return self.monitor.steps.schedule.interval_steps

    @property
    def models(self) -> list[nn.Module]:
        """Return the watched models that still exist."""
        return self.monitor.models.parameters.models

    def watches(self, parameter: Tensor) -> bool:
        """Return whether a parameter is watched."""
        return self.monitor.watches(parameter)

    def log(self, name: str, value: Scalar) -> None:
        """Add a number to the next step; later changes of a tensor do not reach it."""
        if isinstance(value, Tensor):
            streams = self.monitor.recorder.streams
            streams.add_devices([value.device])
            if not streams.enter():
                self.monitor.notices.captured()
                return
            value = copy_scalar(value)
        self.monitor.steps.logged(name, value)

    def add_logger(self, logger: LoggerName, **options: Any) -> None:
        """Write the numbers of the whole run into a logger of the user's, too; raises as ``open_logger`` does."""
        if self._collector is not None and not self._closed:
            self._collector.add_logger(open_logger(logger, **options))

    def close(self, deadline: float, status: str, exit_code: int | None = None) -> None:
        """Stop watching, deliver everything measured so far and finish the run; idempotent.

        Args:
            deadline: monotonic time by which all must be done.
            status: ``completed``, ``failed`` or ``killed``.
            exit_code: exit code of the process, if known.
        """
        if self.stop(deadline, status, exit_code):
            self.deliver()

    def stop(self, deadline: float, status: str, exit_code: int | None = None) -> bool:
        """Do what ``close`` does, up to the wait for the server; return whether ``deliver`` must follow."""
        if not self._leave():
            return False
        self._write(deadline, status, exit_code)
        return True

    def deliver(self) -> None:
        """Wait until the server has taken everything, or until the deadline that ``stop`` was given.

        Where not everything is written by then, the collector goes on in the background.
        """
        assert self._collector is not None
        if self._collector.is_running:
            if self._delivery is not None:
                self._delivery.sender.join()
            shutdown.finish_in_background(self._finish_late, self._collector.give_up)
        else:
            self._finish_late()

    def _finish_late(self) -> None:
        assert self._collector is not None
        self._collector.join()
        if self._delivery is not None:
            self._delivery.close()

    def finish_in_background(self) -> None:
        """End a training after which others follow in this process, without waiting for the server or a disk."""
        self._left_to_launcher = False
        if self._leave():
            assert self._collector is not None
            shutdown.finish_in_background(self._write_and_deliver, self._collector.give_up)

    def _write_and_deliver(self) -> None:
        self._write(time.monotonic() + CLOSING_SECONDS, "completed", None)
        self.deliver()

    def _leave(self) -> bool:
        """Stop listening; return whether a run has to be finished."""
        global _running
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        watched = self.monitor.guard.watching
        self.monitor.stop()
        if watched:
            self._put_logged()
        if self._event_log is not None:
            self._event_log.close()
        _running = tuple(session for session in _running if session is not self)
        name_parent(_running[-1].run_id if _running else "")
        return self._collector is not None

    def _put_logged(self) -> None:
        """Count numbers that were logged after the last step, such as those of a last validation, to that step."""
        state = self.monitor.steps.state
        if state.logged and self._collector is not None:
            last = StepRecord(state.number, time.time(), sampled=False)
            last.logged, state.logged = state.logged, {}
            self.monitor.recorder.send(last)
            self._collector.put(last)

    def _write(self, deadline: float, status: str, exit_code: int | None) -> None:
        """Write everything measured so far, and how the run ended."""
        assert self._collector is not None
        left_open = self._left_to_launcher and is_launched_command()
        end = None if left_open else wire.End(at=time.time(), status=status, exit_code=exit_code)
        failed = self.monitor.recorder.device_failed
        self._collector.finish(end, max(deadline - time.monotonic(), 0.1), device_failed=failed)
        if self._note is not None and not left_open:
            write_note(self._note, ended=True)
        if self._delivery is not None:
            self._delivery.sender.end(deadline)

    def _warn_of_unknown_step(self, optimizer: Optimizer) -> None:
        if self._delivery is not None and not self._begun.by_itself:
            self.monitor.notices.warn(
                f"run {self.run_id} is resumed, but {type(optimizer).__name__} does not say how many steps were made: "
                "they are counted from 1 again, which hides the earlier ones; pass step= to attach()"
            )

    def _exiting(self, status: object) -> None:
        """Note the exit code of a ``sys.exit``: it is the run's, unless another step follows."""
        if threading.current_thread() is threading.main_thread():
            self._exit = self.step, shutdown.exit_code_of(status)

    @property
    def exit_code(self) -> int | None:
        """Return the exit code of a ``sys.exit`` since the last step, None without one."""
        return self._exit[1] if self._exit[0] == self.step else None

    def _forked(self) -> None:
        """Report nothing in a forked child, whose threads and spool are the parent's."""
        if self._delivery is not None:
            self._delivery.spool.abandon_after_fork()
        self._collector = None
        self.monitor.report_to(discard, discard_numbers, ())


def _nothing() -> None:
    """Do nothing: nobody waits for a write to the spool."""
