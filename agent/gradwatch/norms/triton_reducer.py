"""Launches the Triton kernels for unit norms and clipping: one launch over all tensors, where a CUDA device is there.

The plain operators stay the reference. They take the tensors that the kernels cannot: sparse tensors, units wider than
``WIDEST_ROW``, other dtypes, and gradients that do not lie in memory in the order of their units. Before the kernels
are used on a device, their results are compared with those of the plain operators on that device; where they differ,
one warning says so and the plain operators take everything. With ``TRITON_INTERPRET=1`` the kernels run on the CPU,
slowly, which is how they are tested.
"""

import importlib.util
import logging
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from gradwatch.norms.layout import NormLayout, Reduction
from gradwatch.norms.reducer import LayoutChangedError, NormReducer, Scratch
from gradwatch.norms.streams import captures
from gradwatch.norms.tensor_spec import WIDEST_ROW, BufferKey, TensorSpec, UnitAxis, norm_function, spec_of
from gradwatch.norms.transfer import pinned

_log = logging.getLogger("gradwatch")

_Kernel = Literal["unit_norms", "scale_units"]
_DTYPE_CODES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""Dtypes that the kernels read and write, by the code that they know them by."""


_usable: Final[dict[BufferKey, bool]] = {}
"""Whether the kernels run on a device in a precision, and agree there with the plain operators; where it was tested."""


def can_use_triton(key: BufferKey) -> bool:
    """Return whether ``compare_kernels`` has found that the kernels can be used; without a test the answer is no."""
    return _usable.get(key, False)


def compare_kernels(keys: Iterable[BufferKey]) -> None:
    """Compare the kernels with the plain operators on some devices, each once in a process.

    This compiles them, for some seconds, and waits for the device. So it is done when an agent is attached, never
    within a step, where other ranks may wait in a collective.
    """
    for key in keys:
        if key not in _usable:
            _usable[key] = _is_usable(key)


def _is_usable(key: BufferKey) -> bool:
    device = key.device
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not (device.type == "cuda" or interpreted) or importlib.util.find_spec("triton") is None:
        return False
    try:
        wrong = _difference(key)
    except Exception as error:  # Triton fails with whatever its compiler, driver or C compiler raises
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        _log.warning(
            "gradwatch: the Triton kernels are not used on %s, clipping takes plain PyTorch: %s", device, wrong
        )
    return not wrong


class _Row(NamedTuple):
    """Where the units of a tensor lie, in elements from its address: a row of the kernels' table of tensors."""

    first: int
    out: int
    dtype_code: int
    per: int
    big: int
    small: int
    width: int
    run: int
    stride: int


def _row(spec: TensorSpec, first: int, out: int) -> _Row:
    reals = 2 if spec.dtype.is_complex else 1
    code, width = _DTYPE_CODES[spec.dtype.to_real()], spec.width * reals
    if spec.axis != "transposed" or spec.units == 1:
        return _Row(first, out, code, spec.units, 0, width, width, width, 0)
    run = width // (spec.shape[0] // spec.groups)
    stride = spec.shape[1] * run
    return _Row(first, out, code, spec.shape[1], spec.shape[0] // spec.groups * stride, run, width, run, stride)


def is_supported(spec: TensorSpec) -> bool:
    """Return whether the kernels can reduce and scale such a tensor."""
    real = spec.dtype.to_real() if spec.dtype.is_complex else spec.dtype
    return bool(spec.units) and not spec.sparse and real in _DTYPE_CODES and spec.width <= WIDEST_ROW


class TritonTable:
    """A table of tensors on the device, by which one launch of a kernel covers the units of all of them.

    Args:
        specs: specifications of the tensors, whose unit norms share one buffer.
        places: index of the first unit of each tensor in the array that has one element for each unit.
        key: device and dtype of the buffer.
    """

    def __init__(self, specs: Sequence[TensorSpec], places: Sequence[int], key: BufferKey) -> None:
        rows: list[_Row] = []
        owners: list[Tensor] = []
        self._supported: list[int] = []
        self._unsupported = [index for index, spec in enumerate(specs) if not is_supported(spec)]
        self._specs = specs
        programs = 0
        for index, (spec, place) in enumerate(zip(specs, places, strict=True)):
            if not is_supported(spec):
                continue
            owners.append(torch.full((spec.units,), len(rows), dtype=torch.int32, device="cpu"))
            rows.append(_row(spec, programs, place))
            self._supported.append(index)
            programs += spec.units
        self._device = key.device
        self._grid = (programs,)
        self._owners = _to_device(torch.cat(owners), key.device) if owners else torch.zeros(0, device="cpu")
        self._rows = _to_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), key.device)
        self._copied_addresses: list[int] = []
        self._addresses = torch.zeros(0, device="cpu")
        self._double = key.dtype == torch.float64

    def launch(self, kernel: _Kernel, tensors: Sequence[Tensor], units: Tensor) -> list[int]:
        """Run a kernel over the units of ``tensors``.

        Args:
            kernel: name of the kernel.
            tensors: all tensors of the table, in its order.
            units: the array of factors that the kernel reads, or of norms that it writes.

        Returns:
            The indices of the tensors that the plain operators have to take: all of them while a graph is captured,
            whose replays would read a table of addresses that eager steps replace.
        """
        if captures(self._device):
            return list(range(len(tensors)))
        misfits = [index for index in self._supported if not _lies_as_specified(tensors[index], self._specs[index])]
        skipped = set(misfits)
        addresses = [0 if index in skipped else tensors[index].data_ptr() for index in self._supported]
        if any(addresses):
            self._copy_addresses(addresses)
            from gradwatch.norms import triton_kernels  # needs Triton

            with _on(self._device):
                getattr(triton_kernels, kernel)[self._grid](
                    self._owners, self._addresses, self._rows, units, double=self._double, block=triton_kernels.BLOCK
                )
        return self._unsupported + misfits

    def _copy_addresses(self, addresses: list[int]) -> None:
        """Copy the addresses to the device where they have changed; a copy from pinned memory waits for nothing."""
        if addresses == self._copied_addresses:
            return
        self._addresses = _to_device(torch.tensor(addresses, dtype=torch.int64, device="cpu"), self._device)
        self._copied_addresses = addresses


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    return pinned(host, device).to(device, non_blocking=True)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _lies_as_specified(tensor: Tensor, spec: TensorSpec) -> bool:
    """Return whether a tensor is of its specification, and its units lie in memory as the kernels expect."""
    if tensor.dtype != spec.dtype or tensor.shape != spec.shape or tensor.device != spec.device:
        return False
    if tensor.layout != torch.strided:
        return False
    return tensor.is_contiguous() or (
        spec.axis in ("rows", "whole") and tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


class TritonNormReducer(NormReducer):
    """A reducer that launches the kernels, and the plain operators for tensors that the kernels cannot take."""

    def __init__(self, layout: NormLayout, buffers: dict[BufferKey, Tensor], scratch: Scratch) -> None:
        supported: dict[BufferKey, list[int]] = {}
        plain: list[Reduction] = []
        for reduction in layout.reductions:
            if is_supported(reduction.spec):
                supported.setdefault(reduction.buffer, []).extend(reduction.positions)
            else:
                plain.append(reduction)
        super().__init__(layout, buffers, scratch, plain)
        self._tables = [
            (
                TritonTable([layout.specs[p] for p in positions], [layout.places[p][1] for p in positions], key),
                positions,
                buffers[key],
            )
            for key, positions in supported.items()
        ]

    def run(self, tensors: Sequence[Tensor], *, warm: bool = False) -> None:
        """Write the unit norms of ``tensors``, which must be of the layout's specifications, in its order.

        Args:
            tensors: all of them.
            warm: as in ``NormReducer.run``.

        Raises:
            LayoutChangedError: a tensor has another shape now.
        """
        for table, positions, out in self._tables:
            for index in table.launch("unit_norms", [tensors[position] for position in positions], out):
                position = positions[index]
                spec, (_, start) = self.layout.specs[position], self.layout.places[position]
                if tensors[position].shape != spec.shape:
                    raise LayoutChangedError(f"a tensor is {tuple(tensors[position].shape)}, not {spec.shape}")
                norm_function(spec)(tensors[position], out[start : start + spec.units])
        super().run(tensors, warm=warm)


def reducer_class(layout: NormLayout) -> type[NormReducer]:
    """Return the class of reducers for a layout: the Triton kernels' where these can be used."""
    by_kernels = bool(layout.sizes) and all(can_use_triton(key) for key in layout.sizes)
    chosen = TritonNormReducer if by_kernels else NormReducer
    layout.reducer_class = chosen
    return chosen


_PROBES: Final[tuple[tuple[tuple[int, ...], UnitAxis, int], ...]] = (
    ((), "whole", 1),
    ((3, 1500), "rows", 1),
    ((4, 3, 2), "transposed", 2),
    ((2, 3, 5), "experts", 1),
)
"""Shape, axis and groups of the tensors that kernels and plain operators are compared on."""


def _difference(key: BufferKey) -> str:
    """Return how the kernels differ from the plain operators; empty where they agree.

    It waits for the device, once in a process.
    """
    device = key.device
    for dtype in [torch.float64] if key.dtype == torch.float64 else [torch.float32, torch.float16, torch.bfloat16]:
        probes = [
            torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
            .reshape(shape)
            .div_(64)
            .to(dtype)
            .to(device)
            for shape, _, _ in _PROBES
        ]
        specs = [spec_of(probe, axis, groups) for probe, (_, axis, groups) in zip(probes, _PROBES, strict=True)]
        layout = NormLayout(specs)
        norms, plain = (torch.zeros(layout.sizes[key], dtype=key.dtype, device=device) for _ in range(2))
        TritonNormReducer(layout, {key: norms}, Scratch()).run(probes)
        NormReducer(layout, {key: plain}, Scratch()).run(probes)
        if not torch.allclose(norms, plain, rtol=1e-5):
            return f"norms of {dtype} are {norms.tolist()}, not {plain.tolist()}"
        factors = torch.linspace(0.5, 1.0, norms.numel(), dtype=key.dtype, device=device)
        starts = [start for _, start in layout.places]
        TritonTable(specs, starts, key).launch("scale_units", probes, factors)
        NormReducer(layout, {key: norms}, Scratch()).run(probes)
        if not torch.allclose(norms, plain * factors, rtol=1e-2):
            return f"scaled tensors of {dtype} have norms {norms.tolist()}, not {(plain * factors).tolist()}"
    return ""
