"""Hearing a training: what is due is measured and clipped within its own calls, and handed over as it is."""

import functools
import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Concatenate, Final, ParamSpec, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import wire
from gradwatch.clipping.agc import AGC
from gradwatch.clipping.classifier import SEARCHES, SEARCHES_TO_CLIP, ClassifierFinder
from gradwatch.clipping.executor import AgcExecutor
from gradwatch.delivery.dropped import Dropped
from gradwatch.governor import Governor
from gradwatch.hooks import taps
from gradwatch.marks import Mark, Marks
from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.scalars import Scalar, copy_scalar, is_finite
from gradwatch.open_step import Steps
from gradwatch.optimizers import Optimizers, has_inner
from gradwatch.pace import Pace
from gradwatch.pending import Pending
from gradwatch.ranks.exchange import RankExchange, incomplete_reason, is_partial, uses_fsdp1
from gradwatch.recording.optimizer_parameters import Binding, Pass
from gradwatch.recording.recorder import Meter
from gradwatch.rounds import Clip, Message, Reading, Round, acted
from gradwatch.samples.origin import OriginFinder

_log = logging.getLogger("gradwatch")

DISARMED_AFTER: Final = 3
"""Errors of its own after which an agent stops measuring."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _swallowing(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R | None]:
    """Telemetry never raises into training: errors are counted and shipped, and after some the agent disarms."""

    @functools.wraps(method)
    def swallowing(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        started = time.perf_counter()
        with self.turn:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:  # the agent's guard
                self.failed(error)
                if self.raises_own_errors:
                    raise
                return None
            finally:
                self.spent_seconds += time.perf_counter() - started

    return cast("Callable[Concatenate[Any, _P], _R | None]", swallowing)


def _guarded(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R | None]:
    """Swallow errors, and do nothing where nothing is watched."""
    swallowing = _swallowing(method)

    @functools.wraps(method)
    def guarded(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        return swallowing(self, *args, **kwargs) if self.watching else None

    return cast("Callable[Concatenate[Any, _P], _R | None]", guarded)


class Observer(ABC):
    """Hears of each step of one training, measures it where a sample is due, and clips.

    Args:
        models: what is watched.
        optimizers: whose steps count; None: of every one that steps the models' parameters.
        governor: says which steps are sampled.
        step: steps made so far; None: what a restored optimizer says.
        clip: how gradients are clipped adaptively; None: not at all.
        ranks: the ranks of a sharded training; None where this rank measures alone.
        watching: whether anything is measured.
    """

    raises_own_errors: ClassVar[bool] = False
    """For tests: raise the agent's own errors instead of counting them."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] | None,
        governor: Governor,
        *,
        step: int | None,
        clip: AGC | None,
        ranks: RankExchange | None,
        watching: bool,
    ) -> None:
        self._ranks = ranks
        self.watching = watching
        self.spent_seconds = 0.0
        """Of the training thread, since the agent was attached."""
        self.turn = threading.RLock()
        """Taken by each hook: several threads may train what one agent watches."""
        self._pending = Pending()
        self._marks = Marks()
        self._uncalled_was_told = False
        self._parts_only = ""
        """Why nothing is measured: this rank holds only parts of the parameters, and no other measures the rest."""
        self._parameters = ParameterRegistry(models, None if clip is None else clip.expert_indices)
        self._classifier = ClassifierFinder(self._parameters.find, SEARCHES if clip is None else SEARCHES_TO_CLIP)
        self._clipper = None if clip is None else AgcExecutor(clip, self._classifier)
        self._origin = OriginFinder(self._parameters)
        self._optimizers = Optimizers(
            optimizers,
            self._parameters,
            self._classifier,
            self._renew,
            clips=clip is not None,
            warn=self.warn,
        )
        self.dropped = Dropped()
        self._meter = Meter(self._parameters, self.dropped)
        self._pace = Pace(governor)
        self._steps = Steps(
            step,
            self._parameters,
            self._optimizers,
            self._pending,
            self._pace,
            finish=self._finish_round,
            unknown=self._warn_of_unknown_step,
            give_back=self._meter.slots.release,
        )

    @abstractmethod
    def _put(self, message: Message) -> None:
        """Hand over what was seen."""

    @abstractmethod
    def _warn_of_unknown_step(self, optimizer: Optimizer) -> None:
        """Nothing says how many steps a resumed training has made."""

    @property
    @abstractmethod
    def background_seconds(self) -> float:
        """Return the processor time of the agent's own threads."""

    def warn(self, text: str) -> None:
        """Say once what the user has to know."""
        _log.warning("gradwatch: %s", text)

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

    def failed(self, error: Exception) -> None:
        """Count an error of the agent's own; after some, stop measuring and say so once."""
        self.dropped.errors += 1
        _log.debug("gradwatch: an error of the agent", exc_info=error)
        if self.dropped.errors < DISARMED_AFTER or not self.watching:
            return
        self.watching = False
        self._origin.close()
        reason = f"{type(error).__name__}: {error}"
        _log.warning("gradwatch stops watching this run after %d errors of its own: %s", DISARMED_AFTER, reason)
        self._put(wire.Event(step=self._steps.number, at=time.time(), kind="disarmed", message=reason))

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Optimizer | None
    ) -> taps.Arguments | None:
        """An optimizer is about to step.

        Raises:
            Exception: what goes wrong in clipping; what goes wrong in monitoring is swallowed.
        """
        with self.turn:
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
        with self.turn:
            if not (self.watching or self._classifier.searches_left) or not self._is_home(tensors):
                return None
            if self._classifier.searches_left:
                self._look(tensors)
            if self._parameters.awaits_order:
                self._check_order(tensors)
            self._trace(tensors)
            self._forget_thrown_away()
            marks = self._marked(losses)
            return None if marks is None else (marks, tensors)

    @_guarded
    def after_backward(self, losses: Sequence[Tensor], before: object) -> None:
        """Gradients of these losses were accumulated; of none, or none at all: there is nothing to note."""
        left = self._pending.end_backward(losses)
        if before is None:
            return
        marks, tensors = cast("tuple[dict[int, Mark], Sequence[Tensor]]", before)
        if not self._pending.is_home(tensors, self._parameters):
            return
        ours, changed = self._marks.changed(marks, self._parameters, losses)
        if not ours:
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
        limit = copy_scalar(max_norm) if isinstance(max_norm, Tensor) else float(max_norm)
        clip = Clip(
            copy_scalar(total_norm), limit, binding.index_set, is_partial(total_norm), norm_type, binding.repeated
        )
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

    @_swallowing
    def _is_home(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the thread that trains differentiates these; on every rank that clips."""
        return self._pending.is_home(tensors, self._parameters)

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
        event = self._origin.search_graph(scalars, self._pending.originals(scalars), self._steps.number)
        if event is not None:
            self._put(event)

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
        pass_ = seen[0] if seen is not None else self._clipper.measure(binding, self._parameters.watched)
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
            with self.turn:
                self._steps.evaluated = weakref.ref(optimizer)
                self._act(optimizer, first, outer)
            return result

        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": measured}
        return tuple(measured if argument is closure else argument for argument in args), kwargs

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
            round_.found_infs.append(copy_scalar(found_inf))
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
                round_.rates[place] = copy_scalar(rate) if isinstance(rate, Tensor) else float(rate)
        scale = self._pending.loss_scale
        if scale is not None:
            round_.scalars["loss_scale"] = copy_scalar(scale)

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
        changed = self._parameters.update_trainable(zip(binding.indices, binding.parameters, strict=True))
        stepped = self._optimizers.stepped_indices
        if len(stepped) < len(self._parameters.watched):
            changed |= self._parameters.update_trainable(self._parameters.other_than(stepped))
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
        self._parts_only = text = incomplete_reason(models, self._ranks)
        self._meter.stopped = bool(text)
        if text and self._clipper is not None and uses_fsdp1(models):
            raise NotImplementedError(f"{text}; AGC cannot clip them")
        if text and self.watching:
            self.warn(f"{text}. Gradients and weights are not measured")
            self._tell_parts()

    def _tell_parts(self) -> None:
        event = wire.Event(step=self._steps.number, at=time.time(), kind="not_measured", message=self._parts_only)
        self._put(event)

    def _tell_unstepped(self, passes: int) -> None:
        text = f"after {passes} backward passes no torch.optim.Optimizer has stepped a watched parameter: " + (
            "nothing is clipped or measured" if self._clipper is not None else "nothing is measured"
        )
        self.warn(text)
        self._put(wire.Event(step=self._steps.number, at=time.time(), kind="not_stepped", message=text))

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
        self._put(wire.Event(step=self._steps.number, at=time.time(), kind="not_measured", message=text))

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
        return (
            None
            if scale is None or self._optimizers.are_unscaled(binding, self._pending.scaler)
            else copy_scalar(scale)
        )

    def _finish_round(self) -> None:
        """Hand the round over and decide whether the next one is sampled."""
        round_ = self._steps.close()
        if round_ is None:
            return
        self._meter.send(round_)
        self._pace.finished(round_, self.spent_seconds + self._meter.others_seconds, self.background_seconds)
        if round_.sampled:
            round_.excluded = (
                self._classifier.indices if self._clipper is None else self._clipper.excluded(self._parameters.watched)
            )
        self._origin.finish_step(round_)
        self._put(round_)
        if self._parameters.learn_order(round_.step):
            self._register()
        self._optimizers.forget_idle(round_.step)

    def _discover(self) -> bool:
        """Look for parameters that are not known yet; return whether there were any."""
        new = self._parameters.discover()
        self._optimizers.forget_lists()
        if new and self._clipper is not None:
            self._clipper.find_excluded(self._parameters.watched)
        return new

    @_swallowing  # without an answer the clipper guesses, and says so
    def _look(self, losses: Sequence[Tensor]) -> None:
        """Search the graph of a loss for the classifier; on every rank that clips."""
        self._classifier.searches_left -= 1
        if self._parameters.sharded:
            self._parameters.note_unsharded()
        self._classifier.search(losses)

    def _register(self) -> None:
        self._put(self._parameters.registered())
