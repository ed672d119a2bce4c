"""What is known of the parameters that one optimizer steps, and the one pass over them and their gradients."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gradwatch.buffers import Claim, Plan, Slot
from gradwatch.layout import LayoutChangedError
from gradwatch.model import Watched, local

_PLANS: Final = 8
"""Plans kept for an optimizer: one for each set of parameters that had gradients together."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Unit norms of the gradients that are there, and of their weights, written to a slot."""

    claim: Claim
    members: Sequence[Tensor]
    """The weights; of a sharded one this rank's part."""
    grads: Sequence[Tensor]
    """Their gradients."""

    @property
    def plan(self) -> Plan:
        """Return which parameters they are, and how their norms are read."""
        return self.claim.plan


class Binding:
    """The watched parameters of one optimizer, or of one list.

    Args:
        groups: parameters as they are listed, by group.
        find: gives the index of a watched parameter, None for any other.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], find: Callable[[Tensor], int | None]) -> None:
        self._all = [parameter for group in groups for parameter in group]
        known = [
            (index, parameter, place)
            for place, group in enumerate(groups)
            for parameter in group
            if (index := find(parameter)) is not None
        ]
        self.indices = [index for index, _, _ in known]
        self.index_set = frozenset(self.indices)
        self.parameters = [parameter for _, parameter, _ in known]
        self.group_of = {index: place for index, _, place in known}
        """Place of each parameter's group, by index."""
        self.sharded = any(hasattr(parameter, "to_local") for parameter in self.parameters)
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()
        self.signature: tuple[int, ...] = ()
        """Of the groups: what differs where they were changed."""
        self.steps = 0
        self.steps_at_scaler = 0
        self.next_part = 0
        """Of the weights: the one whose change is measured next."""
        self.update_credit = 0
        """Elements that may be copied for it."""

    def same(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether it was made for exactly these tensors."""
        return len(parameters) == len(self._all) and all(a is b for a, b in zip(parameters, self._all, strict=True))

    def measure(self, slot: Slot, watched: Sequence[Watched]) -> Pass | None:
        """Write unit norms to ``slot``; return None where there is no gradient.

        Args:
            slot: has room, or makes it.
            watched: all parameters of the run.
        """
        grads = [parameter.grad for parameter in self.parameters]
        present = bytes(grad is not None for grad in grads)
        members = [parameter for parameter, grad in zip(self.parameters, grads, strict=True) if grad is not None]
        there = [grad for grad in grads if grad is not None]
        if not there:
            return None
        with torch.no_grad():
            if self.sharded:
                members, there = [local(member) for member in members], [local(grad) for grad in there]
            for attempt in range(2):
                claim = slot.claim(self._plan(present, members, there, watched))
                assert claim.grads is not None
                try:
                    claim.grads.run(there)
                    claim.weights.run(members)
                    break
                except (LayoutChangedError, RuntimeError):
                    # A gradient has become sparse, or changed its type or device: plan anew, once.
                    self._plans.clear()
                    if attempt:
                        raise
        return Pass(claim, members, there)

    def _plan(
        self, present: bytes, members: Sequence[Tensor], grads: Sequence[Tensor], watched: Sequence[Watched]
    ) -> Plan:
        plan = self._plans.get(present)
        if plan is not None:
            return plan
        indices = [index for index, there in zip(self.indices, present, strict=True) if there]
        known = [watched[index] for index in indices]
        plan = Plan(
            indices,
            [entry.spec(grad) for entry, grad in zip(known, grads, strict=True)],
            [entry.spec(member) for entry, member in zip(known, members, strict=True)],
        )
        self._plans[present] = plan
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return plan
