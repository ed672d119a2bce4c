"""The watched parameters that one optimizer steps, or that one list holds, and the one pass that measures them."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from operator import is_not
from typing import Final, cast

import torch
from torch import Tensor

from gradwatch.hooks.weak_tensors import deaths, weak
from gradwatch.model.discovery import ParameterInfo
from gradwatch.model.readability import culprits
from gradwatch.norms.buffers import SampleBuffers, UnitNorms
from gradwatch.norms.layout import MeasurementPlan
from gradwatch.norms.tensor_spec import local_part

_LISTS: Final = 4096
"""Lists that are remembered: a loop may clip several, even each parameter by itself, at every step."""
_PROBES: Final = 16
"""Parameters of a long list by which it is recognised between two full checks."""
_CHECKED_EVERY: Final = 64
"""Uses after which a list is checked parameter by parameter."""
_PLANS: Final = 8
"""Plans kept for an optimizer: one for each set of parameters that had gradients together."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Unit norms of the gradients and their weights of one pass, written to buffers."""

    norms: UnitNorms
    members: Sequence[Tensor]
    """The weights; of a sharded one this rank's part."""
    grads: Sequence[Tensor]
    """Their gradients."""

    @property
    def plan(self) -> MeasurementPlan:
        """Return the measurement plan of the parameters."""
        return self.norms.plan


class OptimizerParameters:
    """The watched parameters of one optimizer, or of one list. None of them is kept alive.

    Args:
        groups: parameters as they are listed, by group.
        find: gives the index of a watched parameter, None for any other.
        watched: all parameters of the run.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        find: Callable[[Tensor], int | None],
        watched: Sequence[ParameterInfo] = (),
    ) -> None:
        known = [
            (index, parameter, place)
            for place, group in enumerate(groups)
            for parameter in group
            if (index := find(parameter)) is not None
        ]
        self.indices = [index for index, _, _ in known]
        self.index_set = frozenset(self.indices)
        self.unreadable = {i: watched[i].unreadable for i in self.indices if watched and watched[i].unreadable}
        """Why some of them cannot be measured, by index."""
        self.repeated = {index: times for index, times in Counter(self.indices).items() if times > 1}
        """How often each is listed that is listed more than once: a clipping by norm scales it each time."""
        self._listed = [weak(parameter) for group in groups for parameter in group]
        self._parameters = [weak(parameter) for _, parameter, _ in known]
        self.deaths = deaths.count
        """Number of dead tensors when all that were listed were last seen to be there."""
        self.group_of = {index: place for index, _, place in known}
        """Place of each parameter's group, by index."""
        self.sharded = any(hasattr(parameter, "to_local") for _, parameter, _ in known)
        self.has_float16 = any(parameter.dtype == torch.float16 for _, parameter, _ in known)
        """Whether a gradient loses what is small when it is scaled down."""
        self._plans: OrderedDict[bytes, MeasurementPlan] = OrderedDict()
        self.signature: list[int] = []
        """Of the groups, or of the list: what differs where they were changed."""
        self.uses = 0
        """How often the list was found again."""
        self.misses = 0
        """Comparisons of the list's gradients with the watched ones in a row that were in vain."""
        self.skips = 0
        """Clippings of the list that follow and are not compared: each comparison looks at all watched gradients."""
        self.next_part = 0
        """Of the weights: the one whose change is measured next."""
        self.update_credit = 0
        """Elements that may be copied for it."""

    @property
    def parameters(self) -> list[Tensor]:
        """Return the parameters. Their optimizer or their list must still exist."""
        return cast("list[Tensor]", [parameter.reference() for parameter in self._parameters])

    @property
    def whole(self) -> bool:
        """Return whether all listed parameters still exist: the id of a freed one may belong to another by now."""
        now = deaths.count
        if self.deaths != now:
            if any(parameter.reference() is None for parameter in self._listed):
                return False
            self.deaths = now
        return True

    def measure(self, buffers: SampleBuffers, watched: Sequence[ParameterInfo]) -> Pass | None:
        """Write unit norms to ``buffers``; return None if there is no gradient.

        Args:
            buffers: take the norms, and grow where needed.
            watched: all parameters of the run.
        """
        parameters = self.parameters
        grads = [parameter.grad for parameter in parameters]
        if self.unreadable:
            grads = [
                None if index in self.unreadable else grad for index, grad in zip(self.indices, grads, strict=True)
            ]
        present = bytes(map(is_not, grads, repeat(None)))
        members = list(compress(parameters, present))
        there = [grad for grad in grads if grad is not None]
        if not there:
            return None
        with torch.no_grad():
            if self.sharded:
                members, there = [local_part(member) for member in members], [local_part(grad) for grad in there]
            norms = self._written(buffers, present, members, there, watched)
        # What has become unreadable is left out from now on, and costs the others nothing.
        return self.measure(buffers, watched) if norms is None else Pass(norms, members, there)

    def _written(
        self,
        buffers: SampleBuffers,
        present: bytes,
        members: Sequence[Tensor],
        grads: Sequence[Tensor],
        watched: Sequence[ParameterInfo],
    ) -> UnitNorms | None:
        """Write the unit norms of some parameters; return None if one has turned out to be unreadable.

        Raises:
            RuntimeError: the norms cannot be written, and it is no single parameter's fault.
        """
        for attempt in range(2):
            try:
                norms = buffers.allocate(self._plan(present, members, grads, watched))
                norms.measure(grads, members)
            except Exception:  # a gradient may be of any type by now, and so may the error
                # A gradient has become sparse, or changed its type or device: plan anew, once.
                self._plans.clear()
                if attempt and not self._note_unreadable(present, members, grads, watched):
                    raise
            else:
                return norms
        return None

    def _note_unreadable(
        self, present: bytes, members: Sequence[Tensor], grads: Sequence[Tensor], watched: Sequence[ParameterInfo]
    ) -> bool:
        """Find the parameters that cannot be measured; return whether there are any."""
        indices = list(compress(self.indices, present))
        axes = [(watched[index].axis, watched[index].groups) for index in indices]
        found = culprits(grads, axes) | culprits(members, axes)
        self.unreadable |= {indices[position]: reason for position, reason in found.items()}
        return bool(found)

    def _plan(
        self, present: bytes, members: Sequence[Tensor], grads: Sequence[Tensor], watched: Sequence[ParameterInfo]
    ) -> MeasurementPlan:
        plan = self._plans.get(present)
        if plan is not None:
            return plan
        indices = [index for index, there in zip(self.indices, present, strict=True) if there]
        known = [watched[index] for index in indices]
        plan = MeasurementPlan(
            indices,
            [entry.spec(grad) for entry, grad in zip(known, grads, strict=True)],
            [entry.spec(member) for entry, member in zip(known, members, strict=True)],
        )
        self._plans[present] = plan
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return plan


class ListedParameters:
    """The lists of parameters that were clipped lately.

    Args:
        look_up: finds the watched parameters of a list.
    """

    def __init__(self, look_up: Callable[[Sequence[Tensor]], OptimizerParameters]) -> None:
        self._look_up = look_up
        self._known: OrderedDict[tuple[int, ...], OptimizerParameters] = OrderedDict()
        """By the length and some of the ids."""

    def find(self, parameters: Sequence[Tensor], *, exact: bool = True) -> OptimizerParameters:
        """Return the watched parameters of a list; the same object for the same parameters in the same order.

        Args:
            parameters: the list.
            exact: compare every parameter. Otherwise a long list is recognised by some of them, most of the time.
        """
        count = len(parameters)
        key = (count, *map(id, parameters[:: count // _PROBES + 1]))
        known = self._known.get(key)
        if known is not None and known.deaths == deaths.count:
            known.uses += 1
            if count < _PROBES or not (exact or known.uses % _CHECKED_EVERY == 0):
                return known
            if known.signature == list(map(id, parameters)):
                return known
        elif known is not None and known.whole and known.signature == list(map(id, parameters)):
            return known
        known = self._known[key] = self._look_up(parameters)
        known.signature = list(map(id, parameters))
        if len(self._known) > _LISTS:
            self._known.popitem(last=False)
        return known

    def clear(self) -> None:
        """Forget all lists: the watched parameters have changed."""
        self._known.clear()
