"""The optimizers of a training: which of them count, which parameters each steps, and their keys in step records.

This module only finds the optimizers; ``gradwatch.steps.ownership`` decides which of them owns a step.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, cast

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.hooks.weak_tensors import deaths
from gradwatch.model.registry import ParameterRegistry
from gradwatch.recording.optimizer_parameters import ListedParameters, OptimizerParameters
from gradwatch.steps.ownership import ADOPTED, Adoption, Named, adoption_of

_PROBES: Final = 16
"""Groups of an optimizer by which it is recognised between two full checks."""
_CHECKED_EVERY: Final = 64
"""Uses after which an optimizer is checked parameter by parameter."""


def unwrapped(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer] | None:
    """Return the user's optimizers without the wrappers of Accelerate and Lightning; None for None.

    Raises:
        TypeError: an item is not an optimizer.
    """
    if given is None:
        return None
    one = isinstance(given, Optimizer) or hasattr(given, "param_groups") or not isinstance(given, Iterable)
    several: list[Any] = [given] if one else list(cast("Iterable[Any]", given))
    inner = []
    for optimizer in several:
        # Accelerate and Lightning hand out wrappers; the optimizer inside is the one that steps.
        while (wrapped := _wrapped(optimizer)) is not None:
            optimizer = wrapped
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, several of them or None, not {optimizer!r:.80}"
            )
        inner.append(optimizer)
    return inner


def _wrapped(optimizer: Any) -> Optimizer | None:
    """Return the optimizer that a wrapper holds, and steps; None of an optimizer itself."""
    # SAM and Lookahead are optimizers that step themselves, and hold another one under these names, too.
    others = () if isinstance(optimizer, Optimizer) else ("base", "base_optimizer")
    held = (getattr(optimizer, name, None) for name in ("optimizer", "_optimizer", *others))
    return next((one for one in held if isinstance(one, Optimizer)), None)


class KnownOptimizer:
    """An optimizer that was seen. It is not kept alive."""

    __slots__ = ("counts", "key", "last", "outline", "parameters", "places", "reference", "refusal", "uses_left")

    def __init__(self, key: int, reference: "weakref.ref[Optimizer]", *, counts: bool) -> None:
        self.key = key
        self.reference = reference
        self.counts = counts
        """Whether its steps are steps of the training."""
        self.parameters = OptimizerParameters([], lambda _tensor: None)
        self.last: frozenset[int] | None = None
        """Watched parameters that it was last seen to step; None: it was not seen to step."""
        self.refusal = ""
        """Why its steps do not count, where that must still be raised."""
        self.outline: list[int] = []
        """Identity and length of the lists of its groups, when it was last checked."""
        self.uses_left = 0
        """Uses until it is checked again."""
        self.places: list[int] = []
        """Places of its parameter groups among those of all optimizers; they stay what they are."""


class WatchedOptimizers:
    """The optimizers of a training.

    Args:
        named: those that the user named; None: every one that steps watched parameters counts.
        parameters: the watched parameters.
        renew: called before the parameters of an optimizer are looked up, and told whether some of them are not known.
        changed: called after the parameters of an optimizer were looked up.
        clips: whether AGC clips their gradients.
        warn: tells the user something once.
        refused: tells the user that an optimizer of watched parameters does not count.
    """

    def __init__(
        self,
        named: Sequence[Optimizer] | None,
        parameters: ParameterRegistry,
        renew: Callable[[bool], None],
        changed: Callable[[], None],
        *,
        clips: bool,
        warn: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> None:
        self._parameters = parameters
        self._renew = renew
        self._changed = changed
        self._clips = clips
        self._warn = warn
        self._refused = refused
        self._known: dict[int, KnownOptimizer] = {}
        """By the id of the optimizer, which may be gone, and its id another's by now."""
        self.counts_strangers = True
        """Whether it is counted how often optimizers step that step nothing watched."""
        self.gone: deque[int] = deque()
        """Keys of optimizers that are gone since this was last asked."""
        self._keys: Final = itertools.count(1)
        self.lists = ListedParameters(self._look_up_list)
        self._named: list[KnownOptimizer] | None = None
        if named is not None:
            self._named = [self._register(optimizer, counts=True) for optimizer in named]
            for optimizer in named:
                self.places(optimizer)

    @property
    def named_keys(self) -> list[int] | None:
        """Return the keys of the optimizers that the user named; None where every one counts."""
        return None if self._named is None else [known.key for known in self._named]

    @property
    def named(self) -> list[Optimizer]:
        """Return the named optimizers that still exist."""
        return [optimizer for known in self._named or () if (optimizer := known.reference()) is not None]

    @property
    def stepped_indices(self) -> frozenset[int]:
        """Return the watched parameters of the optimizers that are known so far."""
        return frozenset().union(*(known.parameters.index_set for known in self._alive()))

    @property
    def held_indices(self) -> frozenset[int]:
        """Return the watched parameters of all optimizers that were met, whether their steps count or not."""
        met = (known.reference() for known in list(self._known.values()))
        return frozenset().union(*(self._watched_of(optimizer) for optimizer in met if optimizer is not None))

    @property
    def trained_indices(self) -> frozenset[int]:
        """Return the watched parameters that are now in the groups of an optimizer that counts."""
        several = self.named or [optimizer for known in self._alive() if (optimizer := known.reference()) is not None]
        found = (self.find(optimizer) for optimizer in several)
        return frozenset().union(*(known.parameters.index_set for known in found if known is not None))

    def _alive(self) -> list[KnownOptimizer]:
        return [known for known in list(self._known.values()) if known.reference() is not None]

    def take_gone(self) -> Iterator[int]:
        """Yield the keys of the optimizers that were freed since the last call."""
        while self.gone:
            key = self.gone.popleft()
            self._known = {place: known for place, known in list(self._known.items()) if known.key != key}
            yield key

    def find(self, optimizer: Optimizer, *, exact: bool = True) -> KnownOptimizer | None:
        """Return an optimizer with its watched parameters; None if it does not count, or steps nothing watched.

        Args:
            optimizer: the optimizer.
            exact: compare every parameter of its groups with what was known. Otherwise most calls look at their lists.
        """
        known = self._known.get(id(optimizer))
        if known is None or known.reference() is not optimizer:
            known = self._meet(optimizer)
        if not known.counts:
            return None
        parameters, groups = known.parameters, optimizer.param_groups
        if not exact and _looks_same(known, groups):
            return known if parameters.indices else None
        signature = []
        for group in groups:
            signature.append(len(group["params"]))
            signature.append(sum(map(id, group["params"])))
        if parameters.signature != signature or (parameters.deaths != deaths.count and not parameters.whole):
            parameters = self._look_up(optimizer, known)
            parameters.signature = signature
        known.outline, known.uses_left = _outline(groups), _CHECKED_EVERY
        return known if parameters.indices else None

    def is_stranger(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer is known to step nothing that is watched, and its steps are not counted."""
        if self.counts_strangers:
            return False
        known = self._known.get(id(optimizer))
        if known is None or known.reference() is not optimizer or known.parameters.indices or known.refusal:
            return False
        groups = optimizer.param_groups
        if not known.counts or len(groups) != 1:
            return not known.counts or _looks_same(known, groups)
        known.uses_left -= (
            1  # as _looks_same has it: every step of a stranger comes here, and a call costs as much again
        )
        listed = groups[0]["params"]
        same = known.outline == [1, id(listed), len(listed)]
        return same and known.uses_left >= 0 and known.parameters.deaths == deaths.count

    def known(self, optimizer: Optimizer) -> KnownOptimizer | None:
        """Return an optimizer as ``find`` last returned it; None if it does not count."""
        known = self._known.get(id(optimizer))
        return known if known is not None and known.counts and known.reference() is optimizer else None

    def _register(self, optimizer: Optimizer, *, counts: bool) -> KnownOptimizer:
        key, gone = next(self._keys), self.gone
        reference = weakref.ref(optimizer, lambda _reference: gone.append(key))
        known = self._known[id(optimizer)] = KnownOptimizer(key, reference, counts=counts)
        return known

    def _meet(self, optimizer: Optimizer) -> KnownOptimizer:
        """Decide whether an optimizer that was not seen before counts."""
        if self._named is None:
            return self._register(optimizer, counts=True)
        # Its parameters may have become the model's after the last search: a new head, adapters, assigned weights.
        self._renew(any(self._parameters.find(tensor) is None for tensor in _tensors_of(optimizer)))
        within = any(_holds(named, optimizer) for named in self.named)
        around = not within and any(_holds(optimizer, named) for named in self.named)
        stepped = self._watched_of(optimizer)
        named = [self._as_named(known) for known in self._named]
        adoption, replaced = adoption_of(
            stepped, named, within_named=within, around_named=around, found_later=stepped <= self._parameters.later
        )
        known = self._register(optimizer, counts=adoption in ADOPTED)
        if adoption is Adoption.REPLACES and replaced is not None:
            self._named = [known if other.key == replaced else other for other in self._named]
            self.gone.append(replaced)
        elif known.counts:
            self._named.append(known)
        elif adoption is Adoption.STRANGER:
            self._refuse(known, optimizer, stepped)
        return known

    def _watched_of(self, optimizer: Optimizer) -> frozenset[int]:
        found = (self._parameters.find(tensor) for tensor in _tensors_of(optimizer))
        return frozenset(index for index in found if index is not None)

    def _as_named(self, known: KnownOptimizer) -> Named:
        """Describe a named optimizer; one whose parameters have all left the model is gone, whoever still holds it."""
        optimizer = known.reference()
        left = optimizer is not None and bool(known.last) and not self._watched_of(optimizer)
        return Named(known.key, optimizer is None or left, known.last)

    def _refuse(self, known: KnownOptimizer, optimizer: Optimizer, stepped: frozenset[int]) -> None:
        """Tell the user that an optimizer does not count; if gradients are clipped, its next step raises that."""
        name = self._parameters.watched[min(stepped)].name
        text = (
            f"{type(optimizer).__name__} steps watched parameters ({name}"
            + (f" and {len(stepped) - 1} more" if len(stepped) > 1 else "")
            + "), but was not given to attach(): it is not "
            + ("clipped or measured" if self._clips else "measured")
            + ". Give attach() every optimizer of the model, or none (optimizer=None)"
        )
        known.refusal = text if self._clips else ""
        self._refused(text)

    def raise_refusal(self, optimizer: Optimizer) -> None:
        """Raise, once, that an optimizer of watched parameters steps unclipped.

        Raises:
            RuntimeError: the optimizer was refused.
        """
        known = self._known.get(id(optimizer))
        if known is not None and known.refusal and known.reference() is optimizer:
            text, known.refusal = known.refusal, ""
            raise RuntimeError(text)

    def _look_up(self, optimizer: Optimizer, known: KnownOptimizer) -> OptimizerParameters:
        groups = [group["params"] for group in optimizer.param_groups]
        find = self._parameters.find
        self._renew(any(find(parameter) is None for group in groups for parameter in group))
        parameters = known.parameters = OptimizerParameters(groups, find, self._parameters.watched)
        known.last = parameters.index_set
        self._changed()
        others = sum(map(len, groups)) - len(parameters.indices)
        if self._clips and parameters.indices and others:
            self._warn(f"{others} parameters of {type(optimizer).__name__} belong to no watched module: not clipped")
        return parameters

    def _look_up_list(self, parameters: Sequence[Tensor]) -> OptimizerParameters:
        # A list that holds nothing watched is another model's, and may come often.
        unknown = sum(self._parameters.find(parameter) is None for parameter in parameters)
        self._renew(0 < unknown < len(parameters))
        return OptimizerParameters([parameters], self._parameters.find, self._parameters.watched)

    def forget_lists(self) -> None:
        """Forget the lists that were clipped: the watched parameters have changed."""
        self.lists.clear()

    def places(self, optimizer: Optimizer) -> list[int]:
        """Return the places of an optimizer's parameter groups among those of all optimizers."""
        known = self._known[id(optimizer)]
        missing = len(optimizer.param_groups) - len(known.places)
        if missing > 0:
            taken = {place for other in self._alive() for place in other.places}
            known.places += itertools.islice(itertools.filterfalse(taken.__contains__, itertools.count()), missing)
        return known.places

    def check_named(self) -> None:
        """Warn of each named optimizer that steps nothing watched: it holds copies, or another model's parameters.

        Raises:
            ValueError: there is such an optimizer, and AGC is on.
        """
        for optimizer in self.named:
            if self._watched_of(optimizer):
                continue
            text = f"{type(optimizer).__name__} steps no parameter of the model that was given to attach()"
            if self._clips:
                raise ValueError(f"{text}: nothing would be clipped. Give the model whose parameters it holds")
            self._warn(f"{text}: nothing of it is measured")

    def are_unscaled(self, parameters: OptimizerParameters, scaler: Any) -> bool:
        """Return whether a loss scaler has unscaled the gradients of an optimizer that steps one of ``parameters``."""
        states = getattr(scaler, "_per_optimizer_states", {})
        unscaled = {key for key, state in states.items() if state["stage"].name != "READY"}
        for known in self._alive() if unscaled else ():
            optimizer = known.reference()
            if optimizer is None or id(optimizer) not in unscaled:
                continue
            unscaled.remove(id(optimizer))
            if not (known.parameters.index_set or self._watched_of(optimizer)).isdisjoint(parameters.index_set):
                return True
        return bool(unscaled)  # one that was not met yet: this is its first step


def _tensors_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters in the groups of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _looks_same(known: KnownOptimizer, groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether an optimizer's groups look as they did at the last full check, which was not long ago."""
    if known.parameters.deaths != deaths.count or known.uses_left <= 0 or len(groups) != known.outline[0]:
        return False
    known.uses_left -= 1
    if len(groups) > 1:
        return known.outline == _outline(groups)
    listed = groups[0]["params"]
    return known.outline[1] == id(listed) and known.outline[2] == len(listed)


def _outline(groups: Sequence[dict[str, Any]]) -> list[int]:
    """Return the number of groups, and the identity and length of the lists of the first groups."""
    outline = [len(groups)]
    for group in groups if len(groups) <= _PROBES else groups[:_PROBES]:
        listed = group["params"]
        outline.append(id(listed))
        outline.append(len(listed))
    return outline


def _holds(outer: Optimizer, inner: Optimizer) -> bool:
    return any(one is inner for one in _held_by(outer))


def holds_optimizers(optimizer: Optimizer) -> bool:
    """Return whether an optimizer holds others, which it may step."""
    return any(True for _ in _held_by(optimizer))


def _held_by(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the optimizers that are attributes of one, or in a list or tuple that is."""
    for value in vars(optimizer).values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Optimizer):
                yield one
