"""Where Triton and a CUDA device are there, unit norms and scaling take one launch each over all tensors.

The plain operators of ``layout`` and ``agc`` stay the reference, and take what the kernels leave: sparse tensors, units
wider than ``WIDEST_ROW``, other types, and gradients that do not lie in memory in the order of their units. Before the
kernels are used on a device they must give on it what the plain operators give; else one warning says so, and
everything goes the plain way. With ``TRITON_INTERPRET=1`` they run on the CPU, slowly, which is how they are tested.
"""

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from gradwatch.norms.layout import (
    WIDEST_ROW,
    Arena,
    Axis,
    Bound,
    Layout,
    LayoutChangedError,
    Piece,
    Scratch,
    Spec,
    reducer,
    spec_of,
)

_log = logging.getLogger("gradwatch")

_Kernel = Literal["unit_norms", "scale_units"]
_KINDS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""Types that the kernels read and write, as they know them."""


@functools.cache
def usable(arena: Arena) -> bool:
    """Return whether the kernels run on a device in this precision, and give there what the plain operators give."""
    device = arena.device
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not (device.type == "cuda" or interpreted) or importlib.util.find_spec("triton") is None:
        return False
    try:
        wrong = _differing(arena)
    except Exception as error:  # Triton fails with whatever its compiler, driver or C compiler raises
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        _log.warning(
            "gradwatch: the Triton kernels are not used on %s, clipping takes plain PyTorch: %s", device, wrong
        )
    return not wrong


class _Form(NamedTuple):
    """Where the units of a tensor lie, in elements from its address: a row of the kernels' table."""

    first: int
    out: int
    kind: int
    per: int
    big: int
    small: int
    width: int
    run: int
    stride: int


def _form(spec: Spec, first: int, out: int) -> _Form:
    pair = 2 if spec.dtype.is_complex else 1
    kind, width = _KINDS[spec.dtype.to_real()], spec.width * pair
    if spec.axis != "transposed" or spec.units == 1:
        return _Form(first, out, kind, spec.units, 0, width, width, width, 0)
    run = width // (spec.shape[0] // spec.groups)
    stride = spec.shape[1] * run
    return _Form(first, out, kind, spec.shape[1], spec.shape[0] // spec.groups * stride, run, width, run, stride)


def takes(spec: Spec) -> bool:
    """Return whether the kernels can reduce and scale such a tensor."""
    real = spec.dtype.to_real() if spec.dtype.is_complex else spec.dtype
    return bool(spec.units) and not spec.sparse and real in _KINDS and spec.width <= WIDEST_ROW


class Table:
    """Tensors of one arena, and the units of those that the kernels take.

    Args:
        specs: of all of them.
        places: where the first unit of each lies in what is read or written for each unit.
        arena: theirs.
    """

    def __init__(self, specs: Sequence[Spec], places: Sequence[int], arena: Arena) -> None:
        forms: list[_Form] = []
        owners: list[Tensor] = []
        self._taken: list[int] = []
        self._left = [index for index, spec in enumerate(specs) if not takes(spec)]
        self._specs = specs
        programs = 0
        for index, (spec, place) in enumerate(zip(specs, places, strict=True)):
            if not takes(spec):
                continue
            owners.append(torch.full((spec.units,), len(forms), dtype=torch.int32, device="cpu"))
            forms.append(_form(spec, programs, place))
            self._taken.append(index)
            programs += spec.units
        self._device = arena.device
        self._grid = (programs,)
        self._owners = torch.cat(owners).to(arena.device) if owners else torch.zeros(0)
        self._forms = torch.tensor(forms, dtype=torch.int64, device="cpu").to(arena.device)
        self._known: list[int] = []
        self._addresses = torch.zeros(0)
        self._double = arena.dtype == torch.float64

    def launch(self, kernel: _Kernel, tensors: Sequence[Tensor], units: Tensor) -> list[int]:
        """Run a kernel over the units; return the indices of the tensors that are left to the plain operators."""
        misfits = [index for index in self._taken if not _fits(tensors[index], self._specs[index])]
        odd = set(misfits)
        addresses = [0 if index in odd else tensors[index].data_ptr() for index in self._taken]
        if any(addresses):
            self._address(addresses)
            from gradwatch.norms import triton_kernels  # needs Triton

            with _on(self._device):
                getattr(triton_kernels, kernel)[self._grid](
                    self._owners, self._addresses, self._forms, units, double=self._double, block=triton_kernels.BLOCK
                )
        return self._left + misfits

    def _address(self, addresses: list[int]) -> None:
        """Bring the addresses to the device where they have changed; a copy from pinned memory waits for nothing."""
        if addresses == self._known:
            return
        host = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        host = host.pin_memory() if self._device.type == "cuda" else host
        self._addresses = host.to(self._device, non_blocking=True)
        self._known = addresses


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _fits(tensor: Tensor, spec: Spec) -> bool:
    """Return whether a tensor lies in memory as its specification says."""
    if tensor.dtype != spec.dtype or tensor.shape != spec.shape or tensor.device != spec.device:
        return False
    if tensor.layout != torch.strided:
        return False
    return tensor.is_contiguous() or (
        spec.axis in ("rows", "whole") and tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


class KernelBound(Bound):
    """A layout with its buffers, computed by the kernels; by the plain operators what they leave."""

    def __init__(self, layout: Layout, arenas: dict[Arena, Tensor], scratch: Scratch) -> None:
        taken: dict[Arena, list[int]] = {}
        plain: list[Piece] = []
        for piece in layout.pieces:
            if takes(piece.spec):
                taken.setdefault(piece.arena, []).extend(piece.positions)
            else:
                plain.append(piece)
        super().__init__(layout, arenas, scratch, plain)
        self._tables = [
            (
                Table([layout.specs[p] for p in positions], [layout.places[p][1] for p in positions], arena),
                positions,
                arenas[arena],
            )
            for arena, positions in taken.items()
        ]

    def run(self, tensors: Sequence[Tensor], *, warm: bool = False) -> None:
        """Write the unit norms of ``tensors``, which must be of the layout's specification, in its order.

        Args:
            tensors: all of them.
            warm: as of ``Bound.run``.

        Raises:
            LayoutChangedError: a tensor has another shape now.
        """
        for table, positions, out in self._tables:
            for index in table.launch("unit_norms", [tensors[position] for position in positions], out):
                position = positions[index]
                spec, (_, start) = self.layout.specs[position], self.layout.places[position]
                if tensors[position].shape != spec.shape:
                    raise LayoutChangedError(f"a tensor is {tuple(tensors[position].shape)}, not {spec.shape}")
                reducer(spec)(tensors[position], out[start : start + spec.units])
        super().run(tensors, warm=warm)


def bind(layout: Layout, arenas: dict[Arena, Tensor], scratch: Scratch) -> Bound:
    """Return ``layout`` writing to ``arenas``, by the kernels where they run."""
    if layout.sizes and all(usable(arena) for arena in layout.sizes):
        return KernelBound(layout, arenas, scratch)
    return layout.bind(arenas, scratch)


_PROBES: Final[tuple[tuple[tuple[int, ...], Axis, int], ...]] = (
    ((), "whole", 1),
    ((3, 1500), "rows", 1),
    ((4, 3, 2), "transposed", 2),
    ((2, 3, 5), "experts", 1),
)


def _differing(arena: Arena) -> str:
    """Return what the kernels give other than the plain operators; empty where nothing is.

    It waits for the device: once in a process.
    """
    device = arena.device
    for dtype in [torch.float64] if arena.dtype == torch.float64 else [torch.float32, torch.float16, torch.bfloat16]:
        probes = [
            torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape).div_(64).to(device, dtype)
            for shape, _, _ in _PROBES
        ]
        specs = [spec_of(probe, axis, groups) for probe, (_, axis, groups) in zip(probes, _PROBES, strict=True)]
        layout = Layout(specs)
        norms, plain = (torch.zeros(layout.sizes[arena], dtype=arena.dtype, device=device) for _ in range(2))
        KernelBound(layout, {arena: norms}, Scratch()).run(probes)
        layout.bind({arena: plain}, Scratch()).run(probes)
        if not torch.allclose(norms, plain, rtol=1e-5):
            return f"norms of {dtype} are {norms.tolist()}, not {plain.tolist()}"
        factors = torch.linspace(0.5, 1.0, norms.numel(), dtype=arena.dtype, device=device)
        starts = [start for _, start in layout.places]
        Table(specs, starts, arena).launch("scale_units", probes, factors)
        layout.bind({arena: norms}, Scratch()).run(probes)
        if not torch.allclose(norms, plain * factors, rtol=1e-2):
            return f"scaled tensors of {dtype} have norms {norms.tolist()}, not {(plain * factors).tolist()}"
    return ""
