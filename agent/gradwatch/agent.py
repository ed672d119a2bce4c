"""Attaching to a training: the agent hears torch, measures what is due, and hands it to its threads."""

import functools
import logging
import math
import operator
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Final, ParamSpec, Self, SupportsFloat, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import endings, taps, wire
from gradwatch.agc import AGC
from gradwatch.binding import Binding, Pass
from gradwatch.classifier import LOOKS, LOOKS_TO_CLIP, Classifier
from gradwatch.clipper import Clipper
from gradwatch.collector import Collector
from gradwatch.endings import CLOSING_SECONDS
from gradwatch.governor import Governor
from gradwatch.launch import Note
from gradwatch.marks import Mark, Marks
from gradwatch.meter import Meter
from gradwatch.mirrors import Logger, mirror
from gradwatch.optimizers import Optimizers, has_inner, unwrapped
from gradwatch.pace import Pace
from gradwatch.parameters import Parameters
from gradwatch.pending import Pending
from gradwatch.process import attributes, automatic_name, is_the_command, rank, tell_the_launcher
from gradwatch.ranks import is_flattened, is_partial, parts_only, ranks_of
from gradwatch.report import Report
from gradwatch.rounds import Clip, Reading, Round, acted
from gradwatch.scalars import Scalar, is_finite, kept
from gradwatch.search import Search
from gradwatch.settings import RUN_ID, Settings, resolve
from gradwatch.spool import Losses
from gradwatch.steps import Steps

_log = logging.getLogger("gradwatch")

_STATUSES: Final = ("completed", "failed", "killed")
DISARMED_AFTER: Final = 3
"""Errors of its own after which an agent stops measuring."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


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


def _guarded(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R | None]:
    """Telemetry never raises into training: errors are counted and shipped, and after some the agent disarms."""

    @functools.wraps(method)
    def guarded(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        if not self.watching:
            return None
        started = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # the agent's guard
            self.failed(error)
            if Agent.raises_own_errors:
                raise
            return None
        finally:
            self.spent_seconds += time.perf_counter() - started

    return cast("Callable[Concatenate[Any, _P], _R | None]", guarded)


class Agent:
    """Watches one training. Made by ``attach``; also a context manager that closes itself.

    Attributes:
        run_id: id of the run, ``run-`` and 16 hexadecimal digits.
        run_url: where its page is.
    """

    raises_own_errors: ClassVar[bool] = False
    """For tests: raise the agent's own errors instead of counting them."""

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
        self._ranks = ranks_of(models)
        self.watching = not retired and (rank() == 0 or self._ranks is not None)
        self.spent_seconds = 0.0
        """Of the training thread, since the agent was attached."""
        self._pending = Pending()
        self._exit: tuple[int, int | None] = (0, None)
        """Step at which ``sys.exit`` was called last, and with what."""
        self._marks = Marks()
        self._uncalled_was_told = False
        self._parts_only = ""
        """Why nothing is measured: this rank holds only parts of the parameters, and no other measures the rest."""
        self._parameters = Parameters(models, clip)
        self._classifier = Classifier(self._parameters.find, LOOKS if clip is None else LOOKS_TO_CLIP)
        self._clipper = None if clip is None else Clipper(clip, self._classifier)
        self._search = Search(self._parameters)
        self._optimizers = Optimizers(
            optimizers,
            self._parameters,
            self._classifier,
            self._renew,
            clips=clip is not None,
            warn=self.warn,
        )
        self.losses = Losses()
        self._meter = Meter(self._parameters, self.losses)
        self._pace = Pace(
            Governor(settings.every_steps, settings.overhead_budget_ratio, aligned=self._ranks is not None)
        )
        self._steps = Steps(
            settings.step if resumed else settings.step or 0,
            self._parameters,
            self._optimizers,
            self._pending,
            self._pace,
            finish=self._finish_round,
            unknown=self._warn_of_unknown_step,
            give_back=self._meter.slots.give_back,
        )
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
        endings.close_at_the_end(_running)

    def _start(self, settings: Settings, *, resumed: bool) -> None:
        self._started = True
        self._report: Report | None = None
        self._note: Note | None = None
        if self._ranks is None or self._ranks.rank == 0:
            self._report = Report(self.run_id, settings, self.losses, self.warn, self.failed)
        attempt = time.time_ns() // 1_000_000
        template = wire.Registration(
            project=settings.project,
            name="" if resumed else settings.run or automatic_name(),
            parameters=[],
            id=self.run_id,
            started_at=attempt / 1000,
            attempt=attempt,
            attributes=attributes() | (self._clipper.agc.attributes if self._clipper is not None else {}),
        )
        self._collector = Collector(
            None if self._report is None else self._report.spool,
            self._meter.slots,
            self.losses,
            template,
            None if self._clipper is None else self._clipper.agc,
            self._ranks,
            written=_nothing if self._report is None else self._report.sender.notify,
            trouble=self._note_trouble,
            failed=self.failed,
            warn=self.warn,
        )
        self._register()
        self._parameters.await_order()
        if self._parts_only:
            self._tell_parts()
        self._collector.start()
        if self._report is not None:
            self._report.sender.start()
            self._note = Note(run=self.run_id, url=settings.url, attempt=attempt, pid=os.getpid())
            tell_the_launcher(self._note)

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
                self._pending.logged[name] = kept(value)
            elif isinstance(value, SupportsFloat):
                try:
                    self._pending.logged[name] = float(value)
                except OverflowError:  # of an integer without bounds
                    self._pending.logged[name] = math.inf if cast("int", value) > 0 else -math.inf
            else:
                raise TypeError(f"log({name}=...) takes a number or a tensor of one element, not {value!r:.80}")

    def mirror(self, logger: Logger, **options: Any) -> None:
        """Write the numbers of the whole run into the logger that the user already has, too.

        Args:
            logger: ``tensorboard``, ``wandb`` or ``mlflow``.
            options: passed to the logger.

        Raises:
            ValueError: the logger is not known.
            ModuleNotFoundError: it is not installed.
        """
        if self._started and not self._closed:
            self._collector.add_mirror(mirror(logger, **options))

    @property
    def background_seconds(self) -> float:
        """Return the processor time of the agent's own threads."""
        if not self._started:
            return 0.0
        return self._collector.seconds + (0.0 if self._report is None else self._report.sender.seconds)

    @property
    def step(self) -> int:
        """Return the number of the last step."""
        return self._steps.number

    @property
    def models(self) -> list[nn.Module]:
        """Return the models that are watched and still there."""
        return self._parameters.models

    def watches(self, parameter: Tensor) -> bool:
        """Return whether a parameter is among those that are watched."""
        return self._parameters.find(parameter) is not None

    @property
    def interval_steps(self) -> int:
        """Return the steps from one sample to the next, as it was last."""
        return self._pace.interval_steps

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
            endings.aside(self._write_and_deliver)

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
        self._search.close()
        return True

    def _write(self, deadline: float, status: str, exit_code: int | None) -> None:
        """Write what is there, and how the run ended."""
        left_open = self._left_to_launcher and is_the_command()
        end = None if left_open else wire.End(at=time.time(), status=status, exit_code=exit_code)
        self._collector.finish(end, max(deadline - time.monotonic(), 0.1))
        if self._note is not None and not left_open:
            tell_the_launcher(self._note, ended=True)
        if self._report is not None:
            self._report.sender.end(deadline)

    def deliver(self) -> None:
        """Wait until the server has taken what is there, or the deadline of ``stop`` has come."""
        if self._report is not None:
            self._report.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        status, code = endings.ending(error)
        self.close(status=status, exit_code=code)

    def failed(self, error: Exception) -> None:
        """Count an error of the agent's own; after some, stop measuring and say so once."""
        self.losses.errors += 1
        _log.debug("gradwatch: an error of the agent", exc_info=error)
        if self.losses.errors < DISARMED_AFTER or not self.watching:
            return
        self.watching = False
        self._search.close()
        reason = f"{type(error).__name__}: {error}"
        _log.warning("gradwatch stops watching this run after %d errors of its own: %s", DISARMED_AFTER, reason)
        self._collector.put(wire.Event(step=self._steps.number, at=time.time(), kind="disarmed", message=reason))

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Optimizer | None
    ) -> taps.Arguments | None:
        """An optimizer is about to step.

        Raises:
            Exception: what goes wrong in clipping; what goes wrong in monitoring is swallowed.
        """
        within = outer is not None and self._is_seen_to(optimizer, outer)
        begun = None if within else self._begin(optimizer)
        if begun is None and not within:
            self._optimizers.note_stranger()
        closure = kwargs.get("closure") or next((argument for argument in args[1:] if callable(argument)), None)
        if closure is None:
            self._act(optimizer, begun, outer)
            return None
        if begun is None and self._clipper is None:
            return None
        return self._with_closure(optimizer, begun, outer, closure, args, kwargs)

    @_guarded
    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        round_ = self._steps.round
        if round_ is None or weakref.ref(optimizer) not in round_.stepped:
            return
        self._meter.measure_updates(optimizer, round_)
        if self._steps.awaited == weakref.ref(optimizer):
            self._pending.move_to(round_)
            self._tell_uncalled(optimizer)
        self._steps.awaited = None
        binding = self._optimizers.binding(optimizer) if self._pending else None
        if binding is not None:  # of a closure that was evaluated again
            self._pending.losses.clear()
            self._steps.forget(binding.index_set)
        if self._steps.have_all():
            self._finish_round()

    def before_backward(self, tensors: Sequence[Tensor], losses: Sequence[Tensor]) -> object:
        """Note the state of some gradients: whose losses they are shows afterwards, or when an optimizer steps."""
        if self._classifier.looks:
            self._look(tensors)
        if self._parameters.awaits_order:
            self._check_order(tensors)
        self._trace(tensors)
        self._forget_thrown_away()
        return self._marked(losses)

    @_guarded
    def after_backward(self, losses: Sequence[Tensor], before: object) -> None:
        """Gradients of these losses were accumulated; of none, or none at all: there is nothing to note."""
        left = self._pending.end_backward(losses)
        if before is None:
            return
        ours, changed = self._marks.changed(cast("dict[int, Mark]", before), self._parameters, losses)
        if not ours or not self._pending.is_home(losses, self._parameters):
            return
        if self._steps.noted:
            self._steps.forget(changed)  # there is more to them now than what was clipped
        if not losses:
            return
        self._pending.add_losses(left)
        passes = self._optimizers.note_backward()
        if passes is not None:
            self._tell_unstepped(passes)

    @_guarded
    def scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """A loss scaler multiplied ``original``."""
        self._pending.note_scaled(scaler, original, scaled)

    @_guarded
    def after_scaler_step(self, scaler: object, optimizer: Optimizer) -> None:
        """A loss scaler stepped ``optimizer``, or skipped it because it found Inf."""
        binding = self._optimizers.binding(optimizer)
        if binding is None:
            return
        self._pending.note_scaler(scaler)
        fired = binding.steps != binding.steps_at_scaler
        binding.steps_at_scaler = binding.steps
        if fired:
            return
        round_ = self._steps.enter(optimizer, binding)
        round_.skip()
        self._pending.move_to(round_)
        if self._steps.have_all():
            self._finish_round()

    @_guarded
    def before_norm_clip(
        self, parameters: Sequence[Tensor], total_norm: Tensor, max_norm: Scalar, norm_type: float
    ) -> None:
        """Gradients are about to be clipped by their total norm."""
        binding = self._optimizers.binding_of_list(parameters)
        if not binding.indices:
            return
        limit = kept(max_norm) if isinstance(max_norm, Tensor) else float(max_norm)
        clip = Clip(kept(total_norm), limit, binding.index_set, is_partial(total_norm), norm_type, binding.repeated)
        # Clipping by NaN, Inf or 0 wipes out which gradient it came from, and float16 rounds small ones to 0: measure
        # before, where it can be seen.
        clip.finite = is_finite(clip.total_norm)
        if not clip.finite or (isinstance(limit, float) and not limit) or binding.halves:
            self._measure_before_clip(binding, force=not clip.finite)
        self._pending.clips.append(clip)

    @_guarded
    def before_value_clip(self, parameters: Sequence[Tensor]) -> None:
        """Gradients are about to be clipped by value."""
        binding = self._optimizers.binding_of_list(parameters)
        if binding.indices:
            self._pending.value_clipped |= binding.index_set
            self._measure_before_clip(binding, force=False)

    @_guarded
    def after_zero_grad(self, owner: Optimizer | nn.Module) -> None:
        """The gradients of an optimizer or a module are thrown away."""
        if not self._steps.noted:
            return
        if isinstance(owner, nn.Module):
            found = map(self._parameters.find, owner.parameters())
            self._steps.forget_zeroed(frozenset(index for index in found if index is not None))
            return
        binding = self._optimizers.binding(owner)
        if binding is not None:
            self._steps.forget_zeroed(binding.index_set)

    @_guarded
    def _forget_thrown_away(self) -> None:
        self._steps.forget_thrown_away()

    @_guarded
    def _marked(self, losses: Sequence[Tensor]) -> dict[int, Mark]:
        self._pending.begin_backward(losses)
        return self._marks.before(self._parameters.watched, self._steps.clipped)

    @_guarded
    def _check_order(self, tensors: Sequence[Tensor]) -> None:
        self._parameters.check_order(tensors)

    @_guarded
    def _trace(self, tensors: Sequence[Tensor]) -> None:
        """Search the graph of a loss that is not finite for where that began."""
        scalars = [tensor for tensor in tensors if tensor.numel() == 1]
        if all(map(is_finite, scalars)):
            return
        event = self._search.in_graph(scalars, self._pending.originals(scalars), self._steps.number)
        if event is not None:
            self._collector.put(event)

    @_guarded
    def _is_seen_to(self, optimizer: Optimizer, outer: Optimizer) -> bool:
        """Return whether another one sees to what an optimizer steps: its step, which goes on, called this one.

        As those do that share the work among ranks, look ahead, or join several; not those that have evaluated their
        closure meanwhile, as SAM does, or made anything else of the gradients that was heard.
        """
        round_, reference = self._steps.round, weakref.ref(outer)
        if round_ is None or self._pending or reference == self._steps.evaluated:
            return False
        binding = self._optimizers.binding(optimizer)
        return binding is not None and binding.index_set <= round_.stepped.get(reference, frozenset())

    @_guarded
    def _begin(self, optimizer: Optimizer) -> tuple[Binding, Round] | None:
        """Open the step; return None where it concerns nothing that is watched."""
        binding = self._optimizers.binding(optimizer)
        if binding is None:
            return None
        binding.steps += 1
        return binding, self._steps.enter(optimizer, binding)

    def _act(self, optimizer: Optimizer, begun: tuple[Binding, Round] | None, outer: Optimizer | None) -> None:
        """Measure where a sample is due, and clip, in one pass; without ``begun`` only clip.

        What was clipped for ``outer``, whose step called this one, and left alone since, is not clipped again.
        """
        seen = self._observe(optimizer, *begun) if begun is not None else None
        if self._clipper is None:
            return
        binding = begun[0] if begun is not None else self._optimizers.binding(optimizer)
        if binding is None or (outer is not None and self._clipper.has_clipped(binding)):
            return
        pass_ = seen[0] if seen is not None else self._clipper.own_pass(binding, self._parameters.watched)
        if pass_ is None:
            return
        limits = self._clipper.clip(optimizer, binding, pass_, self._parameters.watched)
        if has_inner(optimizer):
            self._clipper.note_clipped(pass_.grads)
        if seen is not None:
            seen[1].limits = limits

    def _with_closure(
        self,
        optimizer: Optimizer,
        begun: tuple[Binding, Round] | None,
        outer: Optimizer | None,
        closure: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> taps.Arguments:
        """Return the arguments with a closure that measures after its first evaluation: before it is no gradient.

        The gradients of every evaluation are clipped.
        """

        if begun is not None:
            self._steps.awaited = weakref.ref(optimizer)

        @functools.wraps(closure)
        def measured(*given: Any, **named: Any) -> Any:
            nonlocal begun
            try:
                result = closure(*given, **named)
            finally:
                self._steps.awaited = None
            first, begun = begun, None
            self._steps.evaluated = weakref.ref(optimizer)
            self._act(optimizer, first, outer)
            return result

        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": measured}
        return tuple(measured if argument is closure else argument for argument in args), kwargs

    def _warn_of_unknown_step(self, optimizer: Optimizer) -> None:
        if self._report is not None:
            self.warn(
                f"run {self.run_id} is resumed, but {type(optimizer).__name__} does not say how many steps were made: "
                "they are counted from 1 again, which hides the earlier ones; pass step= to attach()"
            )

    @_guarded
    def _observe(self, optimizer: Optimizer, binding: Binding, round_: Round) -> tuple[Pass, Reading] | None:
        """Take note of what belongs to this step, and measure where it is due."""
        self._pending.move_to(round_)
        finite = all(map(is_finite, round_.losses)) and all(clip.finite for clip in round_.clips)
        if not finite and self._pace.alarm(round_, {weakref.ref(optimizer)}):
            self._pace.trouble()
        round_.finite = finite
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            round_.found_infs.append(kept(found_inf))
        if not round_.sampled:
            return None
        self._note_frozen(binding)
        self._note_rates(optimizer, round_)
        seen = self._meter.measure_before_step(binding, round_, optimizer)
        if seen is not None:
            seen[1].clips = acted(round_.clips, binding.index_set, stepping=True)
        if self._clipper is not None:
            self.spent_seconds -= self._meter.pass_seconds  # clipping needs this pass at every step
        return seen

    def _note_rates(self, optimizer: Optimizer, round_: Round) -> None:
        for place, group in zip(self._optimizers.places(optimizer), optimizer.param_groups, strict=False):
            rate = group.get("lr")
            if rate is not None:
                round_.rates[place] = kept(rate) if isinstance(rate, Tensor) else float(rate)
        scale = self._pending.loss_scale
        if scale is not None:
            round_.scalars["loss_scale"] = kept(scale)

    def _renew(self, unknown: bool) -> None:
        """Look for new parameters where some are not known, before what is known of an optimizer is put together."""
        if unknown and self._discover() and self.watching:
            self._register()
        self._check_parts()

    def _note_frozen(self, binding: Binding) -> None:
        """Register again where ``requires_grad`` has changed.

        Only parameters of the optimizer that steps are asked, and of none: trainings that take turns freeze the others'
        for each turn.
        """
        changed = self._parameters.freeze(zip(binding.indices, binding.parameters, strict=True))
        stepped = self._optimizers.stepped_indices
        if len(stepped) < len(self._parameters.watched):
            changed |= self._parameters.freeze(self._parameters.other_than(stepped))
        if changed:
            self._register()

    def _check_parts(self) -> None:
        """Measure no more where the numbers would be those of this rank's part alone.

        Raises:
            NotImplementedError: they were to be clipped and cannot be.
        """
        if self._parts_only:
            return
        models = self._parameters.models
        self._parts_only = text = parts_only(models, self._ranks)
        self._meter.stopped = bool(text)
        if text and self._clipper is not None and is_flattened(models):
            raise NotImplementedError(f"{text}; AGC cannot clip them")
        if text and self.watching:
            self.warn(f"{text}. Gradients and weights are not measured")
            if self._started:
                self._tell_parts()

    def _tell_parts(self) -> None:
        event = wire.Event(step=self._steps.number, at=time.time(), kind="not_measured", message=self._parts_only)
        self._collector.put(event)

    def _tell_unstepped(self, passes: int) -> None:
        text = f"after {passes} backward passes no torch.optim.Optimizer has stepped a watched parameter: " + (
            "nothing is clipped or measured" if self._clipper is not None else "nothing is measured"
        )
        self.warn(text)
        self._collector.put(wire.Event(step=self._steps.number, at=time.time(), kind="not_stepped", message=text))

    def _tell_uncalled(self, optimizer: Optimizer) -> None:
        """Say once that an optimizer has stepped without its closure: what it stepped with was seen by nobody."""
        if self._uncalled_was_told:
            return
        self._uncalled_was_told = True
        text = (
            f"{type(optimizer).__name__}.step(closure) did not call its closure: the loss of such a step is kept, "
            + ("its gradients are not clipped or measured" if self._clipper is not None else "nothing is measured")
            + ". Call step() without one"
        )
        self.warn(text)
        self._collector.put(wire.Event(step=self._steps.number, at=time.time(), kind="not_measured", message=text))

    def _measure_before_clip(self, binding: Binding, *, force: bool) -> None:
        round_ = self._steps.round
        asked = binding.indices if round_ is not None and round_.sampled else binding.indices[:1]
        stepped = frozenset(filter(self._steps.has_stepped, asked))
        if round_ is None or len(stepped) == len(asked):
            stepped = frozenset()
            round_ = self._steps.coming()
        if force:
            self._pace.alarm(round_, set())
        waiting = binding.index_set - stepped
        if not round_.sampled or any(reading.before_clip and waiting <= reading.live for reading in round_.readings):
            return
        seen = self._meter.measure(binding, round_, before_clip=True)
        if seen is not None:
            seen[1].scale = self._scale_of(binding)
            seen[1].void = stepped
            seen[1].clips = acted((*round_.clips, *self._pending.clips), waiting, stepping=False)

    def _scale_of(self, binding: Binding) -> Tensor | None:
        """Return what a loss scaler still multiplies some gradients by; None where it does not, or no longer."""
        scale = self._pending.loss_scale
        return None if scale is None or self._optimizers.are_unscaled(binding, self._pending.scaler) else kept(scale)

    def _finish_round(self) -> None:
        """Hand the round over and decide whether the next one is sampled."""
        round_ = self._steps.close()
        if round_ is None:
            return
        self._meter.send(round_)
        self._pace.finished(round_, self.spent_seconds + self._meter.others_seconds, self.background_seconds)
        if round_.sampled:
            round_.spared = (
                self._classifier.indices if self._clipper is None else self._clipper.spared(self._parameters.watched)
            )
        self._search.take_seen(round_)
        self._collector.put(round_)
        if self._parameters.learn_order(round_.step):
            self._register()
        self._optimizers.forget_idle(round_.step)

    def _hand_over_logged(self) -> None:
        """What is logged after the last step, as the result of a last validation is, belongs to that step."""
        if self._started and self._pending.logged:
            last = Round(self._steps.number, time.time(), sampled=False)
            last.logged, self._pending.logged = self._pending.logged, {}
            self._collector.put(last)

    def _discover(self) -> bool:
        """Look for parameters that are not known yet; return whether there were any."""
        new = self._parameters.discover()
        self._optimizers.forget_lists()
        if new and self._clipper is not None:
            self._clipper.know(self._parameters.watched)
        return new

    def _look(self, losses: Sequence[Tensor]) -> None:
        """Search the graph of a loss for the classifier; on every rank that clips."""
        self._classifier.looks -= 1
        started = time.perf_counter()
        try:
            if self._parameters.sharded:
                self._parameters.note_stand_ins()
            self._classifier.look(losses)
        except Exception as error:  # the agent's guard; without an answer the clipper guesses, and says so
            self.failed(error)
            if Agent.raises_own_errors:
                raise
        finally:
            self.spent_seconds += time.perf_counter() - started

    def _register(self) -> None:
        self._collector.put(self._parameters.registered())

    def _replace_earlier(self) -> None:
        """Close the agent that watches exactly these parameters: a notebook cell was run again."""
        for other in _running():
            if other._parameters.ids == self._parameters.ids or other._parameters.are_gone:  # noqa: SLF001
                other.close(timeout_seconds=1.0)

    def _note_trouble(self, unclear: bool) -> None:
        self._pace.trouble()
        if unclear:
            self._search.want_hooks(self._steps.number)

    def exiting(self, status: object) -> None:
        """``sys.exit`` was called: unless there is another step, that is how the run ends."""
        if threading.current_thread() is threading.main_thread():
            self._exit = self._steps.number, endings.code(status)

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
        if self.watching:
            self.watching = False
            if self._report is not None:
                self._report.spool.abandon_after_fork()
        self._started = False
        self._closed = self._clipper is None
        return self._clipper is not None

    def warn(self, text: str) -> None:
        """Say once what the user has to know."""
        _log.warning("gradwatch: %s", text)


def _running() -> list[Agent]:
    return [listener for listener in taps.listeners() if isinstance(listener, Agent)]


def _retired(run_id: str, run_url: str) -> Agent:
    """Return what an agent that was pickled with its model is elsewhere: closed, with nothing to watch."""
    settings = resolve(url=run_url.removesuffix(f"/runs/{run_id}"), run=run_id, environment={})
    return Agent([], [], settings, retired=True)


def _nothing() -> None:
    """Nobody waits for what is written."""
