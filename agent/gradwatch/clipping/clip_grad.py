"""The public function ``adaptive_clip_grad_``: clips the gradients of a module or of parameters, without an agent."""

import weakref
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from gradwatch.clipping.agc import AGC, as_list
from gradwatch.clipping.scaling import UnitScaling
from gradwatch.model.discovery import find_parameters
from gradwatch.model.flat_parameters import are_shards, uses_fsdp1
from gradwatch.norms.buffers import make_reducer
from gradwatch.norms.layout import NormLayout
from gradwatch.norms.reducer import NormReducer, Scratch
from gradwatch.norms.tensor_spec import BufferKey, TensorSpec, UnitAxis, local_part, spec_of
from gradwatch.norms.triton_reducer import compare_kernels
from gradwatch.ranks.sharding import Granularity, UnitSplit, split_of
from gradwatch.statistics import RATIO_EPS

_GRADIENT_SETS: Final = 8
"""Sets of parameters with gradients that a module or list is prepared for."""


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    clip: float = 0.01,
    eps: float = RATIO_EPS,
    granularity: Granularity = "unit",
    *,
    exclude: str | Tensor | Iterable[str | Tensor] = (),
    experts: str | Iterable[str] = (),
) -> None:
    """Clip gradients adaptively, in place; call it where ``torch.nn.utils.clip_grad_norm_`` would be called.

    A gradient that is not finite stays as it is, unit by unit; the finite units of its tensor are clipped.

    Args:
        parameters: a module, whose layers' types say what a unit is (Linear and convolutions: dim 0; transposed
            convolutions: dim 1; Embedding: a row; norm layers and vectors: the whole), or bare parameters (dim 0).
        clip: largest ratio of gradient to weight, above 0.
        eps: floor for the norm of a weight.
        granularity: ``unit`` or ``tensor``.
        exclude: names or globs (of a module) or parameters that are not clipped; nothing by default. The paper does not
            clip the classifier's weight.
        experts: names or globs of weights of shape (experts, rows, ...): each row of each expert is a unit.

    Raises:
        ValueError: an option cannot be right, or a pattern matches nothing; the text names it.
        NotImplementedError: FSDP1 has cut the parameters into shards, and units with them.
    """
    names = (experts,) if isinstance(experts, str) else tuple(experts)
    agc = AGC(clip, eps, granularity, tuple(as_list(exclude)), names)
    given = parameters if isinstance(parameters, nn.Module) else _without_repeats(parameters)
    options = _options(agc)
    for prepared in tuple(_prepared):
        tensors = prepared.tensors_of(given, options)
        if tensors is not None:
            prepared.clip(tensors)
            return
    if uses_fsdp1([given]) if isinstance(given, nn.Module) else are_shards(given):
        raise NotImplementedError("FSDP1 has cut units apart, which AGC cannot clip: use fully_shard (FSDP2)")
    prepared = _PreparedParameters(given, agc)
    tensors = prepared.tensors_of(given, options)
    assert tensors is not None
    _prepared.appendleft(prepared)
    prepared.clip(tensors)


Options = tuple[object, ...]


def _options(agc: AGC) -> Options:
    """Return the options by which two calls are compared; parameters are compared by their ids."""
    patterns = (*(agc.exclude or ()), None, *agc.experts)
    by_id = (id(pattern) if isinstance(pattern, Tensor) else pattern for pattern in patterns)
    return (agc.clip, agc.eps, agc.granularity, *by_id)


def _without_repeats(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return each parameter once: a tied weight may be listed as often as it is used."""
    if isinstance(parameters, Tensor):
        return [parameters]
    return list({id(tensor): tensor for tensor in parameters}.values())


class _PreparedParameters:
    """A module or list that is clipped step after step: searched for parameters once, checked at each step.

    Tensors are known by their ids and types alone: a weak reference would keep torch from swapping them. A new tensor
    at the id of a freed one is clipped correctly as well: buffers are made anew where a shape or dtype differs, or
    where a tensor has elements and the one before it had none.

    Args:
        parameters: the module or list, of which nothing is kept alive.
        agc: how it is clipped.
    """

    def __init__(self, parameters: nn.Module | list[Tensor], agc: AGC) -> None:
        self._options = _options(agc)
        self._agc = replace(agc, exclude=())
        self._module = weakref.ref(parameters) if isinstance(parameters, nn.Module) else None
        self._modules: list[weakref.ref[nn.Module]] = []
        self._structure: _Structure = ([], [], [])
        self._axes: list[tuple[UnitAxis, int]]
        """Axis of the units, and groups, of each parameter."""
        if isinstance(parameters, nn.Module):
            infos = list(find_parameters([parameters]))
            names = [info.name for info in infos]
            tensors = [tensor for info in infos if (tensor := info.parameter()) is not None]
            self._axes = [(info.axis, info.groups) for info in infos]
            modules = list(parameters.modules())
            self._modules = [weakref.ref(module) for module in modules]
            self._structure = _structure(modules)
        else:
            names = [str(index) for index in range(len(parameters))]
            tensors = parameters
            self._axes = [("rows", 1)] * len(tensors)
        self._ids = list(map(id, tensors))
        self._types = list(map(type, tensors))
        self._sharded = any(local_part(tensor) is not tensor for tensor in tensors)
        self._excluded = agc.excluded_indices(names, tensors) or set()
        for index in agc.expert_indices(names, tensors):
            self._axes[index] = ("experts", 1)
        self._gradient_sets: dict[bytes, _GradientSet] = {}
        """For each parameter 0: no gradient, 1: a gradient, 2: one without elements -> gradient set for just these."""

    def tensors_of(self, parameters: nn.Module | list[Tensor], options: Options) -> list[Tensor] | None:
        """Return the parameters to clip; None if other parameters or other options were prepared."""
        if options != self._options:
            return None
        if not isinstance(parameters, nn.Module):
            known = self._module is None and list(map(id, parameters)) == self._ids
            return parameters if known and list(map(type, parameters)) == self._types else None
        if self._module is None or self._module() is not parameters:
            return None
        modules = [module for reference in self._modules if (module := reference()) is not None]
        if len(modules) != len(self._modules) or _structure(modules) != self._structure:
            return None
        owned = (tensor for module in modules for tensor in module._parameters.values())  # noqa: SLF001
        by_id = {id(tensor): tensor for tensor in owned if tensor is not None}
        return [by_id[known] for known in self._ids]

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """Clip the gradients of all parameters that have one."""
        every = [parameter.grad for parameter in parameters]
        # Tensors without elements are not measured: the check of shapes below would not find one that has some.
        present = bytes(0 if grad is None else 1 if grad.numel() else 2 for grad in every)
        grads = [grad for grad in every if grad is not None]
        members = [parameter for parameter, grad in zip(parameters, every, strict=True) if grad is not None]
        if not grads:
            return
        weights = members
        if self._sharded:
            grads, weights = [local_part(grad) for grad in grads], [local_part(weight) for weight in weights]
        prepared = self._gradient_sets.get(present)
        if prepared is not None:
            try:
                prepared.measure(grads, weights)
            except RuntimeError:  # a gradient or weight has another shape, layout or device than before
                prepared = None
        if prepared is None:
            prepared = self._prepare(present, members, grads, weights)
            prepared.measure(grads, weights)
        prepared.scale(grads)

    def _prepare(
        self, present: bytes, members: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> "_GradientSet":
        """Make the gradient set for the parameters that have a gradient now, and remember it.

        Args:
            present: for each parameter 0: no gradient, 1: a gradient, 2: one without elements.
            members: the parameters with a gradient.
            grads: their gradients; of a sharded one this rank's shard.
            weights: the weights; of a sharded one this rank's shard.
        """
        indices = [index for index, has_gradient in enumerate(present) if has_gradient]
        axes = [self._axes[index] for index in indices]
        with torch.inference_mode(False):  # buffers that are made in inference mode are read-only outside of it
            prepared = _GradientSet(
                [spec_of(grad, *axis) for grad, axis in zip(grads, axes, strict=True)],
                [spec_of(weight, *axis) for weight, axis in zip(weights, axes, strict=True)],
                [split_of(member, *axis, self._agc.granularity) for member, axis in zip(members, axes, strict=True)],
                {position for position, index in enumerate(indices) if index in self._excluded},
                self._agc,
            )
        if len(self._gradient_sets) >= _GRADIENT_SETS:
            self._gradient_sets.clear()
        self._gradient_sets[present] = prepared
        return prepared


_Structure = tuple[list[int], list[int], list[type]]


def _structure(modules: Iterable[nn.Module]) -> _Structure:
    """Return the number of children of each module, and the ids and types of all parameters, which show a change.

    A search through the modules would cost more.
    """
    children = [len(module._modules) for module in modules]  # noqa: SLF001
    owned = [parameter for module in modules for parameter in module._parameters.values()]  # noqa: SLF001
    return children, list(map(id, owned)), list(map(type, owned))


class _GradientSet:
    """Layouts, buffers and factors for the parameters that had gradients together."""

    def __init__(
        self,
        grads: Sequence[TensorSpec],
        weights: Sequence[TensorSpec],
        splits: Sequence[UnitSplit | None],
        excluded: Collection[int],
        agc: AGC,
    ) -> None:
        weight_layout = NormLayout(weights)
        grad_layout = weight_layout if list(grads) == list(weights) else NormLayout(grads)
        compare_kernels(grad_layout.sizes)
        scratch = Scratch()
        self._grad_units, self._grads = _reducer(grad_layout, scratch)
        self._weight_units, self._weights = _reducer(weight_layout, scratch)
        self._scaling = UnitScaling(grad_layout, weight_layout, splits, excluded, agc.eps, agc.granularity)
        self._scaling.set_limits([agc.clip] * len(grads))

    def measure(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self._grads.run(grads)
        self._weights.run(weights, warm=True)

    def scale(self, grads: Sequence[Tensor]) -> None:
        self._scaling.scale(grads, self._grad_units, self._weight_units)


def _reducer(layout: NormLayout, scratch: Scratch) -> tuple[dict[BufferKey, Tensor], NormReducer]:
    """Return buffers for the unit norms of a layout, and the reducer that writes to them."""
    units = {key: torch.zeros(size, dtype=key.dtype, device=key.device) for key, size in layout.sizes.items()}
    return units, make_reducer(layout, units, scratch)


_prepared: "deque[_PreparedParameters]" = deque(maxlen=8)
"""The modules and lists that were clipped last: a training clips the same ones at each step."""
