"""The Triton kernels: unit norms and scaling of the units of many tensors. ``triton_reducer`` launches them.

One program takes one unit. A table says where the units of each tensor lie. The addresses of the tensors are kept
apart, since gradients move from step to step. The elements of a unit lie in runs that are ``stride`` apart::

    element(unit, i) = unit // per * big + unit % per * small + i // run * stride + i % run
"""

import triton
import triton.language as tl

BLOCK = 1024
"""Elements that a program takes at once."""
COLUMNS = ("first", "out", "dtype_code", "per", "big", "small", "width", "run", "stride")
"""Columns of the table, int64: a tensor's first program, the index of its first unit among the norms, the code of its
dtype, and the numbers of the formula above."""
_COLUMNS: tl.constexpr = tl.constexpr(len(COLUMNS))


@triton.jit
def unit_norms(
    owners: tl.tensor,
    addresses: tl.tensor,
    table: tl.tensor,
    norms: tl.tensor,
    double: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write the L2 norm of each unit, summed in float32, or in float64 with ``double``; address 0 is skipped.

    Where squares overflow float32, the norm is that of the unit scaled by 2**-66, scaled back.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    address = tl.load(addresses + owner)
    row = table + owner * _COLUMNS
    if address != 0:
        unit = program - tl.load(row)
        width = tl.load(row + 6)
        squares = tl.zeros((block,), tl.float64 if double else tl.float32)
        scaled = tl.zeros((block,), tl.float64 if double else tl.float32)
        for start in range(0, width, block):
            index = start + tl.arange(0, block)
            values = _load(address, tl.load(row + 2), _offsets(row, unit, index), index < width, double, block)
            squares += values * values
            values *= 2.0**-66
            scaled += values * values
        norm = tl.sqrt(tl.sum(squares, 0))
        if not double:
            small = tl.sqrt(tl.sum(scaled, 0))
            overflowed = (norm == float("inf")) & (small < float("inf"))
            norm = tl.where(overflowed, tl.minimum(small * 2.0**66, 3.4028234663852886e38), norm)
        tl.store(norms + tl.load(row + 1) + unit, norm)


@triton.jit
def scale_units(
    owners: tl.tensor,
    addresses: tl.tensor,
    table: tl.tensor,
    factors: tl.tensor,
    double: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Multiply each unit by its factor, in place; a unit whose factor is 1 is not touched, address 0 is skipped."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    address = tl.load(addresses + owner)
    row = table + owner * _COLUMNS
    unit = program - tl.load(row)
    factor = tl.load(factors + tl.load(row + 1) + unit)
    if (address != 0) & (factor != 1.0):
        dtype_code = tl.load(row + 2)
        width = tl.load(row + 6)
        for start in range(0, width, block):
            index = start + tl.arange(0, block)
            offsets = _offsets(row, unit, index)
            values = _load(address, dtype_code, offsets, index < width, double, block) * factor
            _store(address, dtype_code, offsets, index < width, values, double)


@triton.jit
def _offsets(row: tl.tensor, unit: tl.tensor, index: tl.tensor) -> tl.tensor:
    per = tl.load(row + 3)
    run = tl.load(row + 7)
    start = unit // per * tl.load(row + 4) + unit % per * tl.load(row + 5)
    return start + index // run * tl.load(row + 8) + index % run


@triton.jit
def _load(
    address: tl.tensor,
    dtype_code: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    double: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    values = tl.zeros((block,), tl.float64 if double else tl.float32)
    if double:
        values = tl.load(address.to(tl.pointer_type(tl.float64)) + offsets, mask=mask, other=0.0)
    elif dtype_code == 0:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif dtype_code == 1:
        values = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _store(
    address: tl.tensor,
    dtype_code: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    values: tl.tensor,
    double: tl.constexpr,
) -> None:
    if double:
        tl.store(address.to(tl.pointer_type(tl.float64)) + offsets, values, mask=mask)
    elif dtype_code == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, values, mask=mask)
    elif dtype_code == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, values.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offsets, values.to(tl.bfloat16), mask=mask)
