"""Adaptive gradient clipping (AGC): scales gradients down in place, in proportion to their weights.

Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021
(arXiv 2102.06171). For unit i, where ``||g_i|| > clip * max(||w_i||, eps)``::

    g_i <- g_i * clip * max(||w_i||, eps) / ||g_i||

and per tensor, where ``r = ||g|| / (||w|| + eps)``::

    g <- g * min(1, clip / r)

``gradwatch.norms.reference`` spells both out for one parameter. This module computes both for many parameters in few
operators, which run on the gradients' device and never wait for it.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradwatch.norms.layout import NormLayout
from gradwatch.norms.tensor_spec import BufferKey, TensorSpec, real_view, unit_rows
from gradwatch.norms.transfer import pinned
from gradwatch.norms.triton_reducer import TritonTable, can_use_triton
from gradwatch.ranks.sharding import Granularity, UnitSplit, norm_all_reduces


class UnitScaling:
    """Scales the gradients of a fixed list of tensors; made once, used at every step.

    Args:
        grads: layout of the gradients' unit norms.
        weights: layout of the weights' unit norms, of the same tensors in the same order.
        splits: for each tensor how its units lie on several ranks; None where each lies on one.
        excluded: positions of the tensors that are not clipped.
        eps: floor for the norm of a weight.
        granularity: ``unit`` or ``tensor``.
    """

    def __init__(
        self,
        grads: NormLayout,
        weights: NormLayout,
        splits: Sequence[UnitSplit | None],
        excluded: Collection[int],
        eps: float,
        granularity: Granularity,
    ) -> None:
        self._eps = eps
        self._by_buffer = [_BufferScaling(key, grads, weights, excluded, granularity) for key in grads.sizes]
        places = [scaling.places for scaling in self._by_buffer]
        self._all_reduces = norm_all_reduces(splits, places, [key.device for key in grads.sizes])

    def set_limits(self, clips: Sequence[float]) -> None:
        """Set the largest ratio of gradient to weight of each tensor; infinite where it is not clipped."""
        for scaling in self._by_buffer:
            scaling.set_limits(clips)

    def scale(
        self,
        tensors: Sequence[Tensor],
        grad_units: Mapping[BufferKey, Tensor],
        weight_units: Mapping[BufferKey, Tensor],
        loss_scale: Tensor | None = None,
    ) -> None:
        """Scale gradients down in place.

        Args:
            tensors: the gradients, in the order of the layouts.
            grad_units: unit norms of the gradients by buffer.
            weight_units: unit norms of the weights by buffer.
            loss_scale: scalar that the gradients are still multiplied by.
        """
        norms = [scaling.norms(grad_units, weight_units) for scaling in self._by_buffer]
        for all_reduce in self._all_reduces:
            all_reduce(norms)
        for scaling, (grad_norms, weight_norms) in zip(self._by_buffer, norms, strict=True):
            scaling.recompute_overflowed(grad_norms, tensors)
            scaling.update_factors(grad_norms, weight_norms, self._eps, loss_scale)
            scaling.apply(tensors)


class _BufferScaling:
    """Scales the tensors whose gradients' unit norms lie in one buffer."""

    def __init__(
        self,
        key: BufferKey,
        grads: NormLayout,
        weights: NormLayout,
        excluded: Collection[int],
        granularity: Granularity,
    ) -> None:
        self._key = key
        self._granularity = granularity
        size = grads.sizes[key]
        self._spans = {
            position: (start, start + grads.specs[position].units)
            for position, (buffer, start) in enumerate(grads.places)
            if buffer == key and grads.specs[position].units
        }
        """Where the units of each tensor lie in the buffer, by position."""
        self._same_layout = grads is weights
        self._weight_buffers = list(weights.sizes)
        self._sources: list[Tensor] = []
        """What was copied to the device: a captured graph copies it again at each replay."""
        self._owners, self._weight_units = self._unit_indices(size, weights)
        self._limits = torch.full((size,), math.inf, dtype=key.dtype, device=key.device)
        self._factors = torch.ones(size, dtype=key.dtype, device=key.device)
        clipped = [position for position in self._spans if position not in excluded]
        self._sparse = [(position, self._span(position)) for position in clipped if grads.specs[position].sparse]
        """Positions of the sparse gradients, with the factors of their units."""
        self._dense = [
            (position, spec, _as_factor_of(self._span(position), spec))
            for position in clipped
            if not (spec := grads.specs[position]).sparse
        ]
        """Positions of the dense gradients, with the factors of their units in a shape that multiplies them."""
        in_order = sorted(self._spans, key=self._spans.__getitem__)
        self._starts = np.array([self._spans[position][0] for position in in_order], np.intp)
        place = {position: index for index, position in enumerate(in_order)}
        self._places_in_order = [place[position] for position, _, _ in self._dense]
        """Where each dense tensor comes in the order of ``starts``."""
        self._table: TritonTable | None = None
        if self._dense and can_use_triton(key):
            starts = [self._spans[position][0] for position, _, _ in self._dense]
            self._table = TritonTable([spec for _, spec, _ in self._dense], starts, key)

    def _unit_indices(self, size: int, weights: NormLayout) -> tuple[Tensor, Tensor]:
        """Return for each unit which tensor it belongs to, and its index in the concatenated weights' buffers."""
        owners = torch.zeros(size, dtype=torch.int64, device="cpu")
        weight_units = torch.zeros(size, dtype=torch.int64, device="cpu")
        buffer_starts = weights.buffer_starts
        for index, (position, (start, stop)) in enumerate(self._spans.items()):
            owners[start:stop] = index
            buffer, weight_start = weights.places[position]
            first = buffer_starts[buffer] + weight_start
            weight_units[start:stop] = torch.arange(first, first + stop - start, device="cpu")
        return self._to_device(owners), self._to_device(weight_units)

    def _to_device(self, host: Tensor) -> Tensor:
        """Copy a tensor to the device without waiting for it."""
        source = pinned(host, self._key.device)
        self._sources.append(source)
        return source.to(self._key.device, non_blocking=True)

    def _span(self, position: int) -> Tensor:
        start, stop = self._spans[position]
        return self._factors[start:stop]

    @property
    def places(self) -> dict[int, range]:
        """Return for each position where its norms lie in the result of ``norms``."""
        if self._granularity == "tensor":
            return {position: range(index, index + 1) for index, position in enumerate(self._spans)}
        return {position: range(*span) for position, span in self._spans.items()}

    def set_limits(self, clips: Sequence[float]) -> None:
        limits = torch.tensor([clips[position] for position in self._spans], dtype=self._key.dtype, device="cpu")
        del self._sources[2:]  # those of earlier limits; the first two are those of the indices
        self._limits.copy_(self._to_device(limits).index_select(0, self._owners))

    def norms(
        self, grad_units: Mapping[BufferKey, Tensor], weight_units: Mapping[BufferKey, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the norms of gradients and weights, of each unit or of each tensor; both may be written to."""
        size = self._factors.shape[0]
        norms = grad_units[self._key][:size]
        weights = self._weights(weight_units)
        if self._granularity == "tensor":
            return self._tensor_norms(norms), self._tensor_norms(weights)
        return norms.clone(), weights

    def _weights(self, weight_units: Mapping[BufferKey, Tensor]) -> Tensor:
        """Return the weights' unit norms in the order of the gradients'."""
        size = self._factors.shape[0]
        if self._same_layout:
            return weight_units[self._key][:size].clone()
        parts = [weight_units[key] for key in self._weight_buffers]
        joined = parts[0] if len(parts) == 1 else torch.cat([part.to(self._key.dtype) for part in parts])
        return joined.index_select(0, self._weight_units).to(self._key.dtype)

    def _tensor_norms(self, units: Tensor) -> Tensor:
        """Return the norm of each tensor from those of its units; no square overflows, and no device needs float64."""
        largest = torch.zeros(len(self._spans), dtype=units.dtype, device=units.device)
        largest.scatter_reduce_(0, self._owners, units, "amax")
        largest.clamp_(torch.finfo(units.dtype).tiny, torch.finfo(units.dtype).max)
        shares = units.div(largest.index_select(0, self._owners))
        wide = torch.float64 if units.device.type == "cpu" else units.dtype
        squares = torch.zeros(len(self._spans), dtype=wide, device=units.device)
        squares.index_add_(0, self._owners, shares.to(wide).square_())
        return squares.sqrt_().to(units.dtype).mul_(largest)

    def recompute_overflowed(self, norms: Tensor, tensors: Sequence[Tensor]) -> None:
        """Compute norms in float64 that overflow in float32 although every element is finite.

        This happens on the CPU only, where an overflow shows without waiting.
        """
        if norms.device.type != "cpu" or norms.dtype == torch.float64 or math.isfinite(norms.sum().numpy().item()):
            return
        largest = torch.finfo(norms.dtype).max
        for position, spec, _ in self._dense:
            place = self.places[position]
            part = norms[place.start : place.stop]
            if not bool(part.isinf().any().numpy().item()):
                continue
            rows = unit_rows(tensors[position], spec).flatten(1)
            again = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)  # on the CPU
            if self._granularity == "tensor":
                again = torch.linalg.vector_norm(again).reshape(1)
            part.copy_(torch.where(again.isfinite(), again.clamp(max=largest), again))

    def update_factors(self, norms: Tensor, weights: Tensor, eps: float, loss_scale: Tensor | None) -> None:
        """Compute the factor of each unit, shape (units,); 1 where nothing is clipped or the norm is not finite."""
        if loss_scale is not None:
            norms = norms.div_(loss_scale.to(norms.device))
        if self._granularity == "tensor":
            norms = norms.index_select(0, self._owners)
            weights = weights.add_(eps).index_select(0, self._owners)
        else:
            weights = weights.clamp_(min=eps)
        factors = torch.div(weights.mul_(self._limits), norms, out=self._factors)
        factors.clamp_(max=1.0)
        factors.masked_fill_(norms.isfinite().logical_not_(), 1.0)

    def apply(self, tensors: Sequence[Tensor]) -> None:
        """Multiply each unit by its factor, in place."""
        left = self._dense
        if self._table is not None:
            dense = [tensors[position] for position, _, _ in left]
            left = [left[index] for index in self._table.launch("scale_units", dense, self._factors)]
        elif self._key.device.type == "cpu":
            left = self._dense_over_limit()
        if left:
            members = [_broadcastable(tensors[position], spec) for position, spec, _ in left]
            torch._foreach_mul_(members, [view for _, _, view in left])
        for position, factors in self._sparse:
            gradient = tensors[position]
            values, indices = gradient._values(), gradient._indices()  # noqa: SLF001  # coalescing would copy
            rows = factors.index_select(0, indices[0]) if factors.shape[0] > 1 else factors
            values.mul_(rows.reshape(-1, *(1,) * (values.dim() - 1)).to(values.dtype))

    def _dense_over_limit(self) -> list[tuple[int, TensorSpec, Tensor]]:
        """Return the dense tensors in which a unit is scaled: on the CPU the factors can be read without waiting."""
        if not self._dense or not self._factors.min().numpy().item() < 1.0:
            return []
        smallest = np.minimum.reduceat(self._factors.numpy(), self._starts).tolist()
        return [known for known, place in zip(self._dense, self._places_in_order, strict=True) if smallest[place] < 1.0]


def _broadcastable(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Return a view of a gradient in the shape that the factors of its units multiply."""
    if spec.dtype.is_complex:
        tensor = real_view(tensor)
    return tensor.unflatten(0, (spec.groups, -1)) if spec.axis == "transposed" and spec.groups > 1 else tensor


def _as_factor_of(factors: Tensor, spec: TensorSpec) -> Tensor:
    """Return a view of factors, shape (units,), that multiplies each unit of a tensor of this specification."""
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
