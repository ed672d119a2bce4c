"""Which optimizers step what is watched, and which of them make one step of the training together."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Final, NamedTuple, cast

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.clipping.classifier import ClassifierFinder
from gradwatch.model.registry import ParameterRegistry
from gradwatch.recording.optimizer_parameters import Binding, Lists

_UNSTEPPED: Final = 200
"""Backward passes after which it is said that no optimizer has stepped what is watched yet."""
_UNSTEPPED_BESIDE_OTHERS: Final = 20
"""The same where other optimizers have stepped as often."""
_FORGOTTEN_AFTER: Final = 100
"""Steps after which one that has not stepped is no longer waited for."""


def unwrapped(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer] | None:
    """Return the optimizers that step, out of what a user hands over; None where that is None.

    Raises:
        TypeError: something is no optimizer.
    """
    if given is None:
        return None
    one = isinstance(given, Optimizer) or hasattr(given, "param_groups") or not isinstance(given, Iterable)
    several: list[Any] = [given] if one else list(cast("Iterable[Any]", given))
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


class _Expected(NamedTuple):
    """When one that makes a round was last seen, and what it steps; nothing while it has not stepped."""

    step: int
    indices: frozenset[int]


class Optimizers:
    """The optimizers of a training. None of them is kept alive.

    Args:
        given: those that the user named; None: every one that steps what is watched.
        parameters: what is watched.
        classifier: searched for again when the parameters of one have changed.
        renew: called before a binding is made, with whether parameters are listed that are not known.
        clips: whether AGC clips what they step.
        warn: says something once.
    """

    def __init__(
        self,
        given: Sequence[Optimizer] | None,
        parameters: ParameterRegistry,
        classifier: ClassifierFinder,
        renew: Callable[[bool], None],
        *,
        clips: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._given = None if given is None else [weakref.ref(optimizer) for optimizer in given]
        self._held: dict[weakref.ref[Optimizer], frozenset[int | None]] = {}
        """What each of them was last seen to step."""
        self._parameters = parameters
        self._classifier = classifier
        self._renew = renew
        self._clips = clips
        self._warn = warn
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those that were not given."""
        self._bindings: weakref.WeakKeyDictionary[Optimizer, Binding] = weakref.WeakKeyDictionary()
        self._lists = Lists(self._bind_list)
        self._expected: dict[weakref.ref[Optimizer], _Expected] | None = None
        """Those that make a round; None: not known yet."""
        if given is not None:
            self._expected = {weakref.ref(optimizer): _Expected(0, frozenset()) for optimizer in given}
        self._places: dict[weakref.ref[Optimizer], list[int]] = {}
        """Of the parameter groups of each, among those of all."""
        for optimizer in given or ():
            self.places(optimizer)
        self._unstepped: int | None = 0
        """Backward passes that made gradients before anything watched was stepped; None: something was."""
        self._steps_of_others = 0

    @property
    def given(self) -> list[Optimizer]:
        """Return those of the given ones that are still there."""
        return [optimizer for known in self._given or () if (optimizer := known()) is not None]

    @property
    def stepped_indices(self) -> frozenset[int]:
        """Return the indices of the parameters of those that have stepped so far."""
        return frozenset().union(*(binding.index_set for binding in self._bindings.values()))

    @property
    def all_indices(self) -> frozenset[int]:
        """Return the indices of the parameters that any steps; of all while it is not known which do."""
        if self._expected is None:
            return frozenset(range(len(self._parameters.watched)))
        bindings = map(self.binding, self.given or list(self._bindings))
        return frozenset().union(*(binding.index_set for binding in bindings if binding is not None))

    def are_unscaled(self, binding: Binding, scaler: Any) -> bool:
        """Return whether a loss scaler has unscaled the gradients of an optimizer that steps one of ``binding``."""
        states = getattr(scaler, "_per_optimizer_states", {})
        mine = (known for known, bound in self._bindings.items() if not bound.index_set.isdisjoint(binding.index_set))
        stages = (states[id(known)]["stage"].name for known in mine if id(known) in states)
        return any(stage != "READY" for stage in stages)

    def places(self, optimizer: Optimizer) -> list[int]:
        """Return the places of an optimizer's parameter groups among those of all; they stay what they are."""
        places = self._places.setdefault(weakref.ref(optimizer), [])
        missing = len(optimizer.param_groups) - len(places)
        if missing > 0:
            self._places = {known: taken for known, taken in self._places.items() if known() is not None}
            taken = frozenset(itertools.chain.from_iterable(self._places.values()))
            places += itertools.islice(itertools.filterfalse(taken.__contains__, itertools.count()), missing)
        return places

    def check(self) -> None:
        """Say which of the given ones steps nothing that is watched: it holds copies, or another model's parameters.

        Raises:
            ValueError: it was to be clipped.
        """
        for optimizer in self.given:
            if self._steps_ours(optimizer):
                continue
            text = f"{type(optimizer).__name__} steps no parameter of the model that was given to attach()"
            if self._clips:
                raise ValueError(f"{text}: nothing would be clipped. Give the model whose parameters it holds")
            self._warn(f"{text}: nothing of it is measured")

    def binding(self, optimizer: Optimizer) -> Binding | None:
        """Return what is known of one; None where it steps nothing that is watched."""
        if optimizer in self._strangers:
            return None
        given = self._given is None or any(known() is optimizer for known in self._given)
        if not given and not self._adopts(optimizer):
            return None
        binding = self._bindings.get(optimizer)
        groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
        signature = tuple(value for group in groups for value in (len(group), sum(map(id, group))))
        if binding is None or not binding.whole or binding.signature != signature:
            binding = self._bind(optimizer, groups, binding)
            binding.signature = signature
        return binding if binding.indices else None

    def _bind(self, optimizer: Optimizer, groups: Sequence[Sequence[Tensor]], old: Binding | None) -> Binding:
        find = self._parameters.find
        self._renew(any(find(parameter) is None for group in groups for parameter in group))
        binding = self._bindings[optimizer] = Binding(groups, find)
        if self._given is not None:
            self._held[weakref.ref(optimizer)] = binding.index_set
        self._classifier.search_again()
        others = sum(map(len, groups)) - len(binding.indices)
        if self._clips and binding.indices and others:
            self._warn(f"{others} parameters of {type(optimizer).__name__} belong to no watched module: not clipped")
        if old is not None:
            binding.steps, binding.steps_at_scaler = old.steps, old.steps_at_scaler
        return binding

    def binding_of_list(self, parameters: Sequence[Tensor]) -> Binding:
        """Return what is known of a list of parameters."""
        return self._lists.binding(parameters)

    def _bind_list(self, parameters: Sequence[Tensor]) -> Binding:
        """Return what is known of a list; one that holds nothing of ours is another model's, and may come often."""
        unknown = sum(self._parameters.find(parameter) is None for parameter in parameters)
        self._renew(0 < unknown < len(parameters))
        return Binding([parameters], self._parameters.find)

    def forget_lists(self) -> None:
        """Forget what is known of lists: which parameters are watched has changed."""
        self._lists.clear()

    def _steps_ours(self, optimizer: Optimizer) -> bool:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return any(self._parameters.find(parameter) is not None for parameter in parameters)

    def _adopts(self, optimizer: Optimizer) -> bool:
        """Take an optimizer for one of those that were given, if that is gone: it was made anew.

        It is one whose parameters this steps; where all are gone, any. What one of them steps by itself, as SAM its
        base, is taken, too. Any other optimizer that steps watched parameters is told of, once, unless what it steps is
        one of them.
        """
        if self._given is not None and any(_has(given, optimizer) for given in self.given):
            self._given.append(weakref.ref(optimizer))
            return True
        stepped = {
            self._parameters.find(parameter) for group in optimizer.param_groups for parameter in group["params"]
        }
        ours = bool(stepped - {None})
        if ours and self._given is not None:
            gone = [known for known in self._given if known() is None]
            alike = [known for known in gone if not self._held.get(known, frozenset(stepped)).isdisjoint(stepped)]
            if gone and (alike or not self.given):
                replaced = (alike or gone)[0]
                self._held.pop(replaced, None)
                self._given[self._given.index(replaced)] = weakref.ref(optimizer)
                return True
        self._strangers.add(optimizer)
        if ours and not any(_has(optimizer, given) for given in self.given):
            self._warn(
                f"{type(optimizer).__name__} steps watched parameters, but was not given to attach(): it is not "
                + ("clipped or measured" if self._clips else "measured")
            )
        return False

    def have_stepped(self, index: int, stepped: Set[weakref.ref[Optimizer]]) -> bool:
        """Return whether one of ``stepped`` steps a parameter."""
        return any(
            index in binding.index_set and weakref.ref(known) in stepped for known, binding in self._bindings.items()
        )

    def takes_over(self, optimizer: Optimizer, stepped: Mapping[weakref.ref[Optimizer], frozenset[int]]) -> bool:
        """Return whether one is new, and steps what one of ``stepped`` did that is gone: it was made anew."""
        if self._expected is not None and weakref.ref(optimizer) in self._expected:
            return False
        gone = [indices for known, indices in stepped.items() if known() is None]
        return bool(gone) and not self._bindings[optimizer].index_set.isdisjoint(frozenset().union(*gone))

    def enter(self, optimizer: Optimizer, step: int) -> None:
        """Note that one makes a step, or was kept from it by a loss scaler. It is waited for in place of its like."""
        self._unstepped = None
        if self._expected is None:
            return
        entered, indices = weakref.ref(optimizer), self._bindings[optimizer].index_set
        if entered not in self._expected:
            self._expected = {
                known: last
                for known, last in self._expected.items()
                if known() is not None or (last.indices and last.indices.isdisjoint(indices))
            }
        self._expected[entered] = _Expected(step, indices)

    def settle(self, stepped: Mapping[weakref.ref[Optimizer], frozenset[int]], step: int) -> None:
        """Learn from a step that is over which make a step together, where that is not known."""
        if self._expected is None:
            self._expected = {known: _Expected(step, indices) for known, indices in stepped.items()}

    def start_at(self, step: int) -> None:
        """Count from ``step``."""
        if self._expected is not None:
            self._expected = {known: last._replace(step=step) for known, last in self._expected.items()}

    def have_all(self, stepped: Set[weakref.ref[Optimizer]]) -> bool:
        """Return whether every one has stepped that usually does."""
        return self._expected is not None and self._expected.keys() <= stepped

    def forget_idle(self, step: int) -> None:
        """Wait no longer for those that have not stepped for long."""
        if self._expected is not None:
            oldest = step - _FORGOTTEN_AFTER
            self._expected = {known: last for known, last in self._expected.items() if last.step > oldest}

    def note_stranger(self) -> None:
        """Note that one steps which steps nothing that is watched."""
        self._steps_of_others += 1

    def note_backward(self) -> int | None:
        """Count a backward pass; return how many there were where none of them was followed by a step, once."""
        if self._unstepped is None:
            return None
        self._unstepped += 1
        if self._unstepped < _UNSTEPPED and min(self._unstepped, self._steps_of_others) < _UNSTEPPED_BESIDE_OTHERS:
            return None
        passes, self._unstepped = self._unstepped, None
        return passes


def _has(outer: Optimizer, inner: Optimizer) -> bool:
    return any(one is inner for one in _inner(outer))


def has_inner(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has others that it may step."""
    return any(True for _ in _inner(optimizer))


def _inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the optimizers that are attributes of one, or in a list or the like that is."""
    for value in vars(optimizer).values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Optimizer):
                yield one
