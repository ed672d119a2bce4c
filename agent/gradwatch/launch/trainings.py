"""The trainings of a process that says nothing: which there are, and the run of each."""

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.agent import Agent
from gradwatch.hooks import taps
from gradwatch.lifecycle.process import default_run_name
from gradwatch.settings import RUN_ID, Settings, resolve

_IDLE_STEPS: Final = 100
"""Steps of the newest training after which an earlier one that made none is over."""
_MOST_RUNS: Final = 100
"""Of one process: what trains thousands of short-lived copies, as meta-learning does, is no sweep."""
_MOST_NODES: Final = 20_000
"""Of the graph of a loss, where no optimizer is there yet to tell what is trained; more could overflow the stack, see
``classifier``."""


class Trainings:
    """The trainings of this process. Each that begins with optimizers of its own has a run, as each fold does."""

    def __init__(self) -> None:
        self._agents: list[Agent] = []
        """Of those that go on, the newest last."""
        self._last: dict[Agent, tuple[int, int]] = {}
        """Of each but the newest the step at which it was seen last, and the newest one's when it came to it."""
        self._kept: dict[Agent, list[nn.Module]] = {}
        """What stands for the models of those that have parameters but no modules."""
        self._runs = 0
        self._name = ""
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    @property
    def are_of_the_program(self) -> bool:
        """Return whether the program attaches by itself."""
        return any(listener not in self._agents for listener in taps.listeners())

    @property
    def some_may_be_over(self) -> bool:
        """Return whether others began later."""
        return bool(self._last)

    def attach(self, losses: Sequence[Any], made: Sequence[Optimizer]) -> bool:
        """Begin a run where new optimizers step what is not watched; finish those whose optimizers are gone.

        Args:
            losses: what they reach is watched where there is no optimizer yet.
            made: optimizers that were made since this was called last. A program may make one for each step: the
                objects of the process are searched only for what is not watched.

        Raises:
            RuntimeError: there are too many.
        """
        if self._agents and all(map(self._watch, _stepped(made))):
            self._known.update(made)
            return False
        optimizers, modules = _there()
        older = [optimizer for optimizer in optimizers if optimizer in self._known]
        new = [optimizer for optimizer in optimizers if optimizer not in self._known]
        self._known.update(new)
        trained = [parameter for parameter in _stepped(new) if not self._watch(parameter)]
        if not trained and (self._agents or any(True for _ in _stepped(new))):
            return False
        watched = {id(model) for agent in self._agents for model in agent.models}
        roots = _roots(modules, trained or _reached(losses))
        kept = [] if roots else _named(new)
        models = [model for model in roots or kept if id(model) not in watched]
        if not models:
            return False
        if self._runs == _MOST_RUNS:
            raise RuntimeError(f"it has begun {_MOST_RUNS} runs; attach() watches what you choose")
        for agent in list(self._agents):
            if not any(map(agent.watches, _stepped(older))):
                self._finish(agent)
        self._last = dict.fromkeys(self._agents, (0, 0))
        self._agents.append(Agent(models, None, self._settings(), automatic=True))
        self._kept[self._agents[-1]] = kept
        return True

    def finish_idle(self) -> None:
        """Finish the earlier trainings that are over, though their optimizers are still there."""
        for agent, (step, then) in list(self._last.items()):
            now = self._agents[-1].step
            if agent.step != step:
                self._last[agent] = agent.step, now
            elif now - then >= _IDLE_STEPS:
                self._finish(agent)

    def _finish(self, agent: Agent) -> None:
        self._agents.remove(agent)
        self._last.pop(agent, None)
        del self._kept[agent]
        agent.finish_aside()

    def _watch(self, parameter: Tensor) -> bool:
        return any(agent.watches(parameter) for agent in self._agents)

    def _settings(self) -> Settings:
        """Return what the next run is told. After the first one the name counts them, and none is resumed."""
        settings = resolve()
        resumed = settings.run is not None and RUN_ID.fullmatch(settings.run) is not None
        self._runs += 1
        if self._runs == 1:
            self._name = default_run_name() if resumed or settings.run is None else settings.run
            return settings if resumed else replace(settings, run=self._name)
        return replace(settings, run=f"{self._name} #{self._runs}")


def _stepped(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    return (parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])


def _there() -> tuple[list[Optimizer], list[nn.Module]]:
    """Return the optimizers and the modules of the program, about in the order in which they were made."""
    optimizers: list[Optimizer] = []
    modules: list[nn.Module] = []
    for generation in (2, 1, 0):
        for found in gc.get_objects(generation):
            kind = type(found)  # what an object says of itself (``isinstance``) may run code of its own
            if issubclass(kind, nn.Module):
                modules.append(found)
            elif issubclass(kind, Optimizer):
                optimizers.append(found)
    return optimizers, modules


def _roots(modules: Sequence[nn.Module], trained: Iterable[Tensor]) -> list[nn.Module]:
    """Return the outermost modules that hold parameters of ``trained``."""
    wanted = {id(parameter) for parameter in trained}
    inside = {id(part) for module in modules for part in _parts(module)}
    outermost = (module for module in modules if id(module) not in inside)
    return [module for module in outermost if any(id(parameter) in wanted for parameter in _parameters(module))]


def _parts(module: nn.Module) -> list[nn.Module]:
    with suppress(Exception):  # one that is half made, or has ways of its own
        return list(module.children())
    return []


def _parameters(module: nn.Module) -> list[Tensor]:
    with suppress(Exception):
        return list(module.parameters())
    return []


def _reached(losses: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters in the graphs of some losses."""
    known: set[Any] = set()
    waiting = [loss.grad_fn for loss in losses if isinstance(loss, Tensor) and loss.grad_fn is not None]
    while waiting and len(known) < _MOST_NODES:
        node = waiting.pop()
        if node not in known:
            known.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            waiting += [below for below, _ in node.next_functions if below is not None]


def _named(optimizers: Iterable[Optimizer]) -> list[nn.Module]:
    """Return a module made of the parameters of optimizers that were given names, for programs without modules."""
    model = nn.Module()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                _put(model, name.split("."), parameter)
    if not any(True for _ in model.parameters()):
        return []
    return [model]


def _put(model: nn.Module, path: list[str], parameter: Tensor) -> None:
    for part in path[:-1]:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    if isinstance(parameter, nn.Parameter):
        model.register_parameter(path[-1], parameter)
    else:
        model.register_parameter(path[-1], None)
        model._parameters[path[-1]] = parameter  # type: ignore[assignment] # noqa: SLF001
