"""The runs of a process that was auto-attached: finds the models and optimizers, and opens a run for each training."""

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.hooks import autograd_graph
from gradwatch.lifecycle.process import default_run_name
from gradwatch.model.discovery import parameters_of
from gradwatch.session import Session, running_sessions
from gradwatch.settings import RUN_ID, Settings, resolve

_IDLE_STEPS: Final = 100
"""Steps of the newest training after which an earlier one that made no step is over."""
_MOST_RUNS: Final = 100
"""Runs of one process. A process that makes more models, as meta-learning does with its copies, is no sweep."""


class AutoRuns:
    """The sessions of this process; each training with new optimizers gets a run, as does each fold of a validation."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        """Sessions of the trainings that go on, the newest last."""
        self._last_step: dict[Session, tuple[int, int]] = {}
        """Earlier session -> (its step when it was last seen to advance, the step of the newest session then)."""
        self._stand_ins: dict[Session, list[nn.Module]] = {}
        """Session -> modules made for a program that has parameters but no modules; kept alive here."""
        self._run_count = 0
        self._name = ""
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers that were already searched for models."""

    @property
    def program_attaches_itself(self) -> bool:
        """Return whether the program called ``attach``: then nothing is attached automatically."""
        return any(session not in self._sessions for session in running_sessions())

    @property
    def some_may_be_over(self) -> bool:
        """Return whether there are earlier trainings besides the newest."""
        return bool(self._last_step)

    def attach(self, losses: Sequence[Any], new_optimizers: Sequence[Optimizer]) -> bool:
        """Open a run if new optimizers step parameters that no session watches; finish runs without optimizers.

        Args:
            losses: arguments of the backward pass; the parameters in their graphs are watched where there is no
                optimizer yet.
            new_optimizers: optimizers that were made since the last call. A program may make one for each step, so the
                objects of the process are searched only if one of them steps an unwatched parameter.

        Returns:
            Whether a session was attached.

        Raises:
            RuntimeError: the process has opened too many runs.
        """
        if self._sessions and all(map(self._is_watched, _stepped(new_optimizers))):
            self._known.update(new_optimizers)
            return False
        # 1. Find the parameters that are trained and not watched yet.
        optimizers, modules = _optimizers_and_modules()
        older = [optimizer for optimizer in optimizers if optimizer in self._known]
        new = [optimizer for optimizer in optimizers if optimizer not in self._known]
        self._known.update(new)
        trained = [parameter for parameter in _stepped(new) if not self._is_watched(parameter)]
        if not trained and (self._sessions or any(True for _ in _stepped(new))):
            return False
        # 2. Find the models that they belong to.
        watched = {id(model) for session in self._sessions for model in session.models}
        models = _outermost(modules, trained or _parameters_in_graphs(losses))
        stand_ins = [] if models else _modules_of_named_parameters(new)
        models = [model for model in models or stand_ins if id(model) not in watched]
        if not models:
            return False
        if self._run_count == _MOST_RUNS:
            raise RuntimeError(f"it has begun {_MOST_RUNS} runs; attach() watches what you choose")
        # 3. Finish the runs whose optimizers are gone, and open the new one.
        for session in list(self._sessions):
            if not any(map(session.watches, _stepped(older))):
                self._finish(session)
        self._last_step = dict.fromkeys(self._sessions, (0, 0))
        self._sessions.append(Session(models, None, self._next_settings(), automatic=True))
        self._stand_ins[self._sessions[-1]] = stand_ins
        return True

    def finish_idle(self) -> None:
        """Finish earlier trainings that make no steps any more, although their optimizers are still alive."""
        for session, (step, newest_step_then) in list(self._last_step.items()):
            newest_step = self._sessions[-1].step
            if session.step != step:
                self._last_step[session] = session.step, newest_step
            elif newest_step - newest_step_then >= _IDLE_STEPS:
                self._finish(session)

    def _finish(self, session: Session) -> None:
        self._sessions.remove(session)
        self._last_step.pop(session, None)
        del self._stand_ins[session]
        session.finish_in_background()

    def _is_watched(self, parameter: Tensor) -> bool:
        return any(session.watches(parameter) for session in self._sessions)

    def _next_settings(self) -> Settings:
        """Return the settings of the next run. From the second run on the name is numbered, and no run is resumed."""
        settings = resolve()
        resumed = settings.run is not None and RUN_ID.fullmatch(settings.run) is not None
        self._run_count += 1
        if self._run_count == 1:
            self._name = default_run_name() if resumed or settings.run is None else settings.run
            return settings if resumed else replace(settings, run=self._name)
        training = f"{settings.training_name} #{self._run_count}"
        return replace(settings, run=f"{self._name} #{self._run_count}", training_name=training)


def _stepped(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    return (parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])


def _optimizers_and_modules() -> tuple[list[Optimizer], list[nn.Module]]:
    """Return the optimizers and modules that are alive in this process, roughly in the order of their creation."""
    if gc.get_freeze_count():
        # A program that forks may have frozen its objects, which hides them: look at them, and freeze them again.
        gc.unfreeze()
        try:
            return _of_generations()
        finally:
            gc.freeze()
    return _of_generations()


def _of_generations() -> tuple[list[Optimizer], list[nn.Module]]:
    optimizers: list[Optimizer] = []
    modules: list[nn.Module] = []
    for generation in (2, 1, 0):
        for found in gc.get_objects(generation):
            kind = type(found)  # isinstance may run code of the object
            if issubclass(kind, nn.Module):
                modules.append(found)
            elif issubclass(kind, Optimizer):
                optimizers.append(found)
    return optimizers, modules


def _outermost(modules: Sequence[nn.Module], trained: Iterable[Tensor]) -> list[nn.Module]:
    """Return the outermost modules that hold a parameter of ``trained``."""
    wanted = {id(parameter) for parameter in trained}
    inside = {id(child) for module in modules for child in _children(module)}
    outermost = (module for module in modules if id(module) not in inside)
    return [module for module in outermost if any(id(parameter) in wanted for parameter in _parameters(module))]


def _children(module: nn.Module) -> list[nn.Module]:
    with suppress(Exception):  # a module whose __init__ has not finished, or that overrides children()
        return list(module.children())
    return []


def _parameters(module: nn.Module) -> list[Tensor]:
    with suppress(Exception):
        return list(parameters_of([module]))
    return []


def _parameters_in_graphs(losses: Iterable[Any]) -> Iterator[Tensor]:
    start = autograd_graph.roots(loss for loss in losses if isinstance(loss, Tensor))
    for node in autograd_graph.walk(start):
        parameter = autograd_graph.leaf(node)
        if parameter is not None:
            yield parameter


def _modules_of_named_parameters(optimizers: Iterable[Optimizer]) -> list[nn.Module]:
    """Return a module made of the named parameters of optimizers, for programs that use no modules; else nothing."""
    model = nn.Module()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                _add_parameter(model, name.split("."), parameter)
    if not any(True for _ in model.parameters()):
        return []
    return [model]


def _add_parameter(model: nn.Module, path: list[str], parameter: Tensor) -> None:
    for part in path[:-1]:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    if isinstance(parameter, nn.Parameter):
        model.register_parameter(path[-1], parameter)
    else:
        model.register_parameter(path[-1], None)
        model._parameters[path[-1]] = parameter  # type: ignore[assignment] # noqa: SLF001
