"""Attaching to a training, and the life of an agent: it is started, delivers, ends."""

import logging
import math
import operator
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self, SupportsFloat, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import wire
from gradwatch.clipping.agc import AGC
from gradwatch.delivery.delivery import Delivery
from gradwatch.governor import Governor
from gradwatch.hooks import taps
from gradwatch.lifecycle import shutdown
from gradwatch.lifecycle.launcher import RunNote, is_launched_command, write_note
from gradwatch.lifecycle.process import attributes, default_run_name, rank
from gradwatch.lifecycle.shutdown import CLOSING_SECONDS
from gradwatch.norms.scalars import copy_scalar
from gradwatch.observer import Observer
from gradwatch.optimizers import unwrapped
from gradwatch.ranks.exchange import exchange_for
from gradwatch.rounds import Message, Round
from gradwatch.samples.collector import Collector
from gradwatch.samples.loggers import LoggerName, open_logger
from gradwatch.settings import RUN_ID, Settings, resolve

_log = logging.getLogger("gradwatch")

_STATUSES: Final = ("completed", "failed", "killed")


def attach(
    model: nn.Module | Iterable[nn.Module],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    url: str | None = None,
    token: str | None = None,
    project: str | None = None,
    run: str | None = None,
    every: int | None = None,
    overhead_budget: float = 0.01,
    clip: float | AGC | None = None,
    step: int | None = None,
) -> "Agent":
    """Watch the gradients of ``model`` from now on and report them to the server at ``url``.

    Args:
        model: a module or several.
        optimizer: one, several, or None: every optimizer that steps the model's parameters.
        url: the server; None: ``GRADWATCH_URL``, else http://127.0.0.1:8321.
        token: bearer token; None: ``GRADWATCH_TOKEN`` or the file ``GRADWATCH_TOKEN_FILE`` names.
        project: what the run belongs to; None: ``GRADWATCH_PROJECT``, else ``default``.
        run: a name (None: ``GRADWATCH_RUN``, else the script and the time), or the id of an earlier run (``run-`` and
            16 hexadecimal digits), which is then resumed as a new attempt.
        every: steps between samples; None: ``GRADWATCH_EVERY``, else as ``overhead_budget`` allows.
        overhead_budget: the agent's largest share of the step time, 0.01 for 1%.
        clip: None, or how gradients are clipped adaptively before each step, on every rank: ``gradwatch.AGC(...)``, or
            a number for ``AGC(number)``. An error of the clipping is raised, not swallowed.
        step: optimizer steps that the training has made so far: the next one is counted as ``step + 1``. None: 0 for a
            new run; for a resumed one what a restored optimizer says, now or when it first steps. SGD says nothing.

    Returns:
        The agent, already watching. Attached again to the same parameters (in a notebook), it replaces the earlier one.

    Raises:
        SettingsError: an argument cannot be used.
        TypeError: ``model`` or ``optimizer`` is not one.
        ValueError: ``clip`` cannot be right, names parameters that are not there, or is given with an optimizer that
            holds none of the model's parameters.
    """
    agc = clip if isinstance(clip, AGC) or clip is None else AGC(clip)
    given: Any = model
    models = [given] if not isinstance(given, Iterable) or isinstance(given, nn.Module) else list(given)
    if not models or not all(isinstance(module, nn.Module) for module in models):
        raise TypeError(f"model must be a torch.nn.Module or several of them, not {model!r:.80}")
    settings = resolve(
        url=url, token=token, project=project, run=run, every=every, overhead_budget=overhead_budget, step=step
    )
    return Agent(models, unwrapped(optimizer), settings, clip=agc)


class Agent(Observer):
    """Watches one training. Made by ``attach``; also a context manager that closes itself.

    Attributes:
        run_id: id of the run, ``run-`` and 16 hexadecimal digits.
        run_url: where its page is.
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
    ) -> None:
        self._left_to_launcher = automatic
        """Whether ``gradwatch run`` ends the run where this is the process of its command: it sees the exit status."""
        resumed = settings.run is not None and RUN_ID.fullmatch(settings.run) is not None
        self.run_id = settings.run if resumed and settings.run else f"run-{secrets.token_hex(8)}"
        self.run_url = f"{settings.url}/runs/{self.run_id}"
        ranks = exchange_for(models)
        super().__init__(
            models,
            optimizers,
            Governor(settings.every_steps, settings.overhead_budget_ratio, aligned=ranks is not None),
            step=settings.step if resumed else settings.step or 0,
            clip=clip,
            ranks=ranks,
            watching=not retired and (rank() == 0 or ranks is not None),
        )
        self._exit: tuple[int, int | None] = (0, None)
        """Step at which ``sys.exit`` was called last, and with what."""
        self._closed = not self.watching and self._clipper is None
        self._started = False
        self._lock = threading.Lock()
        if self._closed:
            return
        self._discover()
        self._optimizers.check()
        self._check_parts()
        self._replace_earlier()
        if self.watching:
            self._start(settings, resumed=resumed)
        taps.listen(self)
        shutdown.close_at_exit(_running)

    def _start(self, settings: Settings, *, resumed: bool) -> None:
        self._started = True
        self._delivery: Delivery | None = None
        self._note: RunNote | None = None
        if self._ranks is None or self._ranks.rank == 0:
            self._delivery = Delivery(self.run_id, settings, self.dropped, self.warn, self.failed)
        attempt = time.time_ns() // 1_000_000
        template = wire.Registration(
            project=settings.project,
            name="" if resumed else settings.run or default_run_name(),
            parameters=[],
            id=self.run_id,
            started_at=attempt / 1000,
            attempt=attempt,
            attributes=attributes() | (self._clipper.agc.attributes if self._clipper is not None else {}),
        )
        self._collector = Collector(
            None if self._delivery is None else self._delivery.spool,
            self._meter.slots,
            self.dropped,
            template,
            None if self._clipper is None else self._clipper.agc,
            self._ranks,
            written=_nothing if self._delivery is None else self._delivery.sender.notify,
            trouble=self._note_trouble,
            failed=self.failed,
            warn=self.warn,
        )
        self._register()
        self._parameters.await_order()
        if self._parts_only:
            self._tell_parts()
        self._collector.start()
        if self._delivery is not None:
            self._delivery.sender.start()
            self._note = RunNote(run=self.run_id, url=settings.url, attempt=attempt, pid=os.getpid())
            write_note(self._note)

    def log(self, **scalars: SupportsFloat) -> None:
        """Add numbers to the next step, one for each name: Python's, numpy's, tensors of one element.

        A tensor is not waited for.

        Raises:
            TypeError: a value is neither a number nor a tensor of one element.
        """
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise TypeError(f"log({name}=...) takes one number, not a tensor of shape {tuple(value.shape)}")
                self._pending.logged[name] = copy_scalar(value)
            elif isinstance(value, SupportsFloat):
                try:
                    self._pending.logged[name] = float(value)
                except OverflowError:  # of an integer without bounds
                    self._pending.logged[name] = math.inf if cast("int", value) > 0 else -math.inf
            else:
                raise TypeError(f"log({name}=...) takes a number or a tensor of one element, not {value!r:.80}")

    def mirror(self, logger: LoggerName, **options: Any) -> None:
        """Write the numbers of the whole run into the logger that the user already has, too.

        Args:
            logger: ``tensorboard``, ``wandb`` or ``mlflow``.
            options: passed to the logger.

        Raises:
            ValueError: the logger is not known.
            ModuleNotFoundError: it is not installed.
        """
        if self._started and not self._closed:
            self._collector.add_logger(open_logger(logger, **options))

    @property
    def background_seconds(self) -> float:
        """Return the processor time of the agent's own threads."""
        if not self._started:
            return 0.0
        return self._collector.seconds + (0.0 if self._delivery is None else self._delivery.sender.seconds)

    def close(
        self, timeout_seconds: float = CLOSING_SECONDS, *, status: str | None = None, exit_code: int | None = None
    ) -> None:
        """Stop watching, deliver what is there and finish the run; idempotent.

        What the server does not take within the timeout stays in the spool, which the next agent on this machine or
        ``gradwatch flush`` delivers.

        Args:
            timeout_seconds: longest time to wait for the server.
            status: ``completed``, ``failed`` or ``killed``; None: ``completed``. At the end of the interpreter it says
                whether an exception ended it.
            exit_code: of the process, where known.

        Raises:
            ValueError: ``status`` is none of these.
            TypeError: ``exit_code`` is no whole number.
        """
        if status not in (None, *_STATUSES):
            raise ValueError(f"status={status!r} must be one of {', '.join(_STATUSES)}, or None")
        deadline = time.monotonic() + timeout_seconds
        if self.stop(deadline, status or "completed", None if exit_code is None else operator.index(exit_code)):
            self.deliver()

    def stop(self, deadline: float, status: str, exit_code: int | None = None) -> bool:
        """Do what ``close`` does, up to the wait for the server; return whether ``deliver`` must follow.

        Args:
            deadline: monotonic time by which all must be done.
            status: how the run ended.
            exit_code: of the process, where known.
        """
        if not self._leave():
            return False
        self._write(deadline, status, exit_code)
        return True

    def finish_aside(self) -> None:
        """End a training after which others follow in this process, without waiting for the server or a disk."""
        self._left_to_launcher = False
        if self._leave():
            shutdown.finish_in_background(self._write_and_deliver)

    def _write_and_deliver(self) -> None:
        self._write(time.monotonic() + CLOSING_SECONDS, "completed", None)
        self.deliver()

    def _leave(self) -> bool:
        """Hear nothing more; return whether there is something to end."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        try:
            if self.watching:
                with self.turn:
                    self._finish_round()
                    self._hand_over_logged()
        except Exception as error:  # a device that failed must not keep the rest from ending
            self.failed(error)
        self.watching = False
        self._optimizers.forget_lists()
        taps.leave(self)
        if not self._started:
            return False
        self._parameters.close()
        self._origin.close()
        return True

    def _write(self, deadline: float, status: str, exit_code: int | None) -> None:
        """Write what is there, and how the run ended."""
        left_open = self._left_to_launcher and is_launched_command()
        end = None if left_open else wire.End(at=time.time(), status=status, exit_code=exit_code)
        self._collector.finish(end, max(deadline - time.monotonic(), 0.1))
        if self._note is not None and not left_open:
            write_note(self._note, ended=True)
        if self._delivery is not None:
            self._delivery.sender.end(deadline)

    def deliver(self) -> None:
        """Wait until the server has taken what is there, or the deadline of ``stop`` has come."""
        if self._delivery is not None:
            self._delivery.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        status, code = shutdown.outcome(error)
        self.close(status=status, exit_code=code)

    def _hand_over_logged(self) -> None:
        """What is logged after the last step, as the result of a last validation is, belongs to that step."""
        if self._started and self._pending.logged:
            last = Round(self._steps.number, time.time(), sampled=False)
            last.logged, self._pending.logged = self._pending.logged, {}
            self._collector.put(last)

    def _warn_of_unknown_step(self, optimizer: Optimizer) -> None:
        if self._delivery is not None:
            self.warn(
                f"run {self.run_id} is resumed, but {type(optimizer).__name__} does not say how many steps were made: "
                "they are counted from 1 again, which hides the earlier ones; pass step= to attach()"
            )

    def _put(self, message: Message) -> None:
        if self._started:
            self._collector.put(message)

    def _replace_earlier(self) -> None:
        """Close the agent that watches exactly these parameters: a notebook cell was run again."""
        for other in _running():
            if other._parameters.ids == self._parameters.ids or other._parameters.are_gone:  # noqa: SLF001
                other.close(timeout_seconds=1.0)

    def _note_trouble(self, unclear: bool) -> None:
        self._pace.trouble()
        if unclear:
            self._origin.request_hooks(self._steps.number)

    def exiting(self, status: object) -> None:
        """``sys.exit`` was called: unless there is another step, that is how the run ends."""
        if threading.current_thread() is threading.main_thread():
            self._exit = self._steps.number, shutdown.exit_code_of(status)

    @property
    def exit_code(self) -> int | None:
        """Return what ``sys.exit`` was called with since the last step; a text, which Python prints, is 1."""
        return self._exit[1] if self._exit[0] == self._steps.number else None

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # a copy of a model that holds its agent is not watched; the agent is the same one

    def __reduce__(self) -> tuple[Callable[[str, str], "Agent"], tuple[str, str]]:
        return _retired, (self.run_id, self.run_url)

    def forget_after_fork(self) -> bool:
        """Measure nothing in a forked child, whose threads and spool are the parent's; clip on."""
        self.turn = threading.RLock()  # another thread, which is not here, may have held it
        if self.watching:
            self.watching = False
            if self._delivery is not None:
                self._delivery.spool.abandon_after_fork()
        self._started = False
        self._closed = self._clipper is None
        return self._clipper is not None


def _running() -> list[Agent]:
    return [listener for listener in taps.listeners() if isinstance(listener, Agent)]


def _retired(run_id: str, run_url: str) -> Agent:
    """Return what an agent that was pickled with its model is elsewhere: closed, with nothing to watch."""
    settings = resolve(url=run_url.removesuffix(f"/runs/{run_id}"), run=run_id, environment={})
    return Agent([], [], settings, retired=True)


def _nothing() -> None:
    """Nobody waits for what is written."""
