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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from operator import is_
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.hooks.weak_tensors import held
from gradwatch.model.discovery import local, walk
from gradwatch.norms import kernels
from gradwatch.norms.layout import Arena, Axis, Bound, Layout, Scratch, Spec, spec_of, unit_rows
from gradwatch.ranks.sharding import Granularity, Split, joins, split_of


@dataclass(frozen=True, slots=True)
class AGC:
    """How gradients are clipped: ``attach(model, optimizer, clip=AGC(0.01))``.

    A parameter group of an optimizer may carry a ``clip`` of its own: a number, or None for no clipping.

    Args:
        clip: largest ratio of gradient to weight, above 0; the paper's grid is 0.01, 0.02, 0.04, 0.08, 0.16, smaller
            for larger batches.
        eps: floor for the norm of a weight, above 0.
        granularity: ``unit`` (an output row), or ``tensor``.
        exclude: names, globs or parameters that are left alone; None: the weight of the classifier, as the graph of
            the loss shows it; an empty list: nothing.
        experts: names or globs of weights of shape (experts, rows, ...): each row of each expert is a unit.

    Raises:
        ValueError: an option cannot be right; the text names it.
    """

    clip: float = 0.01
    eps: float = 1e-3
    granularity: Granularity = "unit"
    exclude: "str | Tensor | Iterable[str | Tensor] | None" = None
    experts: "str | Iterable[str]" = ()

    def __post_init__(self) -> None:
        check_clip(self.clip)
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps={self.eps}: the floor for a weight's norm is a number above 0, such as 1e-3")
        if self.granularity not in ("unit", "tensor"):
            raise ValueError(f"granularity={self.granularity!r}: 'unit' or 'tensor'")

    @property
    def attributes(self) -> dict[str, str]:
        """Return how a run is clipped, as it is registered."""
        return {"agc_clip": str(self.clip), "agc_eps": str(self.eps), "agc": self.granularity}

    def spared(self, names: Sequence[str], parameters: Sequence[Tensor]) -> set[int] | None:
        """Return the indices of the parameters that the user excludes; None where the graph is to tell."""
        return None if self.exclude is None else chosen(_several(self.exclude), names, parameters)

    def stacked(self, names: Sequence[str], parameters: Sequence[Tensor]) -> set[int]:
        """Return the indices of the parameters that hold experts.

        Raises:
            ValueError: a pattern matches nothing, or a parameter with fewer than two dims.
        """
        found = chosen(_several(self.experts), names, parameters)
        for index in found:
            if parameters[index].dim() < 2:
                shape = tuple(parameters[index].shape)
                raise ValueError(f"experts: {names[index]} has shape {shape}, not (experts, rows, ...)")
        return found


def check_clip(clip: object) -> float:
    """Return ``clip`` as a float.

    Raises:
        ValueError: it is not a number above 0.
    """
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip={clip!r}: the largest ratio of gradient to weight is a number above 0, such as 0.01")
    return float(clip)


_PLANS: Final = 8
"""Plans kept for a module or list: one for each set of parameters that had gradients together."""

_T = TypeVar("_T")


def _several(given: "str | Tensor | Iterable[_T]") -> list[str | Tensor | _T]:
    return [given] if isinstance(given, str | Tensor) else list(given)


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
        splits: for each tensor how its units lie on several ranks, ``None`` where none does.
        spared: positions of the tensors that are left alone.
        eps: floor for the norm of a weight.
        granularity: ``unit`` or ``tensor``.
    """

    def __init__(
        self,
        grads: Layout,
        weights: Layout,
        splits: Sequence[Split | None],
        spared: Collection[int],
        eps: float,
        granularity: Granularity,
    ) -> None:
        self._eps = eps
        self._parts = [_Part(arena, size, grads, weights, spared, granularity) for arena, size in grads.sizes.items()]
        self._joins = joins(splits, [part.places for part in self._parts], [arena.device for arena in grads.sizes])

    def limit(self, clips: Sequence[float]) -> None:
        """Set the largest ratio of each tensor; infinite where it is not clipped."""
        for part in self._parts:
            part.limit(clips)

    def scale(
        self,
        tensors: Sequence[Tensor],
        grad_units: Mapping[Arena, Tensor],
        weight_units: Mapping[Arena, Tensor],
        loss_scale: Tensor | None = None,
    ) -> None:
        """Scale gradients down in place.

        Args:
            tensors: the gradients, in the order of the layouts.
            grad_units: unit norms of the gradients by arena.
            weight_units: unit norms of the weights by arena.
            loss_scale: what the gradients are still multiplied by; a scalar tensor.
        """
        measured = [part.norms(grad_units, weight_units) for part in self._parts]
        for join in self._joins:
            join(measured)
        for part, (norms, weights) in zip(self._parts, measured, strict=True):
            part.put_right(norms, tensors)
            part.update(norms, weights, self._eps, loss_scale)
            part.apply(tensors)


class _Part:
    """The tensors whose unit norms share one arena."""

    def __init__(
        self,
        arena: Arena,
        size: int,
        grads: Layout,
        weights: Layout,
        spared: Collection[int],
        granularity: Granularity,
    ) -> None:
        self._arena = arena
        self._granularity = granularity
        self._positions = [
            position
            for position, (place, _) in enumerate(grads.places)
            if place == arena and grads.specs[position].units
        ]
        device = arena.device
        owner = torch.zeros(size, dtype=torch.int64, device="cpu")
        counterpart = torch.zeros(size, dtype=torch.int64, device="cpu")
        bases = _bases(weights)
        self._weight_arenas = list(weights.sizes)
        self._spans: dict[int, tuple[int, int]] = {}
        for index, position in enumerate(self._positions):
            start = grads.places[position][1]
            stop = start + grads.specs[position].units
            self._spans[position] = (start, stop)
            owner[start:stop] = index
            weight_arena, weight_start = weights.places[position]
            first = bases[weight_arena] + weight_start
            counterpart[start:stop] = torch.arange(first, first + stop - start, device="cpu")
        self._same = grads is weights
        self._owner, self._counterpart = owner.to(device), counterpart.to(device)
        self._limit = torch.full((size,), math.inf, dtype=arena.dtype, device=device)
        self._factors = torch.ones(size, dtype=arena.dtype, device=device)
        self._dense: list[tuple[int, Spec, Tensor]] = []
        self._sparse: list[tuple[int, Tensor]] = []
        for position, (start, stop) in self._spans.items():
            if position in spared:
                continue
            spec = grads.specs[position]
            factors = self._factors[start:stop]
            if spec.sparse:
                self._sparse.append((position, factors))
            else:
                self._dense.append((position, spec, _shaped(factors, spec)))
        in_order = sorted(self._spans, key=self._spans.__getitem__)
        self._starts = np.array([self._spans[position][0] for position in in_order], np.intp)
        rank = {position: place for place, position in enumerate(in_order)}
        self._ranks = [rank[position] for position, _, _ in self._dense]
        """Where each dense tensor comes in the order of the starts."""
        self._table: kernels.Table | None = None
        if self._dense and kernels.usable(arena):
            starts = [self._spans[position][0] for position, _, _ in self._dense]
            self._table = kernels.Table([spec for _, spec, _ in self._dense], starts, arena)

    @property
    def places(self) -> dict[int, range]:
        """Return for each position where its norms lie in what ``norms`` returns."""
        if self._granularity == "tensor":
            return {position: range(index, index + 1) for index, position in enumerate(self._positions)}
        return {position: range(*span) for position, span in self._spans.items()}

    def limit(self, clips: Sequence[float]) -> None:
        limits = torch.tensor([clips[position] for position in self._positions], dtype=self._arena.dtype, device="cpu")
        self._limit.copy_(limits.to(self._arena.device).index_select(0, self._owner))

    def norms(self, grad_units: Mapping[Arena, Tensor], weight_units: Mapping[Arena, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the norms of gradients and weights, of each unit or of each tensor; both may be written to."""
        size = self._factors.shape[0]
        norms = grad_units[self._arena][:size]
        weights = self._weights(weight_units)
        if self._granularity == "tensor":
            return self._whole(norms), self._whole(weights)
        return norms.clone(), weights

    def put_right(self, norms: Tensor, tensors: Sequence[Tensor]) -> None:
        """Measure again, in float64, what is too large for a norm in float32 though every element is finite.

        On the CPU only, where it shows without waiting.
        """
        if norms.device.type != "cpu" or norms.dtype == torch.float64 or math.isfinite(norms.sum().numpy().item()):
            return
        largest = torch.finfo(norms.dtype).max
        for position, spec, _ in self._dense:
            place = self.places[position]
            part = norms[place.start : place.stop]
            if not bool(part.isinf().any().numpy().item()):
                continue
            rows = unit_rows(tensors[position], spec).double().flatten(1)
            again = torch.linalg.vector_norm(rows, dim=1)
            if self._granularity == "tensor":
                again = torch.linalg.vector_norm(again).reshape(1)
            part.copy_(torch.where(again.isfinite(), again.clamp(max=largest), again))

    def update(self, norms: Tensor, weights: Tensor, eps: float, loss_scale: Tensor | None) -> None:
        """Compute the factor of each unit, shape (units,), 1 where nothing is clipped or the norm is not finite."""
        if loss_scale is not None:
            norms = norms.div_(loss_scale.to(norms.device))
        if self._granularity == "tensor":
            norms = norms.index_select(0, self._owner)
            weights = weights.add_(eps).index_select(0, self._owner)
        else:
            weights = weights.clamp_(min=eps)
        factors = torch.div(weights.mul_(self._limit), norms, out=self._factors)
        factors.clamp_(max=1.0)
        factors.masked_fill_(norms.isfinite().logical_not_(), 1.0)

    def _weights(self, weight_units: Mapping[Arena, Tensor]) -> Tensor:
        size = self._factors.shape[0]
        if self._same:
            return weight_units[self._arena][:size].clone()
        parts = [weight_units[arena] for arena in self._weight_arenas]
        joined = parts[0] if len(parts) == 1 else torch.cat([part.to(self._arena.dtype) for part in parts])
        return joined.index_select(0, self._counterpart).to(self._arena.dtype)

    def _whole(self, units: Tensor) -> Tensor:
        """Return the norm of each tensor from those of its units."""
        squares = torch.zeros(len(self._positions), dtype=torch.float64, device=units.device)
        squares.index_add_(0, self._owner, units.double().square_())
        return squares.sqrt_().to(units.dtype)

    def apply(self, tensors: Sequence[Tensor]) -> None:
        """Multiply each unit by its factor, in place."""
        left = self._dense
        if self._table is not None:
            dense = [tensors[position] for position, _, _ in left]
            left = [left[index] for index in self._table.launch("scale_units", dense, self._factors)]
        elif self._arena.device.type == "cpu":
            left = self._clipped()
        if left:
            members = [_broadcastable(tensors[position], spec) for position, spec, _ in left]
            torch._foreach_mul_(members, [view for _, _, view in left])
        for position, factors in self._sparse:
            gradient = tensors[position]
            values, indices = gradient._values(), gradient._indices()  # noqa: SLF001  # coalescing would copy
            rows = factors.index_select(0, indices[0]) if factors.shape[0] > 1 else factors
            values.mul_(rows.reshape(-1, *(1,) * (values.dim() - 1)).to(values.dtype))

    def _clipped(self) -> list[tuple[int, Spec, Tensor]]:
        """Return the tensors in which something is clipped: on the CPU the factors can be read at no cost."""
        if not self._dense or not self._factors.min().numpy().item() < 1.0:
            return []
        smallest = np.minimum.reduceat(self._factors.numpy(), self._starts).tolist()
        return [known for known, rank in zip(self._dense, self._ranks, strict=True) if smallest[rank] < 1.0]


def _bases(layout: Layout) -> dict[Arena, int]:
    bases, total = {}, 0
    for arena, size in layout.sizes.items():
        bases[arena] = total
        total += size
    return bases


def _broadcastable(tensor: Tensor, spec: Spec) -> Tensor:
    """Return a view of a gradient that its shaped factors multiply."""
    if spec.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return tensor.unflatten(0, (spec.groups, -1)) if spec.axis == "transposed" and spec.groups > 1 else tensor


def _shaped(factors: Tensor, spec: Spec) -> Tensor:
    """Return a view of the factors that multiplies each unit of a tensor of this specification."""
    dims = len(spec.shape) + spec.dtype.is_complex
    if spec.units == 1:
        return factors.view((1,) * dims)
    if spec.axis == "experts":
        return factors.view(*spec.shape[:2], *(1,) * (dims - 2))
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
    exclude: str | Tensor | Iterable[str | Tensor] = (),
    experts: str | Iterable[str] = (),
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
    named = (experts,) if isinstance(experts, str) else tuple(experts)
    agc = AGC(clip, eps, granularity, tuple(_several(exclude)), named)
    given = parameters if isinstance(parameters, nn.Module) else _listed(parameters)
    options = _options(agc)
    prepared = next((known for known in _prepared if known.fits(given, options)), None)
    if prepared is None:
        prepared = _Prepared(given, agc)
        _prepared.appendleft(prepared)
    prepared.clip()


Options = tuple[object, ...]


def _options(agc: AGC) -> Options:
    """Return what two calls have to agree in; parameters by their ids."""
    named = (*(agc.exclude or ()), None, *agc.experts)
    return (agc.clip, agc.eps, agc.granularity, *(id(entry) if isinstance(entry, Tensor) else entry for entry in named))


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return each once: a tied weight may be listed as often as it is used."""
    return (
        [parameters] if isinstance(parameters, Tensor) else list({id(tensor): tensor for tensor in parameters}.values())
    )


class _Prepared:
    """What is known of a module or list that is clipped step after step: walked once, checked at each step."""

    def __init__(self, parameters: nn.Module | list[Tensor], agc: AGC) -> None:
        self._options = _options(agc)
        self._agc = replace(agc, exclude=())
        self._module = weakref.ref(parameters) if isinstance(parameters, nn.Module) else None
        self._modules: list[weakref.ref[nn.Module]] = []
        self._children: list[int] = []
        self._owned: list[int] = []
        self._forms: list[tuple[Axis, int]]
        if isinstance(parameters, nn.Module):
            known = list(walk([parameters]))
            names = [entry.name for entry in known]
            tensors = [tensor for entry in known if (tensor := entry.parameter()) is not None]
            self._forms = [(entry.axis, entry.groups) for entry in known]
            modules = list(parameters.modules())
            self._modules = [weakref.ref(module) for module in modules]
            self._children, self._owned = _parts(modules)
        else:
            names = [str(index) for index in range(len(parameters))]
            tensors = parameters
            self._forms = [("rows", 1)] * len(tensors)
        self._parameters = [held(tensor) for tensor in tensors]
        self._sharded = any(local(tensor) is not tensor for tensor in tensors)
        self._spared = agc.spared(names, tensors) or set()
        for index in agc.stacked(names, tensors):
            self._forms[index] = ("experts", 1)
        self._plans: dict[bytes, _Plan] = {}

    def fits(self, parameters: nn.Module | list[Tensor], options: Options) -> bool:
        """Return whether this was prepared for exactly these, and they have not changed their parts since."""
        if options != self._options:
            return False
        if not isinstance(parameters, nn.Module):
            known = [holder.reference() for holder in self._parameters]
            return self._module is None and len(known) == len(parameters) and all(map(is_, known, parameters))
        if self._module is None or self._module() is not parameters:
            return False
        modules = [module for reference in self._modules if (module := reference()) is not None]
        return len(modules) == len(self._modules) and _parts(modules) == (self._children, self._owned)

    def clip(self) -> None:
        """Clip the gradients that are there."""
        members = [member for holder in self._parameters if (member := holder.reference()) is not None]
        every = [member.grad for member in members]
        present = bytes(grad is not None for grad in every)
        grads = [grad for grad in every if grad is not None]
        weights = [member for member, grad in zip(members, every, strict=True) if grad is not None]
        if not grads:
            return
        there = weights
        if self._sharded:
            grads, weights = [local(grad) for grad in grads], [local(weight) for weight in weights]
        plan = self._plans.get(present)
        if plan is not None:
            try:
                plan.measure(grads, weights)
            except RuntimeError:  # a gradient or weight has another shape, layout or device than before
                plan = None
        if plan is None:
            indices = [index for index, held in enumerate(present) if held]
            forms = [self._forms[index] for index in indices]
            with torch.inference_mode(False):  # buffers that are made within could not be written to outside
                plan = _Plan(
                    [spec_of(grad, *form) for grad, form in zip(grads, forms, strict=True)],
                    [spec_of(weight, *form) for weight, form in zip(weights, forms, strict=True)],
                    [split_of(tensor, *form, self._agc.granularity) for tensor, form in zip(there, forms, strict=True)],
                    {position for position, index in enumerate(indices) if index in self._spared},
                    self._agc,
                )
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[present] = plan
            plan.measure(grads, weights)
        plan.scale(grads)


def _parts(modules: Iterable[nn.Module]) -> tuple[list[int], list[int]]:
    """Return how many children each module has, and the ids of all parameters: what shows a change at little cost."""
    children = [len(module._modules) for module in modules]  # noqa: SLF001  # a walk would cost more
    return children, [id(parameter) for module in modules for parameter in module._parameters.values()]  # noqa: SLF001


class _Plan:
    """Layouts, buffers and factors for one set of gradients."""

    def __init__(
        self,
        grads: Sequence[Spec],
        weights: Sequence[Spec],
        splits: Sequence[Split | None],
        spared: Collection[int],
        agc: AGC,
    ) -> None:
        weight_layout = Layout(weights)
        grad_layout = weight_layout if list(grads) == list(weights) else Layout(grads)
        scratch = Scratch()
        self._grad_units, self._grads = _bound(grad_layout, scratch)
        self._weight_units, self._weights = _bound(weight_layout, scratch)
        self._clipping = Clipping(grad_layout, weight_layout, splits, spared, agc.eps, agc.granularity)
        self._clipping.limit([agc.clip] * len(grads))

    def measure(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self._grads.run(grads)
        self._weights.run(weights, warm=True)

    def scale(self, grads: Sequence[Tensor]) -> None:
        self._clipping.scale(grads, self._grad_units, self._weight_units)


def _bound(layout: Layout, scratch: Scratch) -> tuple[dict[Arena, Tensor], Bound]:
    units = {arena: torch.zeros(size, dtype=arena.dtype, device=arena.device) for arena, size in layout.sizes.items()}
    return units, kernels.bind(layout, units, scratch)


_prepared: "deque[_Prepared]" = deque(maxlen=8)
"""The last few: a training asks for the same again and again."""
