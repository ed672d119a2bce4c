"""Who owns an optimizer step: wrappers, optimizers within optimizers, several optimizers, and optimizers made anew.

One step of a training may be made by several optimizers, and one optimizer may be stepped by another. ``CASES`` lists
what happens when an optimizer begins to step; the first case that applies decides. A new kind of wrapper is one more
case there, with its table of events in ``tests/agent/test_step_cases.py``.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from gradwatch.steps.state import Indices, OptimizerKey, StepRecord

FORGOTTEN_AFTER_STEPS: Final = 100
"""Steps after which an optimizer that has not stepped is no longer waited for."""


class Owner(Enum):
    """Who owns the step that an optimizer begins: an outer optimizer, the open step, the next step or a new one."""

    OUTER = "belongs to the optimizer whose step calls this one"
    NEXT = "ends the open step and opens the next one"
    OPEN = "joins the open step"
    NEW = "opens a step"


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of an optimizer's step, with everything that is known at that moment."""

    optimizer: OptimizerKey
    indices: Indices
    """Watched parameters that it steps."""
    outer: OptimizerKey | None
    """The optimizer whose step calls this one."""
    open: StepRecord | None
    waits_for_step: bool
    """Whether losses or clippings wait for a step."""
    evaluated: OptimizerKey | None
    """The optimizer that has evaluated its closure last, and made new gradients by that."""
    replaces_gone: bool
    """Whether it is new and steps what an optimizer of the open step did that is gone."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case of ownership."""

    name: str
    applies: Callable[[Beginning], bool]
    owner: Owner


def _is_made_by_outer(beginning: Beginning) -> bool:
    """Return whether the outer optimizer has begun this step, for at least these parameters and the same gradients."""
    step, outer = beginning.open, beginning.outer
    if step is None or outer is None or beginning.waits_for_step or outer == beginning.evaluated:
        return False
    return beginning.indices <= step.stepped.get(outer, frozenset())


CASES: Final = (
    Case(
        "an outer optimizer that shares the work, looks ahead or joins several (ZeRO, Lookahead, chained optimizers); "
        "not one that has evaluated its closure meanwhile (SAM), nor one that made losses or clippings since",
        _is_made_by_outer,
        Owner.OUTER,
    ),
    Case(
        "an optimizer that has stepped in the open step already",
        lambda beginning: beginning.open is not None and beginning.optimizer in beginning.open.stepped,
        Owner.NEXT,
    ),
    Case(
        "an optimizer that was made anew in place of one of the open step",
        lambda beginning: beginning.open is not None and beginning.replaces_gone,
        Owner.NEXT,
    ),
    Case("another optimizer of the open step", lambda beginning: beginning.open is not None, Owner.OPEN),
    Case("the first optimizer of a step", lambda _beginning: True, Owner.NEW),
)
"""The first case that applies decides."""


def owner_of(beginning: Beginning) -> Owner:
    """Return who owns the step that an optimizer begins."""
    return next(case.owner for case in CASES if case.applies(beginning))


class _Expected(NamedTuple):
    """The step in which an optimizer stepped last, and the parameters that it steps."""

    step: int
    indices: Indices


class ExpectedOptimizers:
    """The optimizers that usually make a step together.

    Args:
        given: the optimizers that the user named; None: they are known once the first step is over.
    """

    def __init__(self, given: Iterable[OptimizerKey] | None) -> None:
        self._expected: dict[OptimizerKey, _Expected] | None = None
        self.only: tuple[OptimizerKey, Indices] | None = None
        """The optimizer and its parameters, where one makes all steps: nothing has to be noted of it then."""
        if given is not None:
            self._set({key: _Expected(0, frozenset()) for key in given})

    def _set(self, expected: dict[OptimizerKey, _Expected]) -> None:
        self._expected = expected
        self.only = next(((key, last.indices) for key, last in expected.items()), None) if len(expected) == 1 else None

    @property
    def keys(self) -> list[OptimizerKey] | None:
        """Return the optimizers that a step waits for; None while they are not known."""
        return None if self._expected is None else list(self._expected)

    @property
    def known(self) -> bool:
        """Return whether it is known which optimizers make a step."""
        return self._expected is not None

    def is_new(self, optimizer: OptimizerKey) -> bool:
        """Return whether an optimizer is not among those that a step waits for."""
        return self._expected is None or optimizer not in self._expected

    def begun(self, optimizer: OptimizerKey, indices: Indices, step: int, gone: Set[OptimizerKey]) -> None:
        """Note that an optimizer makes a step; it replaces freed optimizers that stepped the same parameters."""
        if self._expected is None:
            return
        expected = dict(self._expected)
        if self.only is not None:
            expected = {key: last._replace(step=step) for key, last in expected.items()}  # not noted while it was alone
        if optimizer not in expected:
            expected = {
                key: last
                for key, last in expected.items()
                if key not in gone or (last.indices and last.indices.isdisjoint(indices))
            }
        expected[optimizer] = _Expected(step, indices)
        self._set(expected)

    def learn(self, stepped: Mapping[OptimizerKey, Indices], step: int) -> None:
        """Learn from the first step that is over which optimizers make a step together."""
        if self._expected is None:
            self._set({key: _Expected(step, indices) for key, indices in stepped.items()})

    def count_from(self, step: int) -> None:
        """Count the steps from ``step``."""
        if self._expected is not None:
            self._set({key: last._replace(step=step) for key, last in self._expected.items()})

    def all_stepped(self, stepped: Set[OptimizerKey]) -> bool:
        """Return whether every expected optimizer has stepped."""
        return self._expected is not None and self._expected.keys() <= stepped

    def forget_idle(self, step: int) -> None:
        """Stop waiting for optimizers that have not stepped for long."""
        if self._expected is not None:
            oldest = step - FORGOTTEN_AFTER_STEPS
            self._set({key: last for key, last in self._expected.items() if last.step > oldest})


class Adoption(Enum):
    """Whether an optimizer that the user did not name counts, although others were named."""

    WITHIN = "a named optimizer steps it: it counts too"
    REPLACES = "it was made anew in place of a named one"
    LATER = "it steps only parameters that came after the named ones were given"
    AROUND = "it steps a named one, which counts itself"
    STRANGER = "it steps watched parameters, and nobody named it: the user is told"
    OTHER = "it steps nothing that is watched"


ADOPTED: Final = frozenset({Adoption.WITHIN, Adoption.REPLACES, Adoption.LATER})
"""Optimizers that count although the user did not name them."""


class Named(NamedTuple):
    """An optimizer that the user named."""

    key: OptimizerKey
    gone: bool
    """Whether it is freed, or holds no parameter of the model any more."""
    last: Indices | None
    """Watched parameters that it was last seen to step; None: it was not seen."""


def adoption_of(
    stepped: Indices, named: Iterable[Named], *, within_named: bool, around_named: bool, found_later: bool = False
) -> tuple[Adoption, OptimizerKey | None]:
    """Return whether an optimizer that the user did not name counts, and whose place it takes.

    Args:
        stepped: watched parameters that it steps.
        named: the optimizers that the user named.
        within_named: whether a named optimizer holds it, as SAM holds its base optimizer.
        around_named: whether it holds a named optimizer.
        found_later: whether all that it steps became the model's after the named ones were given.
    """
    if within_named:
        return Adoption.WITHIN, None
    several = list(named)
    gone = [known for known in several if known.gone]
    if stepped and gone:
        # Of those that are gone it is one that stepped the same; where all are gone, any.
        alike = [known for known in gone if known.last is None or not known.last.isdisjoint(stepped)]
        if alike or len(gone) == len(several):
            return Adoption.REPLACES, (alike or gone)[0].key
    if around_named:
        return Adoption.AROUND, None
    if stepped and found_later:
        return Adoption.LATER, None
    return (Adoption.STRANGER if stepped else Adoption.OTHER), None
