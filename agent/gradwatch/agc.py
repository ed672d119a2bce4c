"""Adaptive gradient clipping: each unit's gradient is kept in proportion to its weight.

Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021
(arXiv 2102.06171). For unit i, where ``||g_i|| > clip * max(||w_i||, eps)``::

    g_i <- g_i * clip * max(||w_i||, eps) / ||g_i||

and per tensor, where ``r = ||g|| / (||w|| + eps)``::

    g <- g * min(1, clip / r)

Everything happens in place on the gradients' device, and nothing waits for it.
"""

import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from gradwatch.layout import Arena, Axis, Bound, Layout, Scratch, Spec, spec_of
from gradwatch.model import local, walk

Granularity = Literal["unit", "tensor"]


def _check(clip: float, eps: float, granularity: str) -> None:
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip={clip}: the largest ratio of gradient to weight is a number above 0, such as 0.01")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps}: the floor for a weight's norm is a number above 0, such as 1e-3")
    if granularity not in ("unit", "tensor"):
        raise ValueError(f"granularity={granularity!r}: 'unit' or 'tensor'")


def chosen(patterns: Sequence[str | Tensor], names: Sequence[str], parameters: Sequence[Tensor]) -> set[int]:
    """Return the indices of the parameters that names, globs or the parameters themselves stand for.

    Raises:
        ValueError: one of them matches nothing.
    """
    found: set[int] = set()
    for pattern in patterns:
        if isinstance(pattern, Tensor):
            hits = {index for index, parameter in enumerate(parameters) if parameter is pattern}
            shown = f"a tensor of shape {tuple(pattern.shape)}"
        else:
            hits = {index for index, name in enumerate(names) if fnmatchcase(name, pattern)}
            shown = repr(pattern)
        if not hits:
            raise ValueError(f"{shown} matches no parameter; there are {', '.join(names[:8])} and so on")
        found |= hits
    return found


class Clipping:
    """How the gradients of a fixed list of tensors are scaled down; made once, used at every step.

    Args:
        grads: layout of the gradients' unit norms.
        weights: layout of the weights' unit norms, of the same tensors in the same order.
        clips: for each tensor its largest ratio; none: it is left alone.
        eps: floor for the norm of a weight.
        granularity: ``unit`` or ``tensor``.
    """

    def __init__(
        self,
        grads: Layout,
        weights: Layout,
        clips: Sequence[float | None],
        eps: float,
        granularity: Granularity,
    ) -> None:
        self._eps = eps
        self._granularity = granularity
        self._parts = [_Part(arena, size, grads, weights, clips) for arena, size in grads.sizes.items()]

    def scale(
        self,
        tensors: Sequence[Tensor],
        grad_units: dict[Arena, Tensor],
        weight_units: dict[Arena, Tensor],
        loss_scale: Tensor | None = None,
    ) -> None:
        """Scale gradients down in place.

        Args:
            tensors: the gradients, in the order of the layouts.
            grad_units: unit norms of the gradients by arena.
            weight_units: unit norms of the weights by arena.
            loss_scale: what the gradients are still multiplied by; a scalar tensor.
        """
        for part in self._parts:
            part.update(grad_units, weight_units, self._eps, self._granularity, loss_scale)
            part.apply(tensors)


class _Part:
    """The tensors whose unit norms share one arena."""

    def __init__(self, arena: Arena, size: int, grads: Layout, weights: Layout, clips: Sequence[float | None]) -> None:
        self._arena = arena
        positions = [
            position
            for position, (place, _) in enumerate(grads.places)
            if place == arena and grads.specs[position].units
        ]
        self._owner = torch.zeros(size, dtype=torch.int64)
        self._limit = torch.full((size,), math.inf, dtype=arena.dtype)
        self._counterpart = torch.zeros(size, dtype=torch.int64)
        bases = _bases(weights)
        self._weight_arenas = list(weights.sizes)
        for index, position in enumerate(positions):
            start = grads.places[position][1]
            units = grads.specs[position].units
            span = slice(start, start + units)
            self._owner[span] = index
            clip = clips[position]
            self._limit[span] = math.inf if clip is None else clip
            weight_arena, weight_start = weights.places[position]
            first = bases[weight_arena] + weight_start
            self._counterpart[span] = torch.arange(first, first + units)
        self._same = grads is weights
        self._tensors = len(positions)
        device = arena.device
        self._owner, self._limit = self._owner.to(device), self._limit.to(device)
        self._counterpart = self._counterpart.to(device)
        self._factors = torch.ones(size, dtype=arena.dtype, device=device)
        self._dense: list[tuple[int, Spec]] = []
        self._views: list[Tensor] = []
        self._sparse: list[tuple[int, Tensor]] = []
        for position in positions:
            if clips[position] is None:
                continue
            spec = grads.specs[position]
            start = grads.places[position][1]
            factors = self._factors[start : start + spec.units]
            if spec.sparse:
                self._sparse.append((position, factors))
            else:
                self._dense.append((position, spec))
                self._views.append(_shaped(factors, spec))
        self._spans = [self._span(grads, position) for position, _ in self._dense]

    @staticmethod
    def _span(grads: Layout, position: int) -> tuple[int, int]:
        start = grads.places[position][1]
        return start, start + grads.specs[position].units

    def update(
        self,
        grad_units: dict[Arena, Tensor],
        weight_units: dict[Arena, Tensor],
        eps: float,
        granularity: Granularity,
        loss_scale: Tensor | None,
    ) -> None:
        """Compute the factor of each unit, shape (units,), 1 where nothing is clipped or the norm is not finite."""
        size = self._factors.shape[0]
        norms = grad_units[self._arena][:size]
        if loss_scale is not None:
            norms = norms / loss_scale.to(norms.device)
        weights = self._weights(weight_units)
        if granularity == "tensor":
            norms, weights = self._whole(norms), self._whole(weights).add_(eps)
        else:
            weights = weights.clamp(min=eps)
        factors = torch.div(weights.mul_(self._limit), norms, out=self._factors)
        factors.clamp_(max=1.0)
        factors.masked_fill_(norms.isfinite().logical_not_(), 1.0)

    def _weights(self, weight_units: dict[Arena, Tensor]) -> Tensor:
        size = self._factors.shape[0]
        if self._same:
            return weight_units[self._arena][:size].clone()
        parts = [weight_units[arena] for arena in self._weight_arenas]
        joined = parts[0] if len(parts) == 1 else torch.cat([part.to(self._arena.dtype) for part in parts])
        return joined.index_select(0, self._counterpart).to(self._arena.dtype)

    def _whole(self, norms: Tensor) -> Tensor:
        """Return for each unit the norm of the tensor that it belongs to."""
        squares = torch.zeros(self._tensors, dtype=torch.float64, device=norms.device)
        squares.index_add_(0, self._owner, norms.double().square_())
        return squares.sqrt_().index_select(0, self._owner).to(norms.dtype)

    def apply(self, tensors: Sequence[Tensor]) -> None:
        """Multiply each unit by its factor, in place."""
        if self._arena.device.type == "cpu":
            self._apply_where_needed(tensors)
        elif self._dense:
            members = [_broadcastable(tensors[position], spec) for position, spec in self._dense]
            torch._foreach_mul_(members, self._views)
        for position, factors in self._sparse:
            gradient = tensors[position]
            values, indices = gradient._values(), gradient._indices()  # noqa: SLF001  # coalescing would copy
            rows = factors.index_select(0, indices[0]) if factors.shape[0] > 1 else factors
            values.mul_(rows.reshape(-1, *(1,) * (values.dim() - 1)).to(values.dtype))

    def _apply_where_needed(self, tensors: Sequence[Tensor]) -> None:
        """On the CPU the factors can be read at no cost: tensors in which nothing is clipped are not touched."""
        factors = self._factors.numpy()
        if not self._dense or not factors.min() < 1.0:
            return
        touched = [
            (_broadcastable(tensors[position], spec), view)
            for (position, spec), view, (start, stop) in zip(self._dense, self._views, self._spans, strict=True)
            if factors[start:stop].min() < 1.0
        ]
        if touched:
            torch._foreach_mul_([tensor for tensor, _ in touched], [view for _, view in touched])


def _bases(layout: Layout) -> dict[Arena, int]:
    bases, total = {}, 0
    for arena, size in layout.sizes.items():
        bases[arena] = total
        total += size
    return bases


def _broadcastable(tensor: Tensor, spec: Spec) -> Tensor:
    """Return a view of a gradient that its shaped factors multiply."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.unflatten(0, (spec.groups, -1)) if spec.axis == "transposed" and spec.groups > 1 else tensor


def _shaped(factors: Tensor, spec: Spec) -> Tensor:
    """Return a view of the factors that multiplies each unit of a tensor of this specification."""
    dims = len(spec.shape) + spec.dtype.is_complex
    if spec.units == 1:
        return factors.view((1,) * dims)
    if spec.axis != "transposed":
        return factors.view(-1, *(1,) * (dims - 1))
    if spec.groups == 1:
        return factors.view(1, -1, *(1,) * (dims - 2))
    return factors.view(spec.groups, 1, -1, *(1,) * (dims - 2))


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    clip: float = 0.01,
    eps: float = 1e-3,
    granularity: Granularity = "unit",
    *,
    exclude: Sequence[str | Tensor] = (),
    experts: Sequence[str] = (),
) -> None:
    """Clip gradients adaptively, in place, as ``torch.nn.utils.clip_grad_norm_`` would be used.

    A gradient that is not finite stays as it is, unit by unit; the finite units of its tensor are clipped.

    Args:
        parameters: a module, whose layers' types say what a unit is (Linear and convolutions: dim 0; transposed
            convolutions: dim 1; Embedding: a row; norm layers and vectors: the whole), or bare parameters (dim 0).
        clip: largest ratio of gradient to weight, above 0.
        eps: floor for the norm of a weight.
        granularity: ``unit`` or ``tensor``.
        exclude: names or globs (of a module) or parameters that are left alone; nothing by default. The paper leaves
            the classifier's weight alone.
        experts: names or globs of weights of shape (experts, rows, ...): each row of each expert is a unit.

    Raises:
        ValueError: an option cannot be right, or a pattern matches nothing; the text names it.
    """
    _check(clip, eps, granularity)
    options = (clip, eps, granularity, tuple(exclude), tuple(experts))
    listed = parameters if isinstance(parameters, nn.Module) else _listed(parameters)
    prepared = next((known for known in _prepared if known.fits(listed, options)), None)
    if prepared is None:
        prepared = _Prepared(listed, options)
        _prepared.appendleft(prepared)
    prepared.clip()


Options = tuple[float, float, Granularity, tuple[str | Tensor, ...], tuple[str, ...]]


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


class _Prepared:
    """What is known of a module or list that is clipped step after step: walked once, checked at each step."""

    def __init__(self, parameters: nn.Module | list[Tensor], options: Options) -> None:
        self._clip, self._eps, self._granularity, exclude, experts = self._options = options
        self._module = weakref.ref(parameters) if isinstance(parameters, nn.Module) else None
        self._owners: list[tuple[weakref.ref[nn.Module], tuple[int, ...]]] = []
        self._forms: list[tuple[Axis, int]]
        if isinstance(parameters, nn.Module):
            known = list(walk([parameters]))
            names = [entry.name for entry in known]
            tensors = [tensor for entry in known if (tensor := entry.parameter()) is not None]
            self._forms = [(entry.axis, entry.groups) for entry in known]
            self._owners = [(weakref.ref(module), _size(module)) for module in parameters.modules()]
        else:
            names = [str(index) for index in range(len(parameters))]
            tensors = parameters
            self._forms = [("rows", 1)] * len(tensors)
        self._parameters = [weakref.ref(tensor) for tensor in tensors]
        spared = chosen(exclude, names, tensors)
        self._experts = chosen(experts, names, tensors)
        self._clips = [None if index in spared else self._clip for index in range(len(tensors))]
        self._plans: dict[bytes, _Plan] = {}

    def fits(self, parameters: nn.Module | list[Tensor], options: Options) -> bool:
        """Return whether this was prepared for exactly these, and they have not changed their parts since."""
        if len(options[3]) or options != self._options:
            return False
        if isinstance(parameters, nn.Module):
            return (
                self._module is not None
                and self._module() is parameters
                and all((owner := known()) is not None and _size(owner) == size for known, size in self._owners)
            )
        return (
            self._module is None
            and len(parameters) == len(self._parameters)
            and all(known() is tensor for known, tensor in zip(self._parameters, parameters, strict=True))
        )

    def clip(self) -> None:
        """Clip the gradients that are there."""
        members = [known() for known in self._parameters]
        grads = [None if member is None else member.grad for member in members]
        present = bytes(grad is not None for grad in grads)
        there = [index for index, held in enumerate(present) if held]
        if not there:
            return
        pairs = [self._local(index, members[index], grads[index]) for index in there]
        listed_grads, listed_weights = [grad for grad, _ in pairs], [weight for _, weight in pairs]
        plan = self._plans.get(present)
        if plan is not None:
            try:
                plan.measure(listed_grads, listed_weights)
            except RuntimeError:  # a gradient or weight has another shape, layout or device than before
                plan = None
        if plan is None:
            plan = self._plans[present] = self._plan(there, listed_grads, listed_weights)
            plan.measure(listed_grads, listed_weights)
        plan.scale(listed_grads)

    def _local(self, index: int, member: Tensor | None, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        assert member is not None
        assert grad is not None
        weight, grad = local(member), local(grad)
        return (grad.flatten(0, 1), weight.flatten(0, 1)) if index in self._experts else (grad, weight)

    def _plan(self, there: Sequence[int], grads: Sequence[Tensor], weights: Sequence[Tensor]) -> "_Plan":
        forms = [self._forms[index] for index in there]
        return _Plan(
            [spec_of(grad, *form) for grad, form in zip(grads, forms, strict=True)],
            [spec_of(weight, *form) for weight, form in zip(weights, forms, strict=True)],
            [self._clips[index] for index in there],
            self._eps,
            self._granularity,
        )


def _size(module: nn.Module) -> tuple[int, ...]:
    return (len(module._modules), *map(id, module._parameters.values()))  # noqa: SLF001  # a walk would cost more


class _Plan:
    """Layouts, buffers and factors for one set of gradients."""

    def __init__(
        self,
        grads: Sequence[Spec],
        weights: Sequence[Spec],
        clips: Sequence[float | None],
        eps: float,
        granularity: Granularity,
    ) -> None:
        weight_layout = Layout(weights)
        grad_layout = weight_layout if list(grads) == list(weights) else Layout(grads)
        scratch = Scratch()
        self._grad_units, self._grads = _bound(grad_layout, scratch)
        self._weight_units, self._weights = _bound(weight_layout, scratch)
        self._clipping = Clipping(grad_layout, weight_layout, clips, eps, granularity)

    def measure(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self._grads.run(grads)
        self._weights.run(weights)

    def scale(self, grads: Sequence[Tensor]) -> None:
        self._clipping.scale(grads, self._grad_units, self._weight_units)


def _bound(layout: Layout, scratch: Scratch) -> tuple[dict[Arena, Tensor], Bound]:
    units = {arena: torch.zeros(size, dtype=arena.dtype, device=arena.device) for arena, size in layout.sizes.items()}
    return units, layout.bind(units, scratch)


_prepared: "deque[_Prepared]" = deque(maxlen=8)
"""The last few: a training asks for the same again and again."""
