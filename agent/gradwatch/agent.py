"""Attaching to a training: the agent hears torch, measures what is due, and hands it to its threads."""

import atexit
import functools
import logging
import math
import secrets
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Final, ParamSpec, Self, SupportsFloat, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import inspection, provenance, taps, wire
from gradwatch.agc import AGC
from gradwatch.binding import Binding, Lists, Pass
from gradwatch.buffers import Plan, Slots
from gradwatch.classifier import Classifier
from gradwatch.clipper import Clipper, listed
from gradwatch.collector import Collector
from gradwatch.governor import Governor
from gradwatch.layout import spec_of
from gradwatch.marks import Mark, Marks
from gradwatch.mirrors import Logger, mirror
from gradwatch.model import ReadyOrder, Watched, is_compiled, local, walk
from gradwatch.process import attributes, automatic_name, rank, tell_the_launcher
from gradwatch.progress import steps_made
from gradwatch.ranks import is_flattened, is_one_of_several, is_sharded, ranks_of
from gradwatch.rounds import Clip, Reading, Registered, Round, Scalar
from gradwatch.sender import Http, Sender
from gradwatch.settings import RUN_ID, Settings, resolve
from gradwatch.spool import Losses, Spool, leftovers
from gradwatch.updates import Updates

_log = logging.getLogger("gradwatch")

CLOSING_SECONDS: Final = 10.0
"""Longest wait for the server at the end, of all agents together at the end of the interpreter."""
DISARMED_AFTER: Final = 3
"""Errors of its own after which an agent stops measuring."""
_ORDER_STEPS: Final = 3
"""Steps after which the order of the gradients is no longer waited for."""
_PENDING: Final = 1024
"""Losses and clippings that wait for their step; losses are summed then, the oldest clippings forgotten."""
_SCALED: Final = 16
"""Scaled losses that are remembered."""
_SEARCH_STEPS: Final = 100
"""Steps between two searches for the origin of a number that is not finite."""
_UNSTEPPED: Final = 200
"""Backward passes after which it is said that no optimizer has stepped what is watched yet."""
_UNSTEPPED_BESIDE_OTHERS: Final = 20
"""The same where other optimizers have stepped as often."""
_HOOKED_STEPS: Final = 3
"""Steps for which hooks look for it."""
_LOOKS: Final = 5
_LOOKS_CLIPPING: Final = 100
"""Backward passes whose graph is searched for the classifier: a head may be trained only now and then."""

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
    models = [model] if isinstance(model, nn.Module) else list(model)
    if not models or not all(isinstance(module, nn.Module) for module in models):
        raise TypeError(f"model must be a torch.nn.Module or several of them, not {model!r:.80}")
    settings = resolve(
        url=url, token=token, project=project, run=run, every=every, overhead_budget=overhead_budget, step=step
    )
    return Agent(models, _optimizers(optimizer), settings, clip=agc)


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer] | None:
    if given is None:
        return None
    several = [given] if isinstance(given, Optimizer) or hasattr(given, "param_groups") else list(given)
    inner = []
    for optimizer in several:
        # Accelerate and Lightning hand out wrappers; the optimizer inside is the one that steps.
        while isinstance(
            wrapped := getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None), Optimizer
        ):
            optimizer = wrapped
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, several of them or None, not {optimizer!r:.80}"
            )
        inner.append(optimizer)
    return inner


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
        ends_run: bool = True,
        clip: AGC | None = None,
        retired: bool = False,
    ) -> None:
        self._ends_run = ends_run
        """Whether closing it ends the run; under ``gradwatch run`` the exit status of the command does."""
        resumed = settings.run is not None and RUN_ID.fullmatch(settings.run) is not None
        self.run_id = settings.run if resumed and settings.run else f"run-{secrets.token_hex(8)}"
        self.run_url = f"{settings.url}/runs/{self.run_id}"
        self._ranks = ranks_of(models)
        self.watching = not retired and (rank() == 0 or self._ranks is not None)
        self.spent_seconds = 0.0
        """Of the training thread, since the agent was attached."""
        self._models = [weakref.ref(model) for model in models]
        self._watched: list[Watched] = []
        self._index_of: dict[int, int] = {}
        self._optimizers = None if optimizers is None else [weakref.ref(optimizer) for optimizer in optimizers]
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers that were not given."""
        self._bindings: weakref.WeakKeyDictionary[Optimizer, Binding] = weakref.WeakKeyDictionary()
        self._expected = None if optimizers is None else {id(optimizer): 0 for optimizer in optimizers}
        """Ids of the optimizers that make a round, with the step at which each was last seen; None: not known yet."""
        self._lists = Lists(self._bind_list)
        self._governor = Governor(settings.every_steps, settings.overhead_budget_ratio, aligned=self._ranks is not None)
        self._due = True
        self._in_trouble = False
        self._was_finite = True
        """Whether all losses and clip norms of the round before this one were finite."""
        self._forced = False
        """Whether the next round is sampled although it is not due."""
        self._step = settings.step or 0
        self._step_is_open = resumed and settings.step is None
        """Whether nothing has said yet how many steps the resumed run has made."""
        if self._step_is_open:
            self._step = steps_made(optimizers or [], wait=True)
            self._step_is_open = not self._step
        self._expected = self._expected and dict.fromkeys(self._expected, self._step)
        self._round: Round | None = None
        self._pending_losses: list[Tensor] = []
        self._pending_clips: deque[Clip] = deque(maxlen=_PENDING)
        self._next_round: Round | None = None
        self._pending_value_clip: frozenset[int] = frozenset()
        """Indices of the parameters whose gradients were clipped by value."""
        self._exit: tuple[int, int | None] = (0, None)
        """Step at which ``sys.exit`` was called last, and with what."""
        self._gone: frozenset[int] = frozenset()
        """Indices of the parameters whose gradients were thrown away since the last loss."""
        self._marks = Marks()
        self._awaited: int | None = None
        """Id of the optimizer whose closure makes the gradients that it is about to step with."""
        self._logged: dict[str, Scalar] = {}
        self._scaled: deque[tuple[weakref.ref[Tensor], Tensor]] = deque(maxlen=_SCALED)
        """Scaled losses that may still be propagated, with what they were."""
        self._scaler: weakref.ref[Any] | None = None
        self._unstepped: int | None = 0
        """Backward passes that made gradients before anything watched was stepped; None: something was."""
        self._steps_of_others = 0
        self._parts_only = ""
        """Why nothing is measured: this rank holds only parts of the parameters, and no other measures the rest."""
        self._updates = Updates()
        self._weights_seen = 0
        self._trains: dict[int, bool] = {}
        """By index, of parameters that were frozen or unfrozen since they were found: whether they are trained now."""
        self._depths: list[int] = []
        self._finished_at = 0.0
        self._spent_before = 0.0
        self._background_before = 0.0
        self._order: ReadyOrder | None = None
        self._search_from = 0
        """Step from which the origin of a number that is not finite is searched for again."""
        self._hooks: provenance.Hooks | None = None
        self._hooks_left = 0
        self._hooks_wanted = False
        self._stand_ins: dict[int, int] = {}
        self._classifier = Classifier(self._find)
        self._looks = _LOOKS if clip is None else _LOOKS_CLIPPING
        self._clipper = None if clip is None else Clipper(clip, self._classifier)
        self._closed = not self.watching and self._clipper is None
        self._started = False
        self._lock = threading.Lock()
        self.losses = Losses()
        if self._closed:
            return
        self._discover()
        self._check_given(optimizers or [])
        self._check_parts()
        self._replace_earlier()
        if self.watching:
            self._start(models, settings, resumed=resumed)
        taps.listen(self)
        # Again with each agent: what the user opened before it, a run of wandb for one, is then still open at the end.
        atexit.unregister(_close_all)
        atexit.register(_close_all)

    def _start(self, models: Sequence[nn.Module], settings: Settings, *, resumed: bool) -> None:
        self._started = True
        self._slots = Slots()
        self._settings = settings
        self._adopted = False
        self._report: _Report | None = None
        if self._ranks is None or self._ranks.rank == 0:
            self._report = _Report(self, settings)
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
            self._slots,
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
        if not any(is_compiled(model) for model in models):
            parameters = ((index, watched.parameter()) for index, watched in enumerate(self._watched))
            self._order = ReadyOrder((index, parameter) for index, parameter in parameters if parameter is not None)
        if self._parts_only:
            self._tell_parts()
        self._collector.start()
        if self._report is not None:
            self._report.sender.start()
            tell_the_launcher(self.run_id, settings.url, attempt)

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
                self._logged[name] = _kept(value)
            elif isinstance(value, SupportsFloat):
                self._logged[name] = float(value)
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
    def interval_steps(self) -> int:
        """Return the steps from one sample to the next, as it was last."""
        return self._governor.interval_steps

    def watches(self, parameters: Iterable[int]) -> bool:
        """Return whether it watches exactly the parameters with these ids."""
        return self._index_of.keys() == set(parameters)

    @property
    def is_orphaned(self) -> bool:
        """Return whether all that it watched is gone."""
        return all(watched.parameter() is None for watched in self._watched)

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
        """
        deadline = time.monotonic() + timeout_seconds
        if self.stop(deadline, status or "completed", exit_code):
            self.deliver()

    def stop(self, deadline: float, status: str, exit_code: int | None = None) -> bool:
        """Do what ``close`` does, up to the wait for the server; return whether ``deliver`` must follow.

        Args:
            deadline: monotonic time by which all must be done.
            status: how the run ended.
            exit_code: of the process, where known.
        """
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        try:
            if self.watching:
                self._finish_round()
        except Exception as error:  # a device that failed must not keep the rest from ending
            self.failed(error)
        self.watching = False
        self._lists.clear()
        taps.leave(self)
        if not self._started:
            return False
        if self._order is not None:
            self._order.close()
        if self._hooks is not None:
            self._hooks.close()
        end = wire.End(at=time.time(), status=status, exit_code=exit_code) if self._ends_run else None
        self._collector.finish(end, max(deadline - time.monotonic(), 0.1))
        if self._report is not None:
            self._report.sender.end(deadline)
        return True

    def deliver(self) -> None:
        """Wait until the server has taken what is there, or the deadline of ``stop`` has come."""
        if self._report is not None:
            self._report.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close(status="completed" if kind is None else "failed")

    def failed(self, error: Exception) -> None:
        """Count an error of the agent's own; after some, stop measuring and say so once."""
        self.losses.errors += 1
        _log.debug("gradwatch: an error of the agent", exc_info=error)
        if self.losses.errors < DISARMED_AFTER or not self.watching:
            return
        self.watching = False
        if self._hooks is not None:
            self._hooks.close()
        reason = f"{type(error).__name__}: {error}"
        _log.warning("gradwatch stops watching this run after %d errors of its own: %s", DISARMED_AFTER, reason)
        self._collector.put(wire.Event(step=self._step, at=time.time(), kind="disarmed", message=reason))

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> taps.Arguments | None:
        """An optimizer is about to step.

        Raises:
            Exception: what goes wrong in clipping; what goes wrong in monitoring is swallowed.
        """
        begun = self._begin(optimizer)
        self._steps_of_others += begun is None
        closure = kwargs.get("closure") or next((argument for argument in args[1:] if callable(argument)), None)
        if closure is None:
            self._act(optimizer, begun)
            return None
        if begun is None and self._clipper is None:
            return None
        return self._with_closure(optimizer, begun, closure, args, kwargs)

    @_guarded
    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        if self._round is None or id(optimizer) not in self._round.stepped:
            return
        self._round.updates += self._updates.of(optimizer)
        self._awaited = None
        if self._is_pending:  # of a closure that was evaluated again
            self._pending_losses.clear()
            self._forget(self._bindings[optimizer].index_set)
        if self._complete(self._round):
            self._finish_round()

    def before_backward(self, tensors: Sequence[Tensor]) -> object:
        """Note the state of some gradients: whose loss it is shows afterwards."""
        if self._looks:
            self._look(tensors)
        self._trace(tensors)
        self._forget_thrown_away()
        return self._marked()

    @_guarded
    def after_backward(self, scalars: Sequence[Tensor], before: object) -> None:
        """Gradients of these scalars were accumulated."""
        if before is None:
            return
        ours, changed = self._marks.changed(cast("dict[int, Mark]", before), self._watched, scalars)
        if not ours:
            return
        if self._is_pending:
            self._forget(changed)  # there is more to them now than what was clipped
        self._gone = frozenset()
        if self._unstepped is not None:
            self._note_unstepped()
        for scalar in scalars:
            original = next((original for scaled, original in self._scaled if scaled() is scalar), None)
            self._pending_losses.append(_kept(scalar) if original is None else original)
        if len(self._pending_losses) >= _PENDING:
            self._pending_losses = _summed(self._pending_losses)

    @_guarded
    def scaled(self, scaler: object, original: Tensor, scaled: Tensor) -> None:
        """A loss scaler multiplied ``original``."""
        self._scaled.append((weakref.ref(scaled), _kept(original)))
        self._scaler = weakref.ref(scaler)

    @_guarded
    def after_scaler_step(self, optimizer: Optimizer) -> None:
        """A loss scaler stepped ``optimizer``, or skipped it because it found Inf."""
        binding = self._bind(optimizer)
        if binding is None:
            return
        fired = binding.steps != binding.steps_at_scaler
        binding.steps_at_scaler = binding.steps
        if fired:
            return
        round_ = self._enter(optimizer)
        round_.skip()
        self._take_pending(round_)
        if self._complete(round_):
            self._finish_round()

    @_guarded
    def before_norm_clip(
        self, parameters: Sequence[Tensor], total_norm: Tensor, max_norm: Scalar, norm_type: float
    ) -> None:
        """Gradients are about to be clipped by their total norm."""
        binding = self._lists.binding(parameters)
        if not binding.indices:
            return
        limit = _kept(max_norm) if isinstance(max_norm, Tensor) else float(max_norm)
        clip = Clip(_kept(total_norm), limit, binding.index_set, _is_partial(total_norm), norm_type)
        # Clipping by NaN or Inf wipes out which gradient it came from: measure before, where it can be seen.
        clip.finite = _finite(clip.total_norm)
        if not clip.finite:
            self._measure_before_clip(binding, force=True)
        self._pending_clips.append(clip)

    @_guarded
    def before_value_clip(self, parameters: Sequence[Tensor]) -> None:
        """Gradients are about to be clipped by value."""
        binding = self._lists.binding(parameters)
        if binding.indices:
            self._pending_value_clip |= binding.index_set
            self._measure_before_clip(binding, force=False)

    @_guarded
    def after_zero_grad(self, optimizer: Optimizer) -> None:
        """The gradients are thrown away, and so is what was noted of them; the loss unless another has a part of it."""
        binding = self._bind(optimizer) if self._is_pending else None
        if binding is None:
            return
        self._forget(binding.index_set)
        self._gone |= binding.index_set
        if self._pending_losses and not self._has_gradient(self._stepped_by_any() - self._gone):
            self._pending_losses.clear()

    @property
    def _is_pending(self) -> bool:
        """Whether something was noted that waits for its step."""
        return bool(
            self._pending_losses or self._pending_clips or self._pending_value_clip or self._next_round is not None
        )

    @_guarded
    def _forget_thrown_away(self) -> None:
        """Forget what waits for its step where no gradient is left: ``model.zero_grad()`` says nothing."""
        everything = range(len(self._watched))
        if self._is_pending and not self._has_gradient(everything):
            self._pending_losses.clear()
            self._forget(frozenset(everything))

    def _forget(self, indices: frozenset[int]) -> None:
        """Forget what was noted of gradients that are not what they were, before they were stepped."""
        for clip in self._pending_clips:
            clip.indices -= indices
        self._pending_clips = deque((clip for clip in self._pending_clips if clip.indices), maxlen=_PENDING)
        self._pending_value_clip -= indices
        round_, coming = self._round, self._next_round
        if round_ is not None:
            round_.readings = [
                reading
                for reading in round_.readings
                if not reading.before_clip
                or indices.isdisjoint(reading.claim.plan.indices)
                or any(map(self._has_stepped, reading.claim.plan.indices))
            ]
        if coming is None:
            return
        coming.readings = [kept for kept in coming.readings if indices.isdisjoint(kept.claim.plan.indices)]
        if not coming.readings:
            self._next_round = None
            if coming.slot is not None:
                self._slots.give_back(coming.slot)

    def _has_gradient(self, indices: Iterable[int]) -> bool:
        parameters = (self._watched[index].parameter() for index in indices)
        return any(parameter is not None and parameter.grad is not None for parameter in parameters)

    def _stepped_by_any(self) -> frozenset[int]:
        """Return the indices of the parameters that some optimizer steps; of all while it is not known which do."""
        if self._expected is None:
            return frozenset(range(len(self._watched)))
        given = None if self._optimizers is None else [known() for known in self._optimizers]
        bindings = (self._bind(known) for known in given or list(self._bindings) if known is not None)
        return frozenset().union(*(binding.index_set for binding in bindings if binding is not None))

    @_guarded
    def _marked(self) -> dict[int, Mark]:
        clipped = self._pending_value_clip.union(*(clip.indices for clip in self._pending_clips))
        return self._marks.before(self._watched, clipped)

    @_guarded
    def _trace(self, tensors: Sequence[Tensor]) -> None:
        """Search the graph of a loss that is not finite for where that began."""
        scalars = [tensor for tensor in tensors if tensor.numel() == 1]
        if all(map(_finite, scalars)) or self._step < self._search_from:
            return
        originals = [original for scaled, original in self._scaled if any(scaled() is scalar for scalar in scalars)]
        if originals and all(map(_finite, originals)):
            return  # the loss scaler is too large, and will see to it
        self._search_from = self._step + _SEARCH_STEPS
        modules: dict[int, str] = {}
        for watched in self._watched:
            parameter = watched.parameter()
            if parameter is not None:
                if not bool(torch.isfinite(parameter.detach()).all().numpy().item()):
                    return  # everything is bad already, since an earlier step
                modules[id(parameter)] = watched.module
        origin = provenance.in_graph(scalars, lambda tensor: modules.get(id(tensor)))
        if origin is not None:
            self._collector.put(origin.event(self._step + 1, time.time()))
        self._hooks_wanted = origin is None

    def _search_with_hooks(self, round_: Round) -> None:
        """Take what the hooks saw; set or remove them."""
        if self._hooks is not None:
            round_.seen = self._hooks.take()
            self._hooks_left -= 1
            if not self._hooks_left:
                self._hooks.close()
                self._hooks = None
        elif self._hooks_wanted:
            self._hooks_wanted = False
            models = [model for reference in self._models if (model := reference()) is not None]
            if not any(is_compiled(model) for model in models):
                self._hooks = provenance.Hooks(models)
                self._hooks_left = _HOOKED_STEPS

    @_guarded
    def _begin(self, optimizer: Optimizer) -> tuple[Binding, Round] | None:
        """Open the step; return None where it concerns nothing that is watched."""
        binding = self._bind(optimizer)
        if binding is None:
            return None
        binding.steps += 1
        return binding, self._enter(optimizer)

    def _act(self, optimizer: Optimizer, begun: tuple[Binding, Round] | None) -> None:
        """Measure where a sample is due, and clip, in one pass; without ``begun`` only clip."""
        seen = self._observe(optimizer, *begun) if begun is not None else None
        if self._clipper is None:
            return
        binding = begun[0] if begun is not None else self._bind(optimizer)
        if binding is None:
            return
        pass_ = seen[0] if seen is not None else self._clipper.own_pass(binding, self._watched)
        if pass_ is None:
            return
        limits = self._clipper.clip(optimizer, binding, pass_, self._watched)
        if seen is not None:
            seen[1].limits = limits

    def _with_closure(
        self,
        optimizer: Optimizer,
        begun: tuple[Binding, Round] | None,
        closure: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> taps.Arguments:
        """Return the arguments with a closure that measures after its first evaluation: before it is no gradient.

        The gradients of every evaluation are clipped.
        """

        self._awaited = None if begun is None else id(optimizer)

        @functools.wraps(closure)
        def measured(*given: Any, **named: Any) -> Any:
            nonlocal begun
            result = closure(*given, **named)
            first, begun = begun, None
            self._awaited = None
            self._act(optimizer, first)
            return result

        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": measured}
        return tuple(measured if argument is closure else argument for argument in args), kwargs

    def _enter(self, optimizer: Optimizer) -> Round:
        """Return the round that this step belongs to, a new one where the optimizer has already stepped in it."""
        self._unstepped = None
        if self._round is not None and id(optimizer) in self._round.stepped:
            if self._expected is None:
                self._expected = dict.fromkeys(self._round.stepped, self._step)
            self._finish_round()
        if self._round is None:
            if self._step_is_open:
                self._recall_step(optimizer)
            self._step += 1
            self._round = self._next_round or Round(self._step, time.time(), self._due)
            self._next_round = None
            self._round.step = self._step
        self._round.stepped.add(id(optimizer))
        if self._expected is not None:
            self._expected[id(optimizer)] = self._step
        return self._round

    def _recall_step(self, optimizer: Optimizer) -> None:
        """Find out where a resumed run stands, at its first step: the optimizer may have been restored by now."""
        self._step_is_open = False
        given = (known() for known in self._optimizers or ())
        self._step = steps_made([optimizer, *(known for known in given if known is not None)])
        self._expected = self._expected and dict.fromkeys(self._expected, self._step)
        if not self._step and self._report is not None:
            self.warn(
                f"run {self.run_id} is resumed, but {type(optimizer).__name__} does not say how many steps were made: "
                "they are counted from 1 again, which hides the earlier ones; pass step= to attach()"
            )

    def _complete(self, round_: Round) -> bool:
        """Return whether every optimizer has stepped that usually does."""
        return self._expected is not None and self._expected.keys() <= round_.stepped

    @_guarded
    def _observe(self, optimizer: Optimizer, binding: Binding, round_: Round) -> tuple[Pass, Reading] | None:
        """Take note of what belongs to this step, and measure where it is due."""
        self._take_pending(round_)
        finite = all(map(_finite, round_.losses)) and all(clip.finite for clip in round_.clips)
        if not finite and self._was_finite:
            self._in_trouble = True
            self._force(round_, {id(optimizer)})
        round_.finite = finite
        if not round_.sampled:
            return None
        self._note_frozen(binding)
        self._note_rates(optimizer, round_)
        seen = self._measure(binding, round_, optimizer)
        if seen is None:
            return None
        reading = seen[1]
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):
            reading.scale = _kept(scale)
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            reading.found_inf = _kept(found_inf)
        if self._weights_seen < len(self._watched):
            self._measure_other_weights(round_)
        return seen

    def _take_pending(self, round_: Round) -> None:
        round_.losses += self._pending_losses
        round_.clips += self._pending_clips
        round_.value_clipped |= bool(self._pending_value_clip)
        self._pending_losses.clear()
        self._pending_clips.clear()
        self._pending_value_clip = frozenset()
        if self._logged:
            round_.logged.update(self._logged)
            self._logged = {}

    def _note_rates(self, optimizer: Optimizer, round_: Round) -> None:
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if rate is not None:
                round_.rates.append(_kept(rate) if isinstance(rate, Tensor) else float(rate))
        scaler = self._scaler() if self._scaler is not None else None
        scale = getattr(scaler, "_scale", None)
        if isinstance(scale, Tensor):
            round_.scalars["loss_scale"] = _kept(scale)

    def _bind(self, optimizer: Optimizer) -> Binding | None:
        """Return what is known of ``optimizer``; None where it steps nothing that is watched."""
        if optimizer in self._strangers:
            return None
        given = self._optimizers is None or any(known() is optimizer for known in self._optimizers)
        if not given and not self._adopts(optimizer):
            return None
        binding = self._bindings.get(optimizer)
        groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
        signature = tuple(value for group in groups for value in (len(group), sum(map(id, group))))
        if binding is None or not binding.whole or binding.signature != signature:
            if any(self._find(parameter) is None for group in groups for parameter in group):
                self._look_for_new()
            self._check_parts()
            old = binding
            binding = self._bindings[optimizer] = Binding(groups, self._find)
            binding.signature = signature
            self._looks = max(self._looks, _LOOKS)
            self._classifier.renew()
            others = sum(map(len, groups)) - len(binding.indices)
            if self._clipper is not None and binding.indices and others:
                self.warn(f"{others} parameters of {type(optimizer).__name__} belong to no watched module: not clipped")
            if old is not None:
                binding.steps, binding.steps_at_scaler = old.steps, old.steps_at_scaler
        return binding if binding.indices else None

    def _bind_list(self, parameters: Sequence[Tensor]) -> Binding:
        """Return what is known of a list; one that holds nothing of ours is another model's, and may come often."""
        unknown = sum(self._find(parameter) is None for parameter in parameters)
        if 0 < unknown < len(parameters):
            self._look_for_new()
        self._check_parts()
        return Binding([parameters], self._find)

    def _look_for_new(self) -> None:
        if self._discover() and self.watching:
            self._register()

    def _note_frozen(self, binding: Binding) -> None:
        """Register again where ``requires_grad`` has changed.

        Only parameters of the optimizer that steps are asked, and of none: trainings that take turns freeze the others'
        for each turn.
        """
        stepped = frozenset().union(*(known.index_set for known in self._bindings.values()))
        asked = list(zip(binding.indices, binding.parameters, strict=True))
        if len(stepped) < len(self._watched):
            others = ((index, watched.parameter()) for index, watched in enumerate(self._watched))
            asked += [(index, tensor) for index, tensor in others if tensor is not None and index not in stepped]
        flipped = {
            index: tensor.requires_grad
            for index, tensor in asked
            if tensor.requires_grad != self._trains.get(index, self._watched[index].trainable)
        }
        if flipped:
            self._trains |= flipped
            self._register()

    def _adopts(self, optimizer: Optimizer) -> bool:
        """Take an optimizer for one of those that were given, if they are all gone: it was made anew.

        Any other that steps watched parameters is told of, once.
        """
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        ours = any(self._find(parameter) is not None for parameter in parameters)
        if ours and self._optimizers is not None and all(known() is None for known in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
            return True
        self._strangers.add(optimizer)
        if ours:
            self.warn(
                f"{type(optimizer).__name__} steps watched parameters, but was not given to attach(): it is not "
                + ("clipped or measured" if self._clipper is not None else "measured")
            )
        return False

    def _check_given(self, optimizers: Iterable[Optimizer]) -> None:
        """Say which optimizer steps nothing that is watched: it holds copies of the parameters, or another model's.

        Raises:
            ValueError: it was to be clipped.
        """
        for optimizer in optimizers:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            if any(self._find(parameter) is not None for parameter in parameters):
                continue
            text = f"{type(optimizer).__name__} steps no parameter of the model that was given to attach()"
            if self._clipper is not None:
                raise ValueError(f"{text}: nothing would be clipped. Give the model whose parameters it holds")
            self.warn(f"{text}: nothing of it is measured")

    def _check_parts(self) -> None:
        """Measure no more where the numbers would be those of this rank's part alone.

        Raises:
            NotImplementedError: they were to be clipped and cannot be.
        """
        if self._parts_only or not is_one_of_several():
            return
        models = [model for reference in self._models if (model := reference()) is not None]
        text = ""
        if is_flattened(models):
            text = "FullyShardedDataParallel (FSDP1) leaves each rank a part of the parameters: use fully_shard (FSDP2)"
            if self._clipper is not None:
                raise NotImplementedError(f"{text}; AGC cannot clip them")
        elif self._ranks is None and any(map(is_sharded, _parameters(models))):
            text = "the model was sharded after attach(), the other ranks do not measure: attach after fully_shard"
        self._parts_only = text
        if text and self.watching:
            self.warn(f"{text}. Gradients and weights are not measured")
            if self._started:
                self._tell_parts()

    def _tell_parts(self) -> None:
        event = wire.Event(step=self._step, at=time.time(), kind="not_measured", message=self._parts_only)
        self._collector.put(event)

    def _note_unstepped(self) -> None:
        """Count a backward pass, and say once where no optimizer takes what comes of them."""
        assert self._unstepped is not None
        self._unstepped += 1
        if self._unstepped < _UNSTEPPED and min(self._unstepped, self._steps_of_others) < _UNSTEPPED_BESIDE_OTHERS:
            return
        text = f"after {self._unstepped} backward passes no torch.optim.Optimizer has stepped a watched parameter: " + (
            "nothing is clipped or measured" if self._clipper is not None else "nothing is measured"
        )
        self._unstepped = None
        self.warn(text)
        self._collector.put(wire.Event(step=self._step, at=time.time(), kind="not_stepped", message=text))

    def _measure_before_clip(self, binding: Binding, *, force: bool) -> None:
        round_ = self._round
        if round_ is None or any(self._has_stepped(index) for index in binding.indices[:1]):
            round_ = self._next_round or Round(self._step + 1, time.time(), self._due)
            self._next_round = round_
        if force and self._was_finite:
            self._force(round_, set())
        seen = self._measure(binding, round_) if round_.sampled else None
        if seen is not None:
            seen[1].earlier = tuple(self._pending_clips)

    def _force(self, round_: Round, stepping: set[int]) -> None:
        """Sample a round although it is not due; the next one where an optimizer was not measured and has stepped."""
        if round_.sampled or round_.skipped:
            return
        round_.sampled = round_.stepped <= stepping
        self._forced = not round_.sampled

    def _has_stepped(self, index: int) -> bool:
        """Return whether the optimizer of a parameter has stepped in the open round."""
        assert self._round is not None
        stepped = self._round.stepped - {self._awaited}
        return any(
            id(optimizer) in stepped and index in binding.index_set for optimizer, binding in self._bindings.items()
        )

    def _measure(
        self, binding: Binding, round_: Round, optimizer: Optimizer | None = None
    ) -> tuple[Pass, Reading] | None:
        """Write the unit norms of the gradients that are there, and of their weights, to the round's slot.

        Args:
            binding: the parameters.
            round_: takes the reading.
            optimizer: about to step them; None: before they are clipped.
        """
        before_clip = optimizer is None
        if self._parts_only:
            round_.sampled = False
            return None
        if round_.slot is None:
            round_.slot = self._slots.take()
        if round_.slot is None:
            self.losses.samples += 1
            round_.sampled = False
            return None
        started = time.perf_counter()
        pass_ = binding.measure(round_.slot, self._watched)
        if self._clipper is not None and not before_clip:
            self.spent_seconds -= time.perf_counter() - started  # clipping needs this pass at every step
        if pass_ is None:
            return None
        reading = Reading(pass_.claim, before_clip)
        inspection.inspect(reading, pass_.grads)
        round_.readings.append(reading)
        round_.empty += pass_.plan.empty
        if optimizer is not None:
            self._updates.keep(optimizer, binding, pass_)
        return pass_, reading

    def _measure_other_weights(self, round_: Round) -> None:
        """Measure, once, the weights that this round did not: frozen ones, and those of other optimizers."""
        measured = {index for reading in round_.readings for index in reading.claim.plan.indices}
        others = [
            (index, parameter)
            for index, watched in enumerate(self._watched)
            if index not in measured and (parameter := watched.parameter()) is not None
        ]
        self._weights_seen = len(self._watched)
        if not others or round_.slot is None:
            return
        with torch.no_grad():
            members = [local(parameter) for _, parameter in others]
            specs = [spec_of(member, "whole") for member in members]  # nothing but their norms is asked for
            plan = Plan([index for index, _ in others], None, specs)
            claim = round_.slot.claim(plan)
            claim.weights.run(members)
            round_.readings.append(Reading(claim, before_clip=False))

    def _finish_round(self) -> None:
        """Hand the round over and decide whether the next one is sampled."""
        round_ = self._round
        if round_ is None:
            return
        self._round = None
        self._updates.clear()
        if round_.slot is not None:
            round_.slot.send()
        now = time.perf_counter()
        step_seconds = now - self._finished_at if self._finished_at else 0.0
        self._finished_at = now
        background = self.background_seconds
        round_.agent_seconds = self.spent_seconds - self._spent_before
        self._spent_before = self.spent_seconds
        self._governor.stepped(
            step_seconds, round_.agent_seconds, background - self._background_before, sampled=round_.sampled
        )
        self._background_before = background
        if self._in_trouble:
            self._in_trouble = False
            self._governor.trouble()
        self._due = self._governor.due(self._step + 1) or self._forced
        self._forced = False
        if not round_.skipped:
            self._was_finite = round_.finite
        if round_.sampled:
            round_.scalars["step_seconds"] = self._governor.step_seconds
            round_.scalars["overhead_ratio"] = self._governor.overhead_ratio
            round_.scalars["interval_steps"] = float(self._governor.interval_steps)
            round_.spared = self._classifier.indices if self._clipper is None else self._clipper.spared(self._watched)
        if self._hooks is not None or self._hooks_wanted:
            self._search_with_hooks(round_)
        self._collector.put(round_)
        self._learn_order()
        if self._expected is not None:
            self._expected = {key: step for key, step in self._expected.items() if step > self._step - 100}

    def _learn_order(self) -> None:
        if self._order is None or not (self._order.known or self._step >= _ORDER_STEPS):
            return
        self._order.close()
        known = self._order.known
        depths = self._order.depths(len(self._watched))
        self._order = None
        if known:
            self._depths = depths
            self._register()

    def _discover(self) -> bool:
        """Look for parameters that are not known yet; return whether there were any."""
        models = [model for reference in self._models if (model := reference()) is not None]
        new = []
        places = {watched.name: place for place, watched in enumerate(self._watched)}
        for watched in walk(models):
            parameter = watched.parameter()
            known = self._index_of.get(id(parameter))
            if known is None or self._watched[known].parameter() is not parameter:
                new.append((watched.bounded() if self._clipper is None else watched, parameter))
        for watched, parameter in new:
            if watched.name in places:  # another parameter under the same name: a layer was replaced
                place = places[watched.name]
                self._watched[place] = watched
            else:
                place = len(self._watched)
                self._watched.append(watched)
            self._index_of[id(parameter)] = place
        self._lists.clear()
        if new and self._clipper is not None:
            for index in self._clipper.agc.stacked(*listed(self._watched)):
                self._watched[index] = self._watched[index].of_experts()
            self._clipper.know(self._watched)
        return bool(new)

    def _find(self, tensor: Tensor) -> int | None:
        """Return the index of a watched parameter."""
        index = self._index_of.get(id(tensor))
        if index is not None and self._watched[index].parameter() is tensor:
            return index
        return self._stand_ins.get(id(tensor))

    def _look(self, losses: Sequence[Tensor]) -> None:
        """Search the graph of a loss for the classifier; on every rank that clips."""
        self._looks -= 1
        started = time.perf_counter()
        try:
            if any(binding.sharded for binding in self._bindings.values()):
                self._note_stand_ins()
            self._classifier.look(losses)
        except Exception as error:  # the agent's guard; without an answer the clipper guesses, and says so
            self.failed(error)
            if Agent.raises_own_errors:
                raise
        finally:
            self.spent_seconds += time.perf_counter() - started

    def _note_stand_ins(self) -> None:
        """Sharded parameters are gathered for the forward pass: what stands in for them then is in the graph."""
        index_of = {watched.name: index for index, watched in enumerate(self._watched)}
        for watched in walk([model for reference in self._models if (model := reference()) is not None]):
            parameter = watched.parameter()
            if id(parameter) not in self._index_of and watched.name in index_of:
                self._stand_ins[id(parameter)] = index_of[watched.name]

    def _register(self) -> None:
        depths = self._depths
        depths += range(len(depths), len(self._watched))
        watched = list(self._watched)
        for index, trains in self._trains.items():
            watched[index] = replace(watched[index], trainable=trains)
        self._collector.put(Registered(tuple(watched), tuple(depths)))

    def _replace_earlier(self) -> None:
        """Close the agent that watches exactly these parameters: a notebook cell was run again."""
        for other in taps.listeners():
            if isinstance(other, Agent) and (other.watches(self._index_of) or other.is_orphaned):
                other.close(timeout_seconds=1.0)

    def adopt(self, http: Http) -> None:
        """Deliver, once, what dead processes left for this server on this machine."""
        if self._adopted:
            return
        self._adopted = True
        for leftover in leftovers(self._settings.spool_directory):
            if leftover.url != self._settings.url:
                continue
            try:
                Sender(leftover, http, self.losses, self.warn).deliver(time.monotonic() + 30)
            except Exception as error:  # the agent's guard: out of a damaged file comes anything
                self.warn(f"the spool {leftover.path}, of another process, cannot be read and stays: {error}")

    def _note_trouble(self, unclear: bool) -> None:
        self._in_trouble = True
        if unclear and self._step >= self._search_from:
            self._search_from = self._step + _SEARCH_STEPS
            self._hooks_wanted = True

    def exiting(self, status: object) -> None:
        """``sys.exit`` was called: unless there is another step, that is how the run ends."""
        if threading.current_thread() is threading.main_thread():
            code = status if isinstance(status, int) else 0 if status is None else 1
            self._exit = self._step, code

    @property
    def exit_code(self) -> int | None:
        """Return what ``sys.exit`` was called with since the last step; a text, which Python prints, is 1."""
        return self._exit[1] if self._exit[0] == self._step else None

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


class _Report:
    """The way to the server: the spool and what empties it. Only the rank that reports has one."""

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self.spool = Spool(
            settings.spool_directory, url=settings.url, run=agent.run_id, losses=agent.losses, warn=agent.warn
        )
        self._http = Http(settings.url, settings.token)
        adopt = functools.partial(agent.adopt, self._http)
        self.sender = Sender(self.spool, self._http, agent.losses, agent.warn, idle=adopt, failed=agent.failed)

    def close(self) -> None:
        """Wait for the sender, which was told when to end."""
        self.sender.join()
        self.spool.close(timeout_seconds=0.2)
        self._http.close()


def _close_all() -> None:
    """At the end of the interpreter the agents wait for their servers at the same time, not one after the other."""
    deadline = time.monotonic() + CLOSING_SECONDS
    raised = hasattr(sys, "last_value")
    agents = [listener for listener in taps.listeners() if isinstance(listener, Agent)]
    stopped = []
    for agent in agents:
        code = None if raised else agent.exit_code
        if agent.stop(deadline, "failed" if raised or code else "completed", code):
            stopped.append(agent)
    for agent in stopped:
        agent.deliver()


def _retired(run_id: str, run_url: str) -> Agent:
    """Return what an agent that was pickled with its model is elsewhere: closed, with nothing to watch."""
    settings = resolve(url=run_url.removesuffix(f"/runs/{run_id}"), run=run_id, environment={})
    return Agent([], [], settings, retired=True)


def _nothing() -> None:
    """Nobody waits for what is written."""


def _parameters(models: Iterable[nn.Module]) -> Iterable[Tensor]:
    return (parameter for model in models for parameter in model.parameters())


def _kept(scalar: Tensor) -> Tensor:
    """Return a copy of a number that stays on its device, whatever becomes of the original."""
    kept = local(scalar.detach())
    with torch.no_grad():
        return kept.clone() if kept.dtype in (torch.float32, torch.float64) else kept.float()


def _summed(scalars: Iterable[Tensor]) -> list[Tensor]:
    """Return the sums of the scalars of each device and type."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for scalar in scalars:
        alike.setdefault((scalar.device, scalar.dtype), []).append(scalar.reshape(()))
    with torch.no_grad():
        return [torch.stack(same).sum() for same in alike.values()]


def _is_partial(norm: Tensor) -> bool:
    return any(placement.is_partial() for placement in getattr(norm, "placements", ()))


def _finite(scalar: Tensor) -> bool:
    """Return False for a NaN or Inf that can be seen without waiting: on the CPU."""
    if scalar.device.type != "cpu":
        return True
    seen = scalar.detach() if scalar.requires_grad else scalar
    seen = seen if seen.dtype in (torch.float32, torch.float64) else seen.float()
    return bool(math.isfinite(seen.numpy().item()))
