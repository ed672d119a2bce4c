"""The search for where a number that is not finite began: in the graph of its loss, or with hooks for some steps."""

import time
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gradwatch import wire
from gradwatch.model.discovery import is_compiled
from gradwatch.model.registry import ParameterRegistry
from gradwatch.norms.scalars import is_finite
from gradwatch.rounds import Round
from gradwatch.samples import origin as provenance

_EVERY: Final = 100
"""Steps between two searches."""
_HOOKED_STEPS: Final = 3
"""Steps for which hooks look for it."""


class Search:
    """Looks for the module out of which the first bad number came.

    Args:
        parameters: what is watched.
    """

    def __init__(self, parameters: ParameterRegistry) -> None:
        self._parameters = parameters
        self._from = 0
        """Step from which it is searched again."""
        self._hooks: provenance.Hooks | None = None
        self._hooks_left = 0
        self._hooks_wanted = False

    def in_graph(self, losses: Sequence[Tensor], originals: Sequence[Tensor], step: int) -> wire.Event | None:
        """Search the graph of losses that are not finite; where it does not tell, hooks watch the next steps.

        Args:
            losses: of one element each, about to be differentiated; at least one of them is not finite.
            originals: what those were that a loss scaler has multiplied.
            step: made so far.
        """
        if step < self._from:
            return None
        if originals and all(map(is_finite, originals)):
            return None  # the loss scaler is too large, and will see to it
        self._from = step + _EVERY
        modules: dict[int, str] = {}
        for watched in self._parameters.watched:
            parameter = watched.parameter()
            if parameter is not None:
                if not bool(torch.isfinite(parameter.detach()).all().numpy().item()):
                    return None  # everything is bad already, since an earlier step
                modules[id(parameter)] = watched.module
        origin = provenance.in_graph(losses, lambda tensor: modules.get(id(tensor)))
        self._hooks_wanted = origin is None
        return None if origin is None else origin.event(step + 1, time.time())

    def want_hooks(self, step: int) -> None:
        """Watch the next steps: something is not finite, and nothing tells where that began."""
        if step >= self._from:
            self._from = step + _EVERY
            self._hooks_wanted = True

    def take_seen(self, round_: Round) -> None:
        """Give a round what the hooks saw of it; set or remove them."""
        if self._hooks is not None:
            round_.seen = self._hooks.take()
            self._hooks_left -= 1
            if not self._hooks_left:
                self._hooks.close()
                self._hooks = None
        elif self._hooks_wanted:
            self._hooks_wanted = False
            models = self._parameters.models
            if not any(map(is_compiled, models)):
                self._hooks = provenance.Hooks(models)
                self._hooks_left = _HOOKED_STEPS

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        if self._hooks is not None:
            self._hooks.close()
